"""A run's record: ``log.jsonl`` (one JSON object a line) and TensorBoard event files beside it.

Kinds of records: ``start`` (identity, versions, settings), ``train`` (one optimizer step), ``eval``, ``checkpoint``,
``resume``. Numbers are JSON numbers; times are seconds of training so far, over all resumes.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Protocol

from titans_graph.training import atomic

FILE = "log.jsonl"


class _Writer(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Writes the records of one run; those after ``step`` (of a run killed after its last checkpoint) are dropped."""

    def __init__(self, run: Path, step: int, *, tensorboard: bool = True) -> None:
        self._path = run / FILE
        kept = [r for r in read(run) if r["step"] <= step] if step else []
        atomic.write_file(self._path, b"".join(_line(record) for record in kept))
        self._curves = run / "tensorboard"
        try:
            self._board = _board(self._curves, step) if tensorboard else None
            # Without a buffer: closing it would write, and fail, a second time on a full disk.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise atomic.failure(run, error) from error

    def add(self, kind: str, **values: Any) -> None:
        """Append one record; numbers also go to TensorBoard. CheckpointError on a full disk."""
        rest = memoryview(_line({"kind": kind, **values}))
        try:
            while rest:  # a disk that is nearly full takes a part
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise atomic.failure(self._path, error, len(rest)) from error
        try:
            self._scalars(kind, values)
        except OSError as error:
            raise atomic.failure(self._curves, error) from error

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            with contextlib.suppress(OSError):  # curves are drawn from log.jsonl as well
                self._board.close()

    def _scalars(self, kind: str, values: dict[str, Any]) -> None:
        if self._board is None or kind not in ("train", "eval"):
            return
        for name, value in values.items():
            if name not in ("step", "time") and isinstance(value, float):
                self._board.add_scalar(f"{kind}/{name}", value, values["step"])


def read(run: Path) -> list[dict[str, Any]]:
    """All records of a run, in order; lines that a crash cut short, or are damaged, are left out. Empty without a log."""
    try:
        lines = (run / FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [record for line in lines if (record := _record(line)) is not None]


def missing(records: list[dict[str, Any]], step: int) -> list[int]:
    """The steps up to ``step`` that records lack."""
    there = {r["step"] for r in records if r["kind"] == "train"}
    return [n for n in range(1, step + 1) if n not in there]


def _record(line: bytes) -> dict[str, Any] | None:
    """A line as a record; None for what is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(found, dict) and isinstance(found.get("step"), int) and isinstance(found.get("kind"), str)
    return found if whole else None


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _board(folder: Path, step: int) -> _Writer | None:
    """A TensorBoard writer, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    writer: _Writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
    return writer
