"""Properties of any graph the language can express, not only of shipped specs: drawn graphs, in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import titans_graph as tg
from tests.models import streamed
from titans_graph.ir import Graph, parse
from titans_graph.spec import read_text, to_yaml
from titans_graph.testing import strategies as tgs

TOLERANCE = 1e-9
FEWER = settings(max_examples=max(10, settings().max_examples // 2))


def built(graph: Graph) -> tg.Model:
    """A model in float64 with parameters moved away from their special initial values."""
    torch.manual_seed(0)
    model: tg.Model = tg.build(graph)
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    if not want.numel():
        return 0.0
    return float((got - want).detach().abs().max()) / max(1.0, float(want.detach().abs().max()))


def drawn(data: st.DataObject, model: tg.Model) -> torch.Tensor:
    (kind,) = model.compilation.inputs.values()
    assert kind.dim is not None
    return data.draw(tgs.streams(kind.dim, max_tokens=24), "x")


@given(graph=tgs.graphs())
def test_a_drawn_graph_is_sound_and_reads_back(graph: Graph) -> None:
    assert tg.check(graph) == []
    assert parse(graph.text()) == graph
    assert read_text(to_yaml(graph)).graph == graph


@FEWER
@given(graph=tgs.graphs(), data=st.data())
def test_any_split_streams_to_the_same_output(graph: Graph, data: st.DataObject) -> None:
    model = built(graph)
    x = drawn(data, model)
    parts = data.draw(tgs.splits(x.shape[1]), "parts")
    with torch.no_grad():
        assert error(streamed(model, x, parts)[0], model(x)[0]) <= TOLERANCE
        assert error(streamed(model, x, [1] * x.shape[1])[0], model(x)[0]) <= TOLERANCE


@FEWER
@given(graph=tgs.graphs(), data=st.data())
def test_later_tokens_and_other_rows_change_nothing(graph: Graph, data: st.DataObject) -> None:
    model = built(graph)
    x = drawn(data, model)
    cut = data.draw(st.integers(0, x.shape[1]), "cut")
    other = torch.cat([x[:, :cut], torch.randn_like(x[:, cut:])], 1)
    with torch.no_grad():
        y = model(x)[0]
        assert error(model(other)[0][:, :cut], y[:, :cut]) <= TOLERANCE
        assert error(model(x[:1])[0], y[:1]) <= TOLERANCE


@FEWER
@given(graph=tgs.graphs(), passes=st.sampled_from([("hoist",), ("share",), ("hoist", "share")]), data=st.data())
def test_optional_passes_preserve_meaning(graph: Graph, passes: tuple[str, ...], data: st.DataObject) -> None:
    model = built(graph)
    plain = tg.build(graph, disable=passes)
    plain.double()
    plain.load_state_dict(model.state_dict())
    x = drawn(data, model)
    parts = data.draw(tgs.splits(x.shape[1]), "parts")
    with torch.no_grad():
        assert error(streamed(plain, x, parts)[0], model(x)[0]) <= TOLERANCE


@FEWER
@given(graph=tgs.graphs(), data=st.data())
def test_packed_documents_equal_documents_apart(graph: Graph, data: st.DataObject) -> None:
    model = built(graph)
    x = drawn(data, model)
    parts = data.draw(tgs.splits(x.shape[1], 4), "documents")
    ids = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(parts)).expand(x.shape[:2])
    with torch.no_grad():
        packed = streamed(model, x, data.draw(tgs.splits(x.shape[1]), "parts"), document=ids)[0]
        for a, b in zip(torch.split(packed, parts, 1), torch.split(x, parts, 1), strict=True):
            assert error(a, model(b)[0]) <= TOLERANCE


@FEWER
@given(graph=tgs.graphs(), data=st.data())
def test_gradients_through_a_split_equal_those_of_the_whole(graph: Graph, data: st.DataObject) -> None:
    model = built(graph)
    x = drawn(data, model).requires_grad_()
    parts = data.draw(tgs.splits(x.shape[1], 3), "parts")
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    found = []
    for cut in ([x.shape[1]], parts):
        loss = (streamed(model, x, cut)[0] * probe).mean()
        found.append(torch.autograd.grad(loss, [x, *model.parameters()], allow_unused=True, materialize_grads=True))
    assert max(error(a, b) for a, b in zip(*found, strict=True)) <= 1e-8
