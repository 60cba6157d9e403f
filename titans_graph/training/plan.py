"""How many steps the demo makes, and on how many threads: from a short timing of the models, written down once.

Small models are often faster on one thread than on two, and many times faster where other programs want the cores too: so
both are timed.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from titans_graph.errors import CheckpointError
from titans_graph.runtime.denormals import flushed
from titans_graph.tasks.text import Text
from titans_graph.training import atomic, reading
from titans_graph.training.config import TrainConfig
from titans_graph.training.interface import LanguageModel
from titans_graph.training.objective import LossModule

FILE = "plan.json"
FEWEST = 10
"""Steps that are made however little time is given."""
PROBES = 3
MARGIN = 0.75
"""Part of the time given that training may plan with; the rest is for the sample and a machine that slows."""

Note = Callable[[str], None]
Models = Mapping[str, LanguageModel]


@dataclass(frozen=True)
class Plan:
    """Steps for every model, threads to make them on, and the seconds one step of each took when it was timed."""

    steps: int
    threads: int
    seconds: dict[str, float]


def plan(models: Models, text: Text, out: Path, config: TrainConfig, most: int, minutes: float, note: Note) -> Plan:
    """The plan that an earlier call wrote to ``out``, or a new one: at most ``most`` steps, fewer if time is short."""
    path = out / FILE
    if path.is_file():
        found = _read(path)
        note(f"{out}: a demo of {found.steps} steps is here; going on with it (--fresh starts a new one)")
        return found
    threads, seconds = _fastest(models, text, config)
    # A validation costs about a third of a step for the same number of bytes.
    validation = config.eval_bytes / (3 * config.batch * config.length * max(1, config.eval_every))
    fitting = int(60 * minutes * MARGIN / (sum(seconds.values()) * (1 + validation)))
    made = Plan(max(FEWEST, min(most, fitting)), threads, seconds)
    timing = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    given = "1 minute" if minutes == 1 else f"{minutes:g} minutes"
    note(f"one step on {threads} thread(s): {timing}; {made.steps} of {most} steps fit into {given}")
    atomic.write_file(path, json.dumps(asdict(made)).encode())
    return made


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """While entered, torch computes on that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read(path: Path) -> Plan:
    try:
        found = Plan(**reading.json_of(path))
        return Plan(int(found.steps), int(found.threads), found.seconds)
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})\n  help: choose another --out, or --fresh") from error


def _fastest(models: Models, text: Text, config: TrainConfig) -> tuple[int, dict[str, float]]:
    """One thread or as many as torch takes by itself, whichever is faster, and the seconds of a step of each model."""
    cuda = torch.cuda.is_available() and config.device != "cpu"
    choices = {torch.get_num_threads()} if cuda else {1, torch.get_num_threads()}
    timed: dict[int, dict[str, float]] = {}
    for number in sorted(choices):
        with threads(number):
            timed[number] = {name: _seconds(model, text, config, cuda) for name, model in models.items()}
    best = min(timed, key=lambda number: sum(timed[number].values()))
    return best, timed[best]


def _seconds(model: LanguageModel, text: Text, config: TrainConfig, cuda: bool) -> float:
    """The median time of a training step, after one that does not count; weights and random state stay as they were."""
    device = "cuda" if cuda else "cpu"
    state = torch.get_rng_state()
    model.to(device)
    module = LossModule(model, config.compile)
    times = []
    for step in range(1 + PROBES):
        windows = text.batch(config.seed, step, range(config.batch), config.length).to(device)
        started = time.perf_counter()
        with flushed():
            loss = module(windows)
            loss.backward()
            loss.item()
        times.append(time.perf_counter() - started)
        for parameter in model.parameters():
            parameter.grad = None
    torch.set_rng_state(state)
    return median(times[1:])
