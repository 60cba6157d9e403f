"""A training step that gave a NaN or infinity, kept so that it can be run again: batch, weights, random states, verdict.

``RUN/nonfinite-step-00000123/`` holds the files of a checkpoint (of the weights the step began with, see
:mod:`titans_graph.training.checkpoint`), ``batch.safetensors`` with ``windows`` ``[B, T + 1]``, and ``replay.json``: what
was not finite, the settings of the run, and the nodes it was found at. Read by ``titans-graph doctor --replay``.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from titans_graph.errors import CheckpointError, TitansGraphError, shortened
from titans_graph.runtime import files
from titans_graph.runtime.denormals import flushed
from titans_graph.tasks.text import VOCABULARY
from titans_graph.training import atomic, checkpoint, reading
from titans_graph.training.config import TrainConfig
from titans_graph.training.interface import Build, LanguageModel
from titans_graph.training.objective import LossModule
from titans_graph.training.trace import Trace, trace

BATCH, REPLAY = "batch.safetensors", "replay.json"


class NonFiniteError(TitansGraphError):
    """Loss, gradient norm or a weight is no finite number. ``step`` counts from 1; ``folder`` is for ``doctor --replay``."""

    def __init__(self, what: str, value: float, step: int, folder: Path, found: list[str], kept: str) -> None:
        self.step = step
        self.folder = folder
        lines = [f"step {step}: the {what} is {value}; the last checkpoint is from before this step", *found, kept]
        help_ = "a smaller learning rate or a longer warm-up makes another run: choose another --out, or --fresh"
        super().__init__("\n  ".join([*lines, f"help: {help_}"]))


@dataclass(frozen=True)
class Step:
    """A step that failed: the checkpoint it began from, its batch, and what ``replay.json`` says."""

    path: Path
    start: checkpoint.Checkpoint
    windows: Tensor
    report: dict[str, Any]

    @property
    def config(self) -> TrainConfig:
        """The settings of the run."""
        return TrainConfig.from_plain(self.start.value("config"))


@dataclass(frozen=True)
class Rerun:
    """A step run again: ``loss`` and ``norm`` as training computes them, and the trace of the eager program."""

    step: Step
    loss: float
    norm: float
    device: str
    trace: Trace

    @property
    def finite(self) -> bool:
        """Whether nothing went wrong this time."""
        return math.isfinite(self.loss) and math.isfinite(self.norm) and self.trace.finite

    def text(self) -> str:
        """For people."""
        report = self.step.report
        lines = [
            f"{self.step.path}: step {report['step']}, where the {report['what']} was {report['value']}",
            f"run again on {self.device}: loss {self.loss}, gradient norm {self.norm}",
            *self.trace.lines(),
        ]
        if self.finite:
            lines.append(f"finite this time: it does not happen on this machine; there it was {report['device']}")
        elif self.trace.finite:
            lines.append("the eager program is finite here: what goes wrong is in the compiled program")
        return "\n".join(lines)

    def plain(self) -> dict[str, Any]:
        """Ready for JSON."""
        again = {"loss": str(self.loss), "norm": str(self.norm), "device": self.device, "finite": self.finite}
        return {"folder": str(self.step.path), "then": self.step.report, "again": again, "trace": self.trace.plain()}


def keep(
    out: Path,
    model: LanguageModel,
    files: dict[str, bytes],
    windows: Tensor,
    report: dict[str, Any],
    autocast: Callable[[], Any],
) -> NonFiniteError:
    """Keep a step under ``out`` and give the error to raise. ``files``: of a checkpoint; ``report``: step, what, value, ...

    Where the disk refuses, the error says so instead.
    """
    path = out / f"nonfinite-step-{report['step']:08d}"
    try:
        with autocast():
            found = _traced(model, windows)
        lines, plain = found.lines(), found.plain()
    except Exception as error:  # Out of memory, say: nothing here may hide what stopped the run.
        lines, plain = [f"its nodes could not be looked at: {type(error).__name__}: {error}".splitlines()[0]], {}
    written = json.dumps({**report, "value": str(report["value"]), "nodes": plain, "found": lines}, indent=1)
    more = {BATCH: save({"windows": windows.cpu().contiguous()}), REPLAY: written.encode()}
    kept = f"kept in {path}; look at it with: titans-graph doctor --replay {path}"
    try:
        atomic.write_folder(path, {**files, **more})
    except CheckpointError as error:
        kept = f"the step could not be kept: {error}"
    return NonFiniteError(report["what"], report["value"], report["step"], path, lines, kept)


def find(path: str | Path) -> Step:
    """The step kept in a folder, or the last one kept under a run's folder; CheckpointError where there is none."""
    path = Path(path)
    if not (path / REPLAY).is_file():
        kept = sorted(path.glob("nonfinite-step-*"))
        if not kept:
            raise CheckpointError(
                f"{path}: no step is kept here\n  help: give the folder nonfinite-step-... that the message at the stop named"
            )
        path = kept[-1]
    start = checkpoint.find(path, lambda text: None)
    try:
        report = _report(reading.json_of(path / REPLAY))
        windows = _windows(files.read(path / BATCH, "batch", CheckpointError)[0]["windows"])
        return Step(path, start, windows, report)
    except (OSError, ValueError, KeyError) as error:
        reason = shortened(str(error), 200)
        raise CheckpointError(f"{path}: no step that can be run again ({reason})") from error


