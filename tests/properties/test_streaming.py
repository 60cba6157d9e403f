"""Streaming, causality, independence: the theorems of explicit state, for every shipped spec, in fp64."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import titans_graph as tg
from tests.models import ALL, example, small, streamed

TOLERANCE = 1e-9
# Of each of fourteen models: the nightly run would take hours with all examples of its profile.
SHARED = settings(max_examples=max(25, settings().max_examples // 10))


@functools.cache
def model_of(name: str) -> tg.Model:
    return small(name).requires_grad_(False)


def cuts(total: int) -> st.SearchStrategy[list[int]]:
    """Ways to cut ``total`` tokens into parts, empty parts among them."""

    def parts(marks: list[int]) -> list[int]:
        edges = [0, *sorted(marks), total]
        return [b - a for a, b in itertools.pairwise(edges)]

    return st.lists(st.integers(0, total), max_size=6).map(parts)


@pytest.mark.parametrize("name", ALL)
@SHARED
@given(data=st.data())
def test_any_split_streams_to_the_same_output(name: str, data: st.DataObject) -> None:
    model = model_of(name)
    tokens = data.draw(st.integers(1, 40), label="tokens")
    x = example(model, 2, tokens, seed=data.draw(st.integers(0, 3), label="seed"))
    parts = data.draw(cuts(tokens), label="parts")
    whole, _ = model(x)
    pieces, _ = streamed(model, x, parts)
    assert (whole - pieces).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_token_by_token_equals_whole(name: str) -> None:
    model = model_of(name)
    x = example(model, 3, 37)
    whole, _ = model(x)
    pieces, _ = streamed(model, x, [1] * 37)
    assert (whole - pieces).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ALL)
@SHARED
@given(data=st.data())
def test_packed_documents_equal_documents_apart(name: str, data: st.DataObject) -> None:
    model = model_of(name)
    rows, tokens = 2, data.draw(st.integers(2, 30), label="tokens")
    x = example(model, rows, tokens)
    lengths = st.lists(st.integers(0, tokens), max_size=4)
    ids = torch.stack([_document_ids(data.draw(lengths, label="seams"), tokens) for _ in range(rows)])
    packed, _ = streamed(model, x, data.draw(cuts(tokens), label="parts"), document=ids)
    for row in range(rows):
        for number in set(ids[row].tolist()):
            inside = ids[row] == number
            apart, _ = model(x[row : row + 1, inside])
            assert (packed[row, inside] - apart[0]).abs().max() <= TOLERANCE


def _document_ids(seams: list[int], tokens: int) -> torch.Tensor:
    return torch.tensor([sum(s <= t for s in seams) for t in range(tokens)])


@pytest.mark.parametrize("name", ALL)
@SHARED
@given(data=st.data())
def test_later_tokens_never_change_earlier_outputs(name: str, data: st.DataObject) -> None:
    model = model_of(name)
    tokens = data.draw(st.integers(2, 33), label="tokens")
    cut = data.draw(st.integers(1, tokens - 1), label="cut")
    x, other = example(model, 2, tokens), example(model, 2, tokens, seed=1)
    changed = torch.cat([x[:, :cut], other[:, cut:]], dim=1)
    assert torch.equal(model(x)[0][:, :cut], model(changed)[0][:, :cut])


@pytest.mark.parametrize("name", ALL)
def test_rows_do_not_influence_each_other(name: str) -> None:
    model = model_of(name)
    x = example(model, 3, 21)
    other = x.clone()
    other[1] = example(model, 1, 21, seed=5)[0]
    a, b = model(x)[0], model(other)[0]
    assert (a[0] - b[0]).abs().max() <= TOLERANCE
    assert (a[2] - b[2]).abs().max() <= TOLERANCE
    assert (a[1] - b[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_rows_at_different_positions(name: str) -> None:
    """A row that starts afresh beside one that goes on: each gives what it would give alone."""
    model = model_of(name)
    x = example(model, 2, 30)
    _, state = model(x[:, :11])
    state = state.reset([1])
    y, _ = model(x[:, 11:], state)
    alone, _ = model(x[1:, 11:])
    assert (y[0] - model(x)[0][0, 11:]).abs().max() <= TOLERANCE
    assert (y[1] - alone[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_gradients_through_a_split_equal_those_of_the_whole(name: str) -> None:
    model = small(name)
    x = example(model, 2, 19)
    weight = torch.randn(19, dtype=torch.float64, generator=torch.Generator().manual_seed(2))[None, :, None]
    grads = []
    for parts in ([19], [3, 1, 9, 6]):
        model.zero_grad()
        loss = (streamed(model, x, parts)[0].sin() * weight).sum()
        torch.autograd.backward(loss)
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() == {n for n, _ in model.named_parameters()}
    for n, g in grads[0].items():
        assert (g - grads[1][n]).abs().max() <= TOLERANCE * max(1.0, float(g.abs().max())), n
