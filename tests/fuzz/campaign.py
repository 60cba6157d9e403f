"""Trying many inputs: what is drawn for which reader, how time is bounded, how findings are told apart and made small."""

from __future__ import annotations

import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from tests.fuzz import contracts, files, folders, mutate, seeds
from titans_graph.training import replay

Draw = Callable[[Random], bytes]


@dataclass(frozen=True)
class Target:
    """One kind of input: how it is drawn, and the contract that every one of them is held to."""

    name: str
    draw: Draw
    contract: contracts.Contract

    def input(self, seed: int, number: int) -> bytes:
        """The input of that number: a function of seed and number alone."""
        return self.draw(Random(f"{self.name}/{seed}/{number}"))


def _texts(good: Callable[[], Sequence[bytes]], trees: bool = True) -> Draw:
    return lambda draw: mutate.text(draw, good(), trees=trees)


TARGETS = {
    t.name: t
    for t in (
        Target("spec", _texts(seeds.specs), contracts.spec),
        Target("graph", _texts(seeds.graph_texts, trees=False), contracts.graph_text),
        Target("network", _texts(seeds.networks), contracts.network),
        Target("objective", _texts(seeds.objectives), contracts.objective),
        Target("setting", _texts(seeds.networks), contracts.setting),
        Target("state", files.draw_state, files.state),
        Target("weights", files.draw_weights, files.weights),
        Target("optimizer", files.draw_optimizer, files.optimizer),
        Target("progress", files.draw_progress, files.progress),
        Target("manifest", files.draw_manifest, files.manifest),
        Target("batch", folders.draw_batch, folders.kept(replay.BATCH)),
        Target("replay", folders.draw_report, folders.kept(replay.REPLAY)),
        Target("log", folders.draw_log, folders.log),
        Target("identity", folders.draw_identity, folders.identity),
    )
}


class TooLong(BaseException):
    """An input took more steps or time than any input may; no handler of ordinary errors catches it."""


@contextmanager
def steps(most: int) -> Iterator[None]:
    """Count calls of Python functions, and end what makes more than ``most``: the same on every machine."""
    count = 0

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"
        if count > most:
            sys.setprofile(None)
            raise TooLong(f"more than {most} calls")

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """End what takes twice as long; generous, because a busy machine is not a bug. In the main thread only.

    Nor is one that was suspended: its clock goes on, so the first ring may come at once, and only the second counts.
    """
    rung = 0

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal rung
        rung += 1
        if rung > 1:
            raise TooLong(f"more than {2 * seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def calls(work: Callable[[], object]) -> int:
    """How many Python functions some work calls."""
    count = 0

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@dataclass
class Report:
    """How many inputs were tried, what became of them, and one example of each finding by what tells it apart."""

    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[str, tuple[int, bytes, str]] = field(default_factory=dict)

    def text(self) -> str:
        """Findings with their numbers and tracebacks; empty where there are none."""
        return "\n\n".join(f"input {n}: {key}\n{trace}" for key, (n, _, trace) in self.findings.items())


Guard = Callable[[], AbstractContextManager[None]]


def attempt(contract: contracts.Contract, data: bytes, folder: Path, guard: Guard) -> tuple[str, str, str]:
    """Outcome, and for a finding what tells it apart and its traceback."""
    try:
        with guard():
            return contract(data, folder), "", ""
    except (Exception, TooLong) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [
            f for f in frames if "/tests/" not in f.filename and "site-packages" not in f.filename and "lib/" not in f.filename
        ]
        place = (own or frames)[-1]
        where = f"{Path(place.filename).name}:{place.name}"
        detail = "" if own else str(error)[:40]
        return "finding", f"{type(error).__name__} in {where} {detail}".strip(), traceback.format_exc()[-4000:]


def run(target: Target, seed: int, numbers: range, folder: Path, guard: Guard) -> Report:
    """Try the inputs of these numbers."""
    report = Report()
    for number in numbers:
        data = target.input(seed, number)
        outcome, key, trace = attempt(target.contract, data, folder, guard)
        report.tried += 1
        report.outcomes[outcome] += 1
        if key:
            report.findings.setdefault(key, (number, data, trace))
    return report


def shrink(data: bytes, same: Callable[[bytes], bool], tries: int = 2000) -> bytes:
    """A smaller input for which ``same`` still holds: stretches are taken out, ever shorter ones."""
    size = len(data) // 2
    while size and tries > 0:
        at = 0
        while at < len(data) and tries > 0:
            shorter = data[:at] + data[at + size :]
            tries -= 1
            if same(shorter):
                data = shorter
            else:
                at += size
        size //= 2
    return data
