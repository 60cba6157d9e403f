"""``titans-graph bench memory``: every figure with its aim, as a table and as JSON."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from titans_graph.bench import layer, memory
from titans_graph.bench.decode import decoding
from titans_graph.bench.memory import Case
from titans_graph.errors import UsageError
from titans_graph.runtime.denormals import flushed


@dataclass(frozen=True)
class Figure:
    """One measured number: what it is, its value, the aim (``at_least`` or ``at_most``), None where there is none."""

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the aim is met."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most

    def text(self) -> str:
        """A line of the table."""
        bound = self.at_least if self.at_most is None else self.at_most
        aim = "" if bound is None else f"{'>=' if self.at_most is None else '<='} {bound:g}"
        said = {None: "", True: "met", False: "MISSED"}[self.met]
        return f"{self.name:<58} {self.value:>10.4g} {self.unit:<14} {aim:<9} {said}".rstrip()


@dataclass(frozen=True)
class Sizes:
    """How much is measured: tokens of a call, alternations, and the lengths for memory and for time per token."""

    tokens: int = 4096
    rounds: int = 9
    growth: tuple[int, ...] = (4096, 16384, 65536)
    length: tuple[int, ...] = (1024, 4096, 16384, 65536)


QUICK = Sizes(512, 2, (512, 1024), (256, 512))


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, denormals flushed; both put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with flushed():
            yield
    finally:
        torch.set_num_threads(threads)


def bench(case: Case, sizes: Sizes, parts: tuple[str, ...], peer: str | None, say: Callable[[str], None]) -> list[Figure]:
    """Measure some of :data:`titans_graph.bench.PARTS`.

    ``peer`` is a Python that has titans-pytorch; ``say`` is told every figure at once.
    """
    run: dict[str, Callable[[], list[Figure]]] = {
        "speed": lambda: _speed(case, sizes),
        "growth": lambda: _growth(case, sizes),
        "length": lambda: _length(case, sizes),
        "decode": lambda: _decode(case, sizes),
        "peer": lambda: _peer(sizes, peer) if peer else [],
    }
    found = []
    with one_thread():
        for part in parts:
            for figure in run[part]():
                say(figure.text())
                found.append(figure)
    return found


def _speed(case: Case, sizes: Sizes) -> list[Figure]:
    shares = memory.shares(case, sizes.tokens, sizes.rounds)
    return [
        Figure("matrix products of the same run", shares["product_rate"] / 1e9, "GFLOP/s"),
        Figure("forward", shares["forward_seconds"] * 1e3, "ms"),
        Figure("forward + backward", shares["training_seconds"] * 1e3, "ms"),
        Figure("forward, share of the products' rate", 100 * shares["forward_share"], "%", at_least=50),
        Figure("forward + backward, share (nominal count)", 100 * shares["training_share"], "%", at_least=45),
    ]


def _growth(case: Case, sizes: Sizes) -> list[Figure]:
    growth = memory.growth(case, list(sizes.growth))
    return [Figure(f"peak memory, {k} tokens", v / 1000, "KB/head-token", at_most=5.5) for k, v in growth.items()]


def _length(case: Case, sizes: Sizes) -> list[Figure]:
    times = memory.per_token(case, list(sizes.length), sizes.rounds)
    figures = [Figure(f"forward + backward a token, {n} tokens", t, "us") for n, t in times.items()]
    spread = max(times.values()) / min(times.values())
    return [*figures, Figure("slowest length over fastest", spread, "times", at_most=1.1)]


def _decode(case: Case, sizes: Sizes) -> list[Figure]:
    """One token, lazily and with every weight written; with the bound of the step it is what the component does."""
    figures = []
    for batch, bounded in ((1, False), (1, True), (16, False), (16, True)):
        lazy, eager, ratio = decoding(replace(case, batch=batch), bounded, sizes.rounds)
        name = f"one token, {batch * case.heads} rows" + (", step bounded" if bounded else "")
        figures += [
            Figure(f"{name}: lazy", lazy * 1e6, "us"),
            Figure(f"{name}: every weight written", eager * 1e6, "us"),
            Figure(f"{name}: eager over lazy", ratio, "times", at_least=2.0),
        ]
    return figures


class _Layer:
    """A layer in a process of its own, which waits until it is asked to take a turn."""

    def __init__(self, command: list[str], process: subprocess.Popen[str], errors: IO[str]) -> None:
        self._command, self._process, self._errors = command, process, errors
        self.bytes = float(json.loads(self._line())["bytes"])

    def seconds(self) -> float:
        """The mean time of a call, of one turn."""
        assert self._process.stdin is not None
        with suppress(OSError):  # The process is gone, as the empty answer will tell.
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(layer.ANSWER):
                return line.removeprefix(layer.ANSWER)
        self._errors.seek(0)
        raise UsageError(f"{' '.join(self._command)} failed:\n{self._errors.read()[-2000:]}")


@contextmanager
def serving(python: str, setting: str, tokens: int) -> Iterator[_Layer]:
    """A layer of :mod:`titans_graph.bench.layer`, ready to be timed; its process ends with the block."""
    command = [python, layer.__file__, setting, str(tokens)]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True) as process,
    ):
        try:
            yield _Layer(command, process, errors)
        finally:
            process.kill()


def _peer(sizes: Sizes, python: str) -> list[Figure]:
    """A whole layer against titans-pytorch's, in turns; see :mod:`titans_graph.bench.layer` for its settings."""
    long, short = sizes.tokens, min(1024, sizes.tokens)
    aims = {"per-token": (short, 150.0, 300.0), "per-chunk": (long, 4.0, None), "default-compiled": (long, 1.0, 3.0)}
    figures = []
    for setting, (tokens, faster, smaller) in aims.items():
        rounds = min(3, sizes.rounds) if setting == "per-token" else sizes.rounds
        with serving(python, setting, tokens) as theirs, serving(sys.executable, "ours", tokens) as ours:
            pairs = []
            for _ in range(rounds):
                # Ours before theirs and after it: a turn of the slowest takes 20 s, in which a machine's speed changes.
                before, slow = ours.seconds(), theirs.seconds()
                pairs.append((slow, (before + ours.seconds()) / 2))
        slow, quick = (statistics.median(times) for times in zip(*pairs, strict=True))
        name = f"titans-pytorch {setting}, {tokens} tokens"
        figures += [
            Figure(f"{name}: seconds", slow, "s"),
            Figure(f"our layer, {tokens} tokens: seconds", quick, "s"),
            Figure(f"{name}: memory", theirs.bytes / 1e6, "MB"),
            Figure(f"our layer, {tokens} tokens: memory", ours.bytes / 1e6, "MB"),
            Figure(f"{name}: its time over ours", statistics.median(a / b for a, b in pairs), "times", at_least=faster),
            Figure(f"{name}: its memory over ours", theirs.bytes / ours.bytes, "times", at_least=smaller),
        ]
    return figures


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    model = next((x for x in lines if x.startswith("model name")), f"model name: {platform.processor()}")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": model.partition(":")[2].strip(),
        "threads": 1,
    }


def plain(case: Case, sizes: Sizes, figures: list[Figure]) -> dict[str, Any]:
    """Everything as JSON values."""
    return {
        "machine": machine(),
        "case": asdict(case),
        "sizes": asdict(sizes),
        "figures": [{**asdict(f), "met": f.met} for f in figures],
    }
