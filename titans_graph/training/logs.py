"""A run's record: ``log.jsonl`` (one JSON object a line) and TensorBoard event files beside it.

Kinds of records: ``start`` (identity, versions, settings), ``train`` (one optimizer step), ``eval``, ``checkpoint``,
``resume``. Numbers are JSON numbers; times are seconds of training so far, over all resumes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from titans_graph.errors import CheckpointError
from titans_graph.training import atomic

FILE = "log.jsonl"


class _Writer(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Writes the records of one run; those after ``step`` (of a run killed after its last checkpoint) are dropped."""

    def __init__(self, run: Path, step: int, *, tensorboard: bool = True) -> None:
        self._path = run / FILE
        kept = [r for r in read(run) if r.get("step", 0) <= step] if step else []
        atomic.write_file(self._path, b"".join(_line(record) for record in kept))
        self._file = open(self._path, "ab")  # noqa: SIM115 (closed by close)
        self._board = _board(run / "tensorboard", step) if tensorboard else None

    def add(self, kind: str, **values: Any) -> None:
        """Append one record and flush it; numbers also go to TensorBoard. CheckpointError on a full disk."""
        try:
            self._file.write(_line({"kind": kind, **values}))
            self._file.flush()
            self._scalars(kind, values)
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _scalars(self, kind: str, values: dict[str, Any]) -> None:
        if self._board is None or kind not in ("train", "eval"):
            return
        for name, value in values.items():
            if name not in ("step", "time") and isinstance(value, float):
                self._board.add_scalar(f"{kind}/{name}", value, values["step"])


def read(run: Path) -> list[dict[str, Any]]:
    """All records of a run, in order; a last line that a crash cut short is left out. Empty where there is no log."""
    records = []
    try:
        lines = (run / FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


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
