"""Components without state, each against its formula written out; gradients reach all their parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.components.cases import SEQUENCE
from tests.components.harness import build, close, site
from titans_graph.registry import lookup
from titans_graph.shapes import Value, fixed, ids, stream

GATES = ["gate.product", "gate.sigmoid", "gate.residual"]
MAPS = ["norm.rms", "linear", "mlp.swiglu"]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def normed(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def all_get_gradients(component: Any, out: Tensor) -> None:
    torch.autograd.backward(out.square().sum())
    assert all(tensor.grad.abs().sum() > 0 for tensor in component.parameters())


def test_embedding_picks_rows_and_gives_its_table() -> None:
    component = build("embedding", {"x": [ids()]}, vocab=11, dim=6, scale=2.0)
    tokens = torch.randint(11, (2, 5))
    out, table = component(x=tokens)
    close(out, table[tokens] * 2)
    assert table is component.embedding.weight
    all_get_gradients(component, out)
    types = lookup("embedding").infer(site("embedding", {"x": [ids()]}, vocab=11, dim=6))
    assert types["out"] == stream(6, "out")
    assert types["table"] == fixed(11, 6, "table")


def test_tied_head_multiplies_with_the_table() -> None:
    head = build("head.tied", {"x": [stream(6)], "table": [fixed(11, 6)]}, scale=0.5)
    x, table = random(2, 3, 6), random(11, 6)
    close(head(x=x, table=table), torch.einsum("btd,vd->btv", x, table) / 2)
    types = head.infer(site("head.tied", {"x": [stream(6)], "table": [fixed(11, 6)]}))
    assert types["out"].text() == "[B, T, 11]"


def test_linear_head() -> None:
    head = build("head.linear", {"x": [stream(6)]}, vocab=11)
    x = random(2, 3, 6)
    out = head(x=x)
    close(out, torch.einsum("btd,vd->btv", x, head.project.weight))
    all_get_gradients(head, out)


def test_rms_norm() -> None:
    component = build("norm.rms", {"x": [stream(8)]})
    x = random(2, 5, 8)
    out = component(x=x)
    close(out, normed(x, component.gain))
    all_get_gradients(component, out)
    close(component(x=torch.zeros_like(x)), torch.zeros_like(x))


def test_swiglu() -> None:
    component = build("mlp.swiglu", {"x": [stream(8)]}, hidden=5)
    x = random(2, 5, 8)
    gate, up = component.gate_up.weight.chunk(2)
    out = component(x=x)
    close(out, (silu(x @ gate.t()) * (x @ up.t())) @ component.down.weight.t())
    all_get_gradients(component, out)


@given(dim=st.integers(1, 5000))
def test_swiglu_hidden_default_is_a_multiple_of_eight_not_below_eight_thirds(dim: int) -> None:
    hidden = lookup("mlp.swiglu").hidden(site("mlp.swiglu", {"x": [stream(dim)]}))  # type: ignore[attr-defined]
    assert hidden % 8 == 0
    assert math.ceil(8 * dim / 3) <= hidden < 8 * dim / 3 + 8


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool) -> None:
    component = build("linear", {"x": [stream(8)]}, dim=3, bias=bias)
    x = random(2, 5, 8)
    out = component(x=x)
    close(out, x @ component.project.weight.t() + (component.project.bias if bias else 0.0))
    all_get_gradients(component, out)


@pytest.mark.parametrize("name", MAPS)
def test_maps_treat_every_piece_alike_and_keep_its_name(name: str) -> None:
    component = build(name, {"x": [SEQUENCE]})
    pieces = (random(3, 8), random(2, 4, 8), random(2, 4, 8))
    outs = component(x=pieces)
    assert component.infer(site(name, {"x": [SEQUENCE]}))["out"] == SEQUENCE
    for piece, out in zip(pieces, outs, strict=True):
        close(component(x=piece), out)


def test_add_sums_all() -> None:
    component = build("add", {"x": [stream(8)] * 3})
    a, b, c = random(3, 2, 4, 8)
    close(component(x=(a, b, c)), a + b + c)


@pytest.mark.parametrize(("own", "block", "expected"), [(None, 8, 8), (6, None, 6), (6, 8, 6)])
def test_persistent_tokens_take_the_blocks_size_unless_told(own: int | None, block: int | None, expected: int) -> None:
    where = site("tokens.persistent", {}, block_dim=block, count=5, dim=own)
    component = build("tokens.persistent", {}, block_dim=block, count=5, dim=own)
    assert component().shape == (5, expected)
    assert component.infer(where)["out"].text() == f"[5, {expected}]"
    all_get_gradients(component, component())


@pytest.mark.parametrize("name", GATES)
def test_gates_take_two_streams_and_train(name: str) -> None:
    component = build(name, {"x": [stream(8)] * 2})
    out = component(x=(random(2, 4, 8), random(2, 4, 8)))
    assert out.shape == (2, 4, 8)
    all_get_gradients(component, out)


def test_product_gate_normalises_both_branches() -> None:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": silu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "none": lambda x: x,
    }
    a, b = random(2, 2, 4, 8)
    for name, function in functions.items():
        gate = build("gate.product", {"x": [stream(8)] * 2}, nonlinearity=name)
        close(gate(x=(a, b)), function(normed(a, gate.gain_a)) * function(normed(b, gate.gain_b)))


def test_sigmoid_gate_lies_between_its_branches() -> None:
    gate = build("gate.sigmoid", {"x": [stream(8)] * 2})
    a, b = random(2, 2, 4, 8)
    g = torch.sigmoid(torch.cat([a, b], -1) @ gate.project.weight.t() + gate.project.bias)
    close(gate(x=(a, b)), g * a + (1 - g) * b)


def test_residual_gate_starts_as_the_sum() -> None:
    a, b = torch.randn(2, 2, 4, 8)
    made: Any = lookup("gate.residual")
    close(made(site("gate.residual", {"x": [stream(8)] * 2}))(x=(a, b)), a + b)
    gate = build("gate.residual", {"x": [stream(8)] * 2})
    a, b = a.double(), b.double()
    close(gate(x=(a, b)), a + gate.vector * b)


def test_concat_and_slice_hand_pieces_through() -> None:
    parts = [fixed(3, 8, "prefix"), Value(SEQUENCE.pieces[1:], 8)]
    concat = build("sequence.concat", {"x": parts})
    assert concat.infer(site("sequence.concat", {"x": parts}))["out"] == SEQUENCE
    prefix, recalled, now = random(3, 8), random(2, 4, 8), random(2, 4, 8)
    joined = concat(x=(prefix, (recalled, now)))
    assert all(a is b for a, b in zip(joined, (prefix, recalled, now), strict=True))
    assert concat(x=(now,)) is now
    for piece, tensor in zip(SEQUENCE.pieces, joined, strict=True):
        cut = build("sequence.slice", {"x": [SEQUENCE]}, keep=piece.name)
        assert cut(x=joined) is tensor
        assert cut.infer(site("sequence.slice", {"x": [SEQUENCE]}, keep=piece.name))["out"].single == piece
