"""The step cap keeps a memory finite: keys from random to all the same, every chunk, every momentum, nothing forgotten.

The component runs as it is; only what its projections would give (queries, keys, values and gates) is put in their place.
The step stands fully open, at the cap itself, which is twice what a model starts with.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.components.harness import site
from titans_graph.components.memory_neural import NeuralMemory
from titans_graph.kernels.memory_crowding import crowding, step_cap
from titans_graph.shapes import Clock, stream

DIM = 8
ALIKE = (0.0, 0.5, 0.9, 0.99, 1.0)
"""Expected product of two keys of a document; 1: the same key throughout."""
PATTERNS = ("none", "full", "alternating", "bursts")
"""Of momentum: 0, the maximum, token by token 0 and the maximum, chunk by chunk."""
LENGTH = 8.0
"""An upper bound of the length of every value of :func:`run`: they are cut there."""


class Run(NamedTuple):
    """What a memory came to: the largest ‖M‖ and ‖S‖ (Frobenius, over all fast weights, rows ``[R]``) at any call's end,
    the first ‖M‖, and whether all outputs and states were finite."""

    weights: Tensor
    momenta: Tensor
    start: Tensor
    finite: bool


def keys(alike: float, tokens: int, generator: torch.Generator) -> Tensor:
    """Unit keys ``[tokens, DIM]``, any two with a product of about ``alike``."""
    base = F.normalize(torch.randn(1, DIM, generator=generator), dim=-1)
    own = F.normalize(torch.randn(tokens, DIM, generator=generator), dim=-1)
    return F.normalize(alike**0.5 * base + (1 - alike) ** 0.5 * own, dim=-1)


def values(tokens: int, generator: torch.Generator) -> Tensor:
    """Values ``[tokens, DIM]`` that change sign in stretches of growing length: whatever the period of a resonance is."""
    base = torch.randn(tokens, DIM, generator=generator)
    swing = torch.cos(torch.arange(tokens).sqrt() * 8.0)[:, None] * torch.randn(1, DIM, generator=generator)
    v = base + 2.0 * swing.sign() * swing.abs().clamp(max=1.0)
    cut: Tensor = v * (LENGTH / torch.linalg.vector_norm(v, dim=-1, keepdim=True)).clamp(max=1.0)
    return cut


def momentum(pattern: str, largest: float, tokens: int, chunk: int) -> Tensor:
    """Momentum per token ``[tokens]``."""
    t = torch.arange(tokens)
    on = {"none": t < 0, "full": t >= 0, "alternating": t % 2 == 1, "bursts": t // chunk % 2 == 1}[pattern]
    return torch.where(on, largest, 0.0)


def run(network: Any, objective: Any, chunk: int, largest: float, tokens: int, *, keep: float = 1.0, seed: int = 0) -> Run:
    """Let one memory read ``tokens`` tokens (whole chunks of them): a row for each of ``ALIKE`` x ``PATTERNS``, 8 calls."""
    calls = 8
    part = max(1, tokens // calls // chunk) * chunk
    g = torch.Generator().manual_seed(seed)
    rows = list(itertools.product(ALIKE, PATTERNS))
    values_of = {"heads": 1, "head_dim": DIM, "conv": 0, "chunk": chunk, "network": network, "objective": objective}
    torch.manual_seed(seed)
    where = site("memory.neural", {"write": [stream(DIM, "write")]}, max_momentum=largest, **values_of)
    memory: Any = NeuralMemory(where)
    total = part * calls
    k = torch.stack([keys(alike, total, g) for alike, _ in rows])
    v = torch.stack([values(total, g) for _ in rows])
    q = F.normalize(torch.randn(len(rows), total, DIM, generator=g), dim=-1)
    log_momentum = torch.stack([momentum(p, largest, total, chunk) for _, p in rows]).log()[:, None]
    ones = torch.ones(len(rows), part, dtype=torch.bool)
    state = memory.initial_state(len(rows))
    start = norm(memory, state, "weights")
    top, moving, finite = start, torch.zeros_like(start), True
    with torch.no_grad():
        for first in range(0, total, part):
            here = slice(first, first + part)
            given = {"query": q[:, None, here], "key": k[:, None, here], "value": v[:, None, here]}
            gates = torch.ones(len(rows), 1, part), log_momentum[..., here], torch.full((len(rows), 1, part), keep).log()
            memory._stream = lambda name, *rest, given=given: given[name]
            memory._controls = lambda write, gates=gates: gates
            position = torch.arange(first, first + part).expand(len(rows), part)
            lead, end = torch.zeros(len(rows), dtype=torch.int64), torch.full((len(rows),), part)
            y, state = memory(v[:, here], state=state, clock=Clock(ones, position, lead, end, torch.arange(16)))
            finite &= bool(y.isfinite().all()) and all(bool(t.isfinite().all()) for t in state.values())
            top, moving = top.maximum(norm(memory, state, "weights")), moving.maximum(norm(memory, state, "momenta"))
    return Run(top, moving, start, finite)


def norm(memory: Any, state: dict[str, Tensor], kind: str) -> Tensor:
    """Frobenius norm over all fast weights, ``[R]``."""
    every = torch.cat([state[f"{kind}.{n}"].flatten(1) for n in memory.names], dim=1)
    length: Tensor = torch.linalg.vector_norm(every, dim=1)
    return length


NETWORKS: dict[str, Any] = {
    "mlp 2": {"mlp": {"depth": 2, "hidden": 16}},
    "mlp 3": {"mlp": {"depth": 3, "hidden": 16}},
    "mlp 3 residual": {"mlp": {"depth": 3, "hidden": 8, "residual": True}},
    "swiglu": {"swiglu": {"hidden": 16}},
}
CHUNKS, LARGEST = (1, 7, 64, 256, 1024), (0.0, 0.5, 0.9, 0.99)
FEW = [(7, 0.0), (7, 0.99), (64, 0.0), (64, 0.9)]
LINEAR: list[Any] = ["l2", {"huber": {"delta": 1.0}}]


def stays_bounded(objective: Any, chunk: int, largest: float, tokens: int) -> None:
    """A linear memory that forgets nothing stays within ten values.

    Along a key the error is multiplied by a number between -1 and 1 at every chunk, so M is a fading sum of the values:
    some two of them long without momentum. At momentum 0.99 the pair (M, S) rings, up to five long. What is unstable grows
    by a factor a chunk instead: with a 2 in place of the cap's 3, to 14,600 in 2,048 tokens at chunk 64.
    """
    found = run("linear", objective, chunk, largest, tokens)
    assert found.finite
    assert (found.weights - found.start).max() <= 10 * LENGTH


@pytest.mark.parametrize(("chunk", "largest"), FEW)
@pytest.mark.parametrize("objective", LINEAR, ids=["l2", "huber"])
def test_linear_memories_stay_bounded(objective: Any, chunk: int, largest: float) -> None:
    stays_bounded(objective, chunk, largest, 2048)


@pytest.mark.nightly
@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("objective", LINEAR, ids=["l2", "huber"])
def test_linear_memories_stay_bounded_for_long(objective: Any, chunk: int, largest: float) -> None:
    stays_bounded(objective, chunk, largest, 16384)


def dot_is_bounded(chunk: int, largest: float, tokens: int) -> None:
    """The gradient of ``dot`` does not depend on the weights, so it has a bound only where something is forgotten.

    Each write is at most (1 - largest) / 3 values, momentum adds up at most 1 / (1 - largest) of them, and forgetting
    1 / (1 - keep) of those.
    """
    keep = 0.99
    found = run("linear", "dot", chunk, largest, tokens, keep=keep)
    assert found.finite
    assert found.momenta.max() <= LENGTH / 3 + 1e-3
    assert (found.weights - found.start).max() <= LENGTH / 3 / (1 - keep)


@pytest.mark.parametrize(("chunk", "largest"), FEW)
def test_dot_stays_bounded_where_it_forgets(chunk: int, largest: float) -> None:
    dot_is_bounded(chunk, largest, 1024)


@pytest.mark.nightly
@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_dot_stays_bounded_where_it_forgets_for_long(chunk: int, largest: float) -> None:
    dot_is_bounded(chunk, largest, 16384)


def stays_finite(name: str, chunk: int, largest: float, tokens: int) -> None:
    """A deep memory that forgets nothing stays finite; its growth is printed (``pytest -rP`` shows it)."""
    found = run(NETWORKS[name], "l2", chunk, largest, tokens)
    growth = (found.weights / found.start).view(len(ALIKE), len(PATTERNS)).amax(1)
    shown = ", ".join(f"{alike}: {float(g):.3g}" for alike, g in zip(ALIKE, growth, strict=True))
    print(f"{name}, chunk {chunk}, momentum to {largest}, {tokens} tokens: largest growth of the norm by likeness {shown}")
    assert found.finite


@pytest.mark.parametrize(("name", "chunk", "largest"), [("mlp 2", 64, 0.9), ("mlp 3 residual", 64, 0.0), ("swiglu", 7, 0.99)])
def test_deep_memories_stay_finite(name: str, chunk: int, largest: float) -> None:
    stays_finite(name, chunk, largest, 1024)


@pytest.mark.nightly
@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", NETWORKS)
def test_deep_memories_stay_finite_for_long(name: str, chunk: int, largest: float) -> None:
    stays_finite(name, chunk, largest, 16384)


@pytest.mark.parametrize("chunk", [1, 7, 64, 256])
@given(alike=st.floats(0.0, 1.0), spread=st.sampled_from([2, 4, 16]), seed=st.integers(0, 99))
def test_a_chunk_at_the_cap_never_stretches_an_error(chunk: int, alike: float, spread: int, seed: int) -> None:
    """The map of a chunk on a linear memory's error, I - sum of 2 step k k^T, has norm at most 1: for keys in ``spread``
    dimensions around one direction, and so for every product of chunks."""
    g = torch.Generator().manual_seed(seed)
    own = torch.randn(chunk, spread, generator=g, dtype=torch.float64)
    k = F.normalize(alike * torch.randn(1, spread, generator=g, dtype=torch.float64) + (1 - alike) * own, dim=-1)
    valid, position = torch.ones(1, chunk, dtype=torch.bool), torch.arange(chunk)[None]
    lead, end = torch.zeros(1, dtype=torch.int64), torch.tensor([chunk])
    r, _ = crowding(k[None, None], k.new_zeros(1, chunk, 1, spread), valid, position, lead, end)
    step = step_cap(r, 0.0)[0, 0]
    total = (2 * step[:, None] * k).mT @ k
    assert torch.linalg.matrix_norm(torch.eye(spread, dtype=torch.float64) - total, 2) <= 1 + 1e-12


@pytest.mark.parametrize("chunk", [1, 16, 64, 1024, 4096])
def test_equal_keys_at_the_cap_are_stable(chunk: int) -> None:
    """The sum of 2 step over a chunk of equal keys, the number after the 1 - of its map: at most 2, up to the longest."""
    total = float(2 * step_cap(torch.arange(1.0, chunk + 1), 0.0).sum())
    assert 0 < total <= 1.92


def test_the_cap_shrinks_with_curvature_and_never_grows() -> None:
    r = torch.arange(1.0, 9.0)
    for curvature, factor in ((2.0, 1.0), (8.0, 0.25), (1.0, 1.0), (0.0, 1.0), (None, 1.0)):
        assert torch.equal(step_cap(r, 0.9, curvature), factor * step_cap(r, 0.9))