def _windows(found: Tensor) -> Tensor:
    """Windows of bytes ``[B, T + 1]``, of at least one token each, as a copy; ValueError for anything else."""
    if found.dim() != 2 or found.dtype != torch.int64 or found.shape[0] < 1 or found.shape[1] < 2:
        raise ValueError(f"its batch is {list(found.shape)} {found.dtype}, no windows of ids")
    if not 0 <= int(found.min()) <= int(found.max()) < VOCABULARY:
        raise ValueError(f"its batch holds ids outside of 0..{VOCABULARY - 1}")
    return files.copied(found, torch.device("cpu"))


def _report(found: Any) -> dict[str, Any]:
    """What ``replay.json`` says, fit to be shown to anybody; ValueError where it is no report."""
    report = _shown(found)
    words = isinstance(report, dict) and all(isinstance(report.get(key), str) for key in ("what", "value", "device"))
    step = report.get("step") if words else None
    if type(step) is not int or not 0 <= step < 1 << 53:
        raise ValueError(f"{REPLAY} is no report of a step")
    return dict(report)


def _shown(value: Any, depth: int = 0) -> Any:
    """A value of JSON without what a terminal or another reader of JSON would choke on; ValueError where it is nested deep."""
    if isinstance(value, str):
        return reading.shown(value, 500)
    if isinstance(value, list | dict):
        if depth == 4 or len(value) > 1000:
            raise ValueError(f"{REPLAY} is no report of a step")
        items = value.items() if isinstance(value, dict) else enumerate(value)
        shown = {key: _shown(item, depth + 1) for key, item in items}
        return {_shown(key): item for key, item in shown.items()} if isinstance(value, dict) else list(shown.values())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def rerun(step: Step, build: Build) -> Rerun:
    """Run a step again, as it was run in training where this machine can, and then with every node looked at."""
    config = step.config
    cuda = torch.cuda.is_available() and config.device != "cpu"
    device = torch.device("cuda" if cuda else "cpu")
    model = step.start.model(build)
    model.to(device)
    model.train()
    windows = step.windows.to(device)

    def autocast() -> contextlib.AbstractContextManager[Any]:
        half = step.report.get("precision") == "bf16"
        return torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()

    with flushed():
        checkpoint.restore_random(step.start, model)
        module = LossModule(model, config.compile)
        with autocast():
            loss = module(windows)
        loss.backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        norm = float(torch.stack(norms).norm()) if norms else 0.0
        checkpoint.restore_random(step.start, model)
        with autocast():
            found = _traced(model, windows)
    return Rerun(step, float(loss.detach()), norm, str(device), found)


def _traced(model: LanguageModel, windows: Tensor) -> Trace:
    module = LossModule(model, compile=False)
    return trace(cast(nn.Module, model), lambda: module(windows), windows)
