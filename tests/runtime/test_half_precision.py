"""Half precision: a memory's running state stays float32, so that single tokens lose nothing that one call keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import titans_graph as tg

TOKENS, DIM = 400, 32
MODES = {"bfloat16": (torch.bfloat16, False), "float16": (torch.float16, False), "autocast": (torch.float32, True)}


def contribution(block: str, x: Tensor, dtype: torch.dtype, autocast: bool, calls: int) -> Tensor:
    """What the block adds to the last 100 tokens of ``x``, read in calls of ``calls`` tokens."""
    torch.manual_seed(0)
    model = tg.load(block, dim=DIM, heads=2).to(dtype)
    state, outputs = model.initial_state(1), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for start in range(0, TOKENS, calls):
            y, state = model(x[:, start : start + calls].to(dtype), state)
            outputs.append(y)
    return (torch.cat(outputs, 1).double() - x)[:, -100:]


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", ["blocks/lmm", "blocks/mac"])
def test_single_tokens_are_as_exact_as_one_call(block: str, mode: str) -> None:
    x = torch.randn(1, TOKENS, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = contribution(block, x, torch.float64, False, TOKENS)
    whole, parts, single = (far(contribution(block, x, *MODES[mode], calls), exact) for calls in (TOKENS, 7, 1))
    assert whole < 0.1
    assert max(parts, single) < 1.3 * whole


@pytest.mark.parametrize("mode", MODES)
def test_without_steps_weights_fade_as_the_gates_say(mode: str) -> None:
    dtype, autocast = MODES[mode]
    b = tg.Builder(dim=16)
    x = b.input("x", ["B", "T", "dim"])
    b.output(b.add("memory.neural", write=x, heads=2, max_step=0.0, name="memory").recall)
    model = b.build().to(dtype)
    tokens = torch.randn(1, 200, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    state = model.initial_state(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for t in range(tokens.shape[1]):
            _, state = model(tokens[:, t : t + 1], state)
        ends = [s.nodes["memory"]["weights.w1"] for s in (state, model(tokens)[1])]
    assert all(w.dtype == torch.float32 for w in ends)
    assert far(ends[0].double(), ends[1].double()) < 1e-3


def test_a_memory_of_half_precision_weights_goes_on_in_float32() -> None:
    weights = {"w": torch.ones(1, 1, 8, 8, dtype=torch.bfloat16)}
    tokens = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16)
    gate = torch.full((1, 1, 1), -0.0025)
    state = None
    for _ in range(300):
        y, state = tg.neural_memory(
            "linear", weights, tokens, tokens, tokens, step=torch.zeros(1, 1, 1), log_keep=gate, state=state
        )
    assert state is not None
    assert y.dtype == torch.bfloat16
    assert state.weights["w"].dtype == torch.float32
    assert float(state.weights["w"].mean()) == pytest.approx(math.exp(-0.75), rel=1e-4)
    many = tokens.expand(1, 1, 300, 8)
    offsets = torch.tensor([0, 300])
    _, ends, _ = tg.neural_memory_packed(
        "linear", weights, many, many, many, cu_seqlens=offsets, step=torch.zeros(1, 1, 300), log_keep=gate.expand(1, 1, 300)
    )
    assert float(ends["w"].mean()) == pytest.approx(math.exp(-0.75), rel=1e-4)


def test_a_state_in_half_precision_is_refused_and_says_what_the_model_keeps() -> None:
    model = tg.load("blocks/lmm", dim=16, heads=2, hidden=8, chunk=8).bfloat16()
    x = torch.zeros(1, 3, 16, dtype=torch.bfloat16)
    _, state = model(x)
    halved = state.map(lambda t: t.bfloat16() if t.is_floating_point() else t)
    with pytest.raises(
        tg.StateError, match=r"is torch\.bfloat16 on cpu, .* keeps this in torch\.float32; make the state after"
    ):
        model(x, halved)
