"""What components say of their sites: refusals with the key at fault, dependences, stages, periods, costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.components.cases import SEQUENCE
from tests.components.harness import site
from titans_graph.errors import ShapeMismatch, UnknownName, WrongType
from titans_graph.registry import TABLE, Site, SiteError, lookup, parse_parameters
from titans_graph.shapes import Dependence, Piece, Value, fixed, ids, stream

TWO = [stream(8), stream(6)]
REFUSALS: list[tuple[str, dict[str, Any], dict[str, Any], type, str, str]] = [
    ("add", {"x": TWO}, {}, ShapeMismatch, "x", "[B, T, 8] and [B, T, 6]"),
    ("add", {"x": [stream(8)]}, {}, ShapeMismatch, "x", "at least two"),
    ("gate.product", {"x": TWO}, {}, ShapeMismatch, "x", "[B, T, 8] and [B, T, 6]"),
    ("gate.product", {"x": [stream(8)] * 3}, {}, ShapeMismatch, "x", "exactly two"),
    ("gate.sigmoid", {"x": TWO}, {}, ShapeMismatch, "x", "[B, T, 8] and [B, T, 6]"),
    ("gate.sigmoid", {"x": [stream(8)]}, {}, ShapeMismatch, "x", "exactly two"),
    ("gate.residual", {"x": TWO}, {}, ShapeMismatch, "x", "[B, T, 8] and [B, T, 6]"),
    ("gate.residual", {"x": []}, {}, ShapeMismatch, "x", "exactly two"),
    ("norm.rms", {"x": [ids()]}, {}, ShapeMismatch, "x", "needs features"),
    ("head.tied", {"x": [stream(8)], "table": [fixed(11, 6)]}, {}, ShapeMismatch, "table", "[11, 6]"),
    ("head.tied", {"x": [stream(8)], "table": [stream(8)]}, {}, ShapeMismatch, "table", "fixed"),
    ("sequence.concat", {"x": []}, {}, ShapeMismatch, "x", "at least one"),
    ("sequence.concat", {"x": TWO}, {}, ShapeMismatch, "x", "[B, T, 8] and [B, T, 6]"),
    ("sequence.concat", {"x": [stream(8, "h"), stream(8, "h")]}, {}, ShapeMismatch, "x", "'h' comes twice"),
    ("sequence.slice", {"x": [SEQUENCE]}, {"keep": "nromed"}, UnknownName, "keep", "did you mean 'normed'"),
    ("tokens.persistent", {}, {"count": 2}, WrongType, "dim", "`dim` must be given"),
    ("attention.full", {"x": [stream(8)]}, {"heads": 3}, ShapeMismatch, "heads", "3 does not divide the 8"),
    ("attention.full", {"x": [stream(8)]}, {"heads": 4, "kv_heads": 3}, ShapeMismatch, "kv_heads", "3 does not divide"),
    ("attention.full", {"x": [stream(8)]}, {"heads": 8}, ShapeMismatch, "heads", "a head has 1"),
    ("attention.full", {"x": [stream(8)]}, {"heads": 2, "head_dim": 3}, ShapeMismatch, "head_dim", "a head has 3"),
    ("attention.window", {"x": [SEQUENCE]}, {"heads": 2}, UnknownName, "keep", "recalled, normed"),
    ("attention.window", {"x": [SEQUENCE]}, {"heads": 2, "keep": "norm"}, UnknownName, "keep", "did you mean 'normed'"),
    ("attention.window", {"x": [SEQUENCE]}, {"heads": 2, "keep": "prefix"}, ShapeMismatch, "keep", "no token"),
    ("attention.segment", {"x": [fixed(3, 8)]}, {"heads": 2}, UnknownName, "x", "none"),
]


@pytest.mark.parametrize(("name", "inputs", "values", "kind", "key", "words"), REFUSALS)
def test_refusal(name: str, inputs: dict[str, Any], values: dict[str, Any], kind: type, key: str, words: str) -> None:
    parameters, problems = parse_parameters(lookup(name).Parameters, values)
    assert not problems
    with pytest.raises(SiteError) as caught:
        lookup(name).infer(Site("node", parameters, inputs))
    assert caught.value.kind is kind
    assert caught.value.key == key
    assert words in f"{caught.value.message} {caught.value.help}"


def test_heads_need_not_divide_where_their_size_is_given() -> None:
    types = lookup("attention.full").infer(site("attention.full", {"x": [stream(8)]}, heads=3, head_dim=4))
    assert types["out"].dim == 8


def test_attention_keeps_the_kept_pieces_type() -> None:
    where = site("attention.full", {"x": [SEQUENCE]}, heads=2, keep="normed")
    assert lookup("attention.full").infer(where)["out"] == Value((Piece("normed"),), 8)


DEPENDENCES: list[tuple[str, dict[str, Any], dict[str, Any], tuple[Dependence, ...]]] = [
    ("attention.full", {"x": [stream(8)]}, {"heads": 2}, (Dependence("x", "out", "causal"),)),
    ("attention.window", {"x": [stream(8)]}, {"heads": 2, "window": 5}, (Dependence("x", "out", "window", 5),)),
    ("attention.segment", {"x": [stream(8)]}, {"heads": 2}, (Dependence("x", "out", "window", 64),)),
    ("attention.segment", {"x": [stream(8)]}, {"heads": 2, "causal": False}, (Dependence("x", "out", "segment"),)),
    ("conv.causal", {"x": [stream(8)]}, {"kernel": 3}, (Dependence("x", "out", "window", 3),)),
    ("add", {"x": [stream(8)] * 2}, {}, (Dependence("x", "out", "pointwise"),)),
    ("tokens.persistent", {}, {"count": 2}, ()),
    (
        "embedding",
        {"x": [ids()]},
        {"vocab": 5, "dim": 8},
        (Dependence("x", "out", "pointwise"), Dependence("x", "table", "fixed")),
    ),
    (
        "head.tied",
        {"x": [stream(8)], "table": [fixed(5, 8)]},
        {},
        (Dependence("x", "out", "pointwise"), Dependence("table", "out", "fixed")),
    ),
]


@pytest.mark.parametrize(("name", "inputs", "values", "expected"), DEPENDENCES)
def test_dependences(name: str, inputs: dict[str, Any], values: dict[str, Any], expected: tuple[Dependence, ...]) -> None:
    assert lookup(name).dependences(site(name, inputs, **values)) == expected


@pytest.mark.parametrize(("own", "enclosing", "expected"), [(None, None, 64), (None, 16, 16), (8, 16, 8)])
def test_the_segment_comes_from_the_block_unless_told(own: int | None, enclosing: int | None, expected: int) -> None:
    where = site("attention.segment", {"x": [stream(8)]}, block_segment=enclosing, heads=2, segment=own)
    assert lookup("attention.segment").periods(where) == (expected,)


def test_costs_count_what_the_paper_formulas_say() -> None:
    def cost(name: str, inputs: dict[str, Any], **values: Any) -> float:
        return lookup(name).flops(site(name, inputs, **values))

    x = {"x": [stream(8)]}
    assert cost("norm.rms", x) == 0
    assert cost("linear", x, dim=3) == 2 * 8 * 3
    assert cost("mlp.swiglu", x, hidden=24) == 6 * 8 * 24
    assert cost("head.linear", x, vocab=11) == 2 * 8 * 11
    assert cost("head.tied", {"x": [stream(8)], "table": [fixed(11, 8)]}) == 2 * 8 * 11
    assert cost("gate.sigmoid", {"x": [stream(8)] * 2}) == 2 * 16 * 8
    assert cost("conv.causal", x, kernel=4) == 2 * 4 * 8
    assert cost("attention.full", x, heads=2) == 4 * 2 * 8 * 8
    assert cost("attention.window", x, heads=2, window=5) == 4 * 2 * 8 * 8 + 4 * 8 * 5
    seen = 2 * 64 / 2 + 3
    assert cost("attention.segment", {"x": [SEQUENCE]}, heads=2, keep="normed") == 6 * 2 * 8 * 8 + 4 * 8 * seen


@pytest.mark.parametrize("name", sorted(set(TABLE) - {"memory.neural"}))
def test_every_default_has_its_reason(name: str) -> None:
    for field in dataclasses.fields(lookup(name).Parameters):
        assert field.metadata["doc"], field.name
        assert field.default is dataclasses.MISSING or field.metadata["reason"], field.name
