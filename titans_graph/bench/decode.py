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
from titans_graph.kernels.memory_compile import build
from titans_graph.kernels.memory_lazy import Lazy, begin, lazy_step, ready, slots_of
from titans_graph.kernels.memory_objectives import parse_objective
from titans_graph.kernels.networks import parse_network

L2 = parse_objective("l2")

Tensors = list[Tensor]
Step = Callable[[Tensors, Tensors, int], Tensors]
"""State, tokens and the place in the document to the next state, all flat: what is measured is not Python."""


def _built(run: Callable[..., Any], args: Tensors) -> Callable[..., Any]:
    """``run`` as Inductor's code, without the checks of its arguments that torch.compile makes at every call."""
    return build(lambda *flat: tuple(x.clone() if any(x is a for a in flat) else x for x in run(*flat)), args)


def _eager(case: Case, bounded: bool, weights: Tensors, momenta: Tensors, tokens: Tensors) -> tuple[Step, Tensors]:
    """The step that writes weights and momenta, and the state it starts from."""
    network, n, valid = parse_network(case.network), len(weights), torch.ones(case.batch, 1, dtype=torch.bool)
    positions = [torch.full((case.batch, 1), place) for place in range(2 * case.chunk)]
    static: Any = network, L2, "after", case.chunk, bounded

    def run(*args: Tensor) -> Any:
        step: Any = memory_step
        state = [list(args[i * n : (i + 1) * n]) for i in range(3)]
        y, *after = step(*static, *state, *state[1:], *args[3 * n : -1], valid, args[-1])
        return [y, *(x for values in after for x in values)]

    start = [*(w.clone() for w in weights), *weights, *momenta]
    code = _built(run, [*start, *tokens, positions[0]])
    return lambda state, tokens, place: list(code(*state, *tokens, positions[place])[1:]), start


def _lazy(case: Case, bounded: bool, weights: Tensors, momenta: Tensors, tokens: Tensors) -> tuple[Step, Tensors]:
    """The step with a ring, weights written where it is full, and the state it starts from."""
    network, n = parse_network(case.network), len(weights)
    static: Any = network, L2, "after", bounded

    def lazy(flat: Any) -> Lazy:
        uses = (len(flat) - 3 * n - 4) // 2
        anchor, now, moving = (list(flat[i * n : (i + 1) * n]) for i in range(3))
        return Lazy(anchor, now, moving, list(flat[3 * n : 3 * n + uses]), list(flat[3 * n + uses : -4]), *flat[-4:])

    def flattened(state: Lazy) -> Tensors:
        return [x for part in state for x in ([part] if isinstance(part, Tensor) else part)]

    def run(*args: Tensor) -> Any:
        step: Any = lazy_step
        y, after = step(*static, lazy(args[:-6]), *args[-6:])
        return [y, *flattened(after)[3 * n : -1]]

    def whole(state: Tensors, tokens: Tensors, place: int) -> Tensors:
        slots = slots_of(case.chunk)
        if place % case.chunk % slots == 0:
            state = flattened(ready(network, case.chunk, lazy(state), slots, [place] * case.batch, [])[0])
        return [*state[: 3 * n], *code(*state, *tokens)[1:], state[-1]]

    start = flattened(begin(network, case.chunk, bounded, [w.clone() for w in weights], weights, momenta))
    code = _built(run, [*start, *tokens])
    return whole, start


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
    times: list[list[float]] = []
    with torch.no_grad():
        given = case, bounded, weights, momenta, tokens
        pair = [_lazy(*given), _eager(*given)]
        states = [start for _, start in pair]
        for _ in range(rounds + 1):
            row = []
            for i, (step, _) in enumerate(pair):
                begun = time.perf_counter()
                for place in range(case.chunk, 2 * case.chunk):
                    states[i] = step(states[i], tokens, place)
                row.append((time.perf_counter() - begun) / case.chunk)
            times.append(row)
    lazy, eager = zip(*times[1:], strict=True)
    return statistics.median(lazy), statistics.median(eager), statistics.median(e / z for z, e in zip(lazy, eager, strict=True))
