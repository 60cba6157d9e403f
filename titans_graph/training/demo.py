"""The ``demo`` command: a small Titans MAC and a transformer of the same size learn the same text for the same time.

Both see the same batches for the same number of steps. The number of steps is fixed at :data:`STEPS`, or less where a
short timing of both models says that the time given would not suffice; it is written down, so that an interrupted
demo goes on with it. Nothing here is tuned to favour either model.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from titans_graph.errors import CheckpointError, UsageError
from titans_graph.tasks.floors import Floors, floors
from titans_graph.tasks.text import Text
from titans_graph.training import atomic, figures, folder, logs
from titans_graph.training.config import TrainConfig
from titans_graph.training.denormals import flushed
from titans_graph.training.evaluate import bits_per_byte
from titans_graph.training.generate import generate
from titans_graph.training.interface import LanguageModel
from titans_graph.training.loop import LossModule, TrainResult, print_note, train

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
PROBE_STEPS = 3
MARGIN = 0.75
"""Part of the time given that training may plan with; the rest is for the sample and a machine that slows."""
PLAN = "plan.json"
PROMPT = "def read_file(path):\n    "
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
    config = replace(config, steps=_planned_steps(built, text, out, config, steps, minutes, note))
    config = replace(config, warmup=min(config.warmup, config.steps // 5))
    found = floors(text.train, text.stretch(config.eval_bytes))
    results: dict[str, TrainResult] = {}
    for name, model in built.items():
        note(
            f"\n{name}: {model.summary().parameters:,} parameters, "
            f"{config.steps} steps of {config.batch} x {config.length} bytes"
        )
        results[name] = train(model, text, config, out / name, note=note, progress=progress)
        if results[name].signal:
            return DemoResult((), found, config.steps, "", results[name].signal)
    records = {name: logs.read(out / name) for name in built}
    rows = tuple(_row(name, model, results[name], records[name], text, config) for name, model in built.items())
    shown = {"bigram": found.bigram, "bzip2": found.bzip2}
    title = f"{config.steps} steps on the {text.name}"
    figures.loss_curves(out / "loss.png", records, shown, title)
    sample = "".join(generate(next(iter(built.values())), PROMPT, tokens=SAMPLE, seed=config.seed))
    return DemoResult(rows, found, config.steps, sample)


def set_aside(out: Path, note: Callable[[str], None] = print_note, models: Iterable[str] = MODELS) -> None:
    """Make room for a new demo in ``out``: its runs are renamed, its plan is removed."""
    for name in models:
        if moved := folder.set_aside(out / name):
            note(f"the earlier run is now {moved}")
    (out / PLAN).unlink(missing_ok=True)


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


def _planned_steps(
    built: Mapping[str, LanguageModel],
    text: Text,
    out: Path,
    config: TrainConfig,
    most: int,
    minutes: float,
    note: Callable[[str], None],
) -> int:
    """The number of steps of this demo: the one written down by an earlier call, or what fits into the time given."""
    plan = out / PLAN
    if plan.is_file():
        try:
            steps = int(json.loads(plan.read_text())["steps"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{plan}: cannot be read ({error})\n  help: choose another --out, or pass --fresh") from error
        note(f"{out}: a demo of {steps} steps is here; going on with it (--fresh starts a new one)")
        return steps
    seconds = {name: _seconds_per_step(model, text, config) for name, model in built.items()}
    # A validation costs about a third of a step for the same number of bytes.
    validation = config.eval_bytes / (3 * config.batch * config.length * max(1, config.eval_every))
    fitting = int(60 * minutes * MARGIN / (sum(seconds.values()) * (1 + validation)))
    steps = max(10, min(most, fitting))
    timing = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    note(f"one step: {timing}; {steps} of {most} steps fit into {minutes:g} minutes")
    atomic.write_file(plan, json.dumps({"steps": steps, "seconds_per_step": seconds}).encode())
    return steps


def _seconds_per_step(model: LanguageModel, text: Text, config: TrainConfig) -> float:
    """The median time of a training step, after one that does not count; weights and random state stay as they were."""
    state = torch.get_rng_state()
    device = "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
    model.to(device)
    module = LossModule(model, config.compile)
    times = []
    for step in range(1 + PROBE_STEPS):
        started = time.perf_counter()
        with flushed():
            loss = module(text.batch(config.seed, step, range(config.batch), config.length).to(device))
            loss.backward()
        loss.item()
        times.append(time.perf_counter() - started)
        for parameter in model.parameters():
            parameter.grad = None
    torch.set_rng_state(state)
    return median(times[1:])


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
