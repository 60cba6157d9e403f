"""One token at a time: the lazy update of :mod:`titans_graph.kernels.memory_lazy` against the update of every token.

Both compiled, in turns, chunk by chunk: what a chunk pays once, writing weights and momenta out, is in the lazy figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_graph.bench.memory import Case
from titans_graph.kernels.memory import memory_step
from titans_graph.kernels.memory_lazy import Lazy, begin, due, lazy_step, written
from titans_graph.kernels.networks import parse_network

Step = Callable[[Any, list[Tensor], Tensor], Any]


def _eager(case: Case, bounded: bool) -> tuple[Step, Callable[[list[Tensor], list[Tensor]], Any]]:
    """The step that writes weights and momenta, and the state it starts from."""
    network = parse_network(case.network).text()
    valid = torch.ones(case.batch, 1, dtype=torch.bool)

    def step(state: Any, tokens: list[Tensor], position: Tensor) -> Any:
        run: Any = memory_step
        _, *after = run(network, "l2", "after", case.chunk, bounded, *state, *tokens, valid, position)
        return *after, *state[3:]

    compiled: Step = torch.compile(step, fullgraph=True)
    return compiled, lambda weights, momenta: ([w.clone() for w in weights], weights, momenta, weights, momenta)


def _lazy(case: Case, bounded: bool) -> tuple[Step, Callable[[list[Tensor], list[Tensor]], Any]]:
    """The step with a ring, weights written where they are due, and the state it starts from."""
    network = parse_network(case.network).text()

    def step(state: Lazy, tokens: list[Tensor], position: Tensor) -> Lazy:
        run: Any = lazy_step
        after: Lazy = run(network, "l2", "after", case.chunk, bounded, state, *tokens, position)[1]
        return after

    compiled = torch.compile(step, fullgraph=True)

    def whole(state: Lazy, tokens: list[Tensor], position: Tensor) -> Lazy:
        rows = due(position[:, 0], case.chunk)
        if bool(rows.any()):
            state = written(network, state, rows, position[:, 0] % case.chunk == 0)
        return compiled(state, tokens, position)

    return whole, lambda weights, momenta: begin(network, case.chunk, bounded, [w.clone() for w in weights], weights, momenta)


def _tokens(case: Case) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    shape = case.batch, case.heads, 1
    streams = [F.normalize(torch.randn(*shape, case.dim, generator=g), dim=-1) for _ in range(3)]
    gates = [0.01 * torch.rand(shape, generator=g), torch.full(shape, -0.8), torch.full(shape, -0.0025)]
    shapes = parse_network(case.network).weights(case.dim).values()
    weights = [torch.randn(*shape[:2], *s, generator=g) / s[0] ** 0.5 for s in shapes]
    return [*streams, *gates], weights, [torch.zeros_like(w) for w in weights]


def decoding(case: Case, bounded: bool, rounds: int) -> tuple[float, float, float]:
    """Median seconds a token, lazily and eagerly, and the median of the ratios of neighbouring chunks."""
    tokens, weights, momenta = _tokens(case)
    places = [torch.full((case.batch, 1), n) for n in range(case.chunk, 2 * case.chunk)]
    times: list[list[float]] = []
    with torch.no_grad():
        pair = [_lazy(case, bounded), _eager(case, bounded)]
        states = [start(weights, momenta) for _, start in pair]
        for _ in range(rounds + 1):
            row = []
            for i, (step, _) in enumerate(pair):
                begun = time.perf_counter()
                for place in places:
                    states[i] = step(states[i], tokens, place)
                row.append((time.perf_counter() - begun) / len(places))
            times.append(row)
    lazy, eager = zip(*times[1:], strict=True)
    return statistics.median(lazy), statistics.median(eager), statistics.median(e / z for z, e in zip(lazy, eager, strict=True))
