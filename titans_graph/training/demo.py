"""The ``demo`` command: a small Titans MAC and a transformer of the same size learn the same text for the same time.

Both see the same batches for the same number of steps. The number of steps is fixed at :data:`STEPS`, or less where a
short timing of both models says that the time given would not suffice; it is written down, so that an interrupted
demo goes on with it. Nothing here is tuned to favour either model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from titans_graph.errors import UsageError
from titans_graph.runtime.denormals import flushed
from titans_graph.tasks.floors import Floors, floors
from titans_graph.tasks.text import STANDARD, Text
from titans_graph.training import figures, folder, logs, plan
from titans_graph.training.config import TrainConfig
from titans_graph.training.evaluate import bits_per_byte
from titans_graph.training.generate import generate
from titans_graph.training.interface import LanguageModel
from titans_graph.training.loop import TrainResult, print_note, train

MODELS: dict[str, dict[str, Any]] = {
    "mac": {"dim": 64, "layers": 2, "hidden": 32},
    "transformer": {"dim": 80, "layers": 2},
}
"""Shipped spec -> its parameters, chosen so that both models have as many trained numbers, within TOLERANCE."""
TOLERANCE = 0.05
STEPS = 400
MINUTES = 4.0
CONFIG = TrainConfig(
    batch=8,
    length=256,
    learning_rate=2e-3,
    warmup=40,
    eval_every=50,
    eval_bytes=16384,
    checkpoint_every=50,
    eval_restart=256,
)
PROMPT = "def read_file(path):\n    "
"""What the sample goes on after where the text is Python; elsewhere, the first words of the text."""
SAMPLE = 300

Load = Callable[..., LanguageModel]


@dataclass(frozen=True)
class Row:
    """One trained model in the table. Bits per byte of one stretch: restarted as in training, and streamed."""

    name: str
    parameters: int
    state_bytes: int
    grows: bool
    windows: float
    streamed: float
    tokens_per_second: float


@dataclass(frozen=True)
class DemoResult:
    """What :func:`demo` found. ``signal`` not 0: stopped by that signal, without a table."""

    rows: tuple[Row, ...]
    floors: Floors
    steps: int
    prompt: str
    sample: str
    signal: int = 0


def demo(
    load: Load,
    text: Text,
    out: Path,
    *,
    minutes: float = MINUTES,
    models: Mapping[str, dict[str, Any]] = MODELS,
    config: TrainConfig = CONFIG,
    steps: int = STEPS,
    note: Callable[[str], None] = print_note,
    progress: bool = True,
) -> DemoResult:
    """Train every model of ``models`` (spec name to parameters for ``load``) and compare them. Writes under ``out``.

    A folder with an unfinished demo goes on where it stopped. Errors as in ``train``; UsageError where the models
    differ in size by more than 5 %.
    """
    built = {name: _build(load, name, parameters, config.seed) for name, parameters in models.items()}
    _check_sizes(built)
    planned = plan.plan(built, text, out, config, steps, minutes, note)
    config = replace(config, steps=planned.steps, warmup=min(config.warmup, planned.steps // 5))
    found = floors(text.train, text.stretch(config.eval_bytes))
    with plan.threads(planned.threads):
        results = _train(built, text, config, out, note, progress)
        stopped = [result.signal for result in results.values() if result.signal]
        if stopped:
            return DemoResult((), found, config.steps, "", "", stopped[0])
        records = {name: logs.read(out / name) for name in built}
        rows = tuple(_row(name, model, results[name], records[name], text, config) for name, model in built.items())
        prompt = PROMPT if text.name == STANDARD else f"{text.opening()} ".lstrip()
        sample = "".join(generate(next(iter(built.values())), prompt, tokens=SAMPLE, seed=config.seed))
    shown = {"bigram": found.bigram, "bzip2": found.bzip2}
    figures.loss_curves(out / "loss.png", records, shown, f"{config.steps} steps on the {text.name}")
    return DemoResult(rows, found, config.steps, prompt, sample)


def _train(
    built: Mapping[str, LanguageModel], text: Text, config: TrainConfig, out: Path, note: plan.Note, progress: bool
) -> dict[str, TrainResult]:
    """Train one model after the other, up to the first that is stopped by a signal."""
    results: dict[str, TrainResult] = {}
    for name, model in built.items():
        size = f"{config.steps} steps of {config.batch} x {config.length} bytes"
        note(f"\n{name}: {model.summary().parameters:,} parameters, {size}")
        results[name] = train(model, text, config, out / name, note=note, progress=progress)
        if results[name].signal:
            break
    return results


def set_aside(out: Path, note: Callable[[str], None] = print_note, models: Iterable[str] = MODELS) -> None:
    """Make room for a new demo in ``out``: its runs are renamed, its plan is removed."""
    for name in models:
        if moved := folder.set_aside(out / name):
            note(f"the earlier run is now {moved}")
    (out / plan.FILE).unlink(missing_ok=True)


def table(result: DemoResult, config: TrainConfig = CONFIG) -> str:
    """The result as text: one column a model, then the floors on the same stretch."""
    rows = result.rows
    lines = [
        ("", [r.name for r in rows]),
        (f"bits per byte, fresh every {config.eval_restart} bytes", [f"{r.windows:.3f}" for r in rows]),
        ("bits per byte, one long stream", [f"{r.streamed:.3f}" for r in rows]),
        ("  floor: bigram counts", [f"{result.floors.bigram:.3f}"]),
        ("  floor: bzip2", [f"{result.floors.bzip2:.3f}"]),
        ("parameters", [f"{r.parameters:,}" for r in rows]),
        ("state of one stream, bytes", [f"{r.state_bytes:,}" + (" and growing" if r.grows else "") for r in rows]),
        ("training, bytes per second", [f"{r.tokens_per_second:,.0f}" for r in rows]),
    ]
    text = [f"{label:<36}" + "".join(f"{cell:>24}" for cell in cells) for label, cells in lines]
    text.append(f"all on the same {config.eval_bytes:,} bytes of validation text, after {result.steps} steps each")
    return "\n".join(text)


def _build(load: Load, name: str, parameters: dict[str, Any], seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    return load(name, **parameters)


def _check_sizes(built: Mapping[str, LanguageModel]) -> None:
    sizes = {name: model.summary().parameters for name, model in built.items()}
    if max(sizes.values()) > (1 + TOLERANCE) * min(sizes.values()):
        raise UsageError(f"the demo's models differ by more than {TOLERANCE:.0%} in parameters: {sizes}")


def _row(
    name: str,
    model: LanguageModel,
    result: TrainResult,
    records: list[dict[str, Any]],
    text: Text,
    config: TrainConfig,
) -> Row:
    model.eval()
    device = next(model.parameters()).device
    stretch = text.stretch(config.eval_bytes)
    windows = result.bits_per_byte if result.bits_per_byte is not None else math.nan
    with flushed():
        streamed = bits_per_byte(model, stretch, device=device)
    size = model.summary()
    speed = median(r["tokens_per_s"] for r in records if r["kind"] == "train")
    return Row(name, size.parameters, size.state_bytes, size.grows, windows, streamed, speed)
