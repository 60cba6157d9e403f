"""What components say of time is true, and says no more than is so: declarations against Jacobians.

True: on every node of drawn graphs, no output token depends on an input token that the declaration excludes. Tight: with
random parameters some output depends on an input at every lag that a declaration allows, so that none is refused, hoisted or
delayed for nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import titans_graph as tg
from tests.components.harness import site
from tests.properties import laws
from tests.properties.dependence import Subject, allowed, measured
from titans_graph.ir import Graph
from titans_graph.registry import TABLE, Site, lookup
from titans_graph.shapes import Piece, Value, fixed, ids, stream
from titans_graph.testing import strategies as tgs

DIM, TOKENS, SEGMENT = 4, 9, 4
X = stream(DIM)
PIECES = Value((Piece("prefix", 2), Piece("other"), Piece("own")), DIM)
NETWORK = {"mlp": {"depth": 2, "hidden": 3}}
MEMORY: dict[str, Any] = {"heads": 2, "chunk": 2, "network": NETWORK}
BOTH = {"write": [X], "ask": [X]}
ALL = {"write": [X], "ask": [X], "opening": [X]}

# Every component, in every way that changes what it says of time.
PLACES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("add", {"x": [X, X]}, {}),
    ("attention.full", {"x": [X]}, {"heads": 2}),
    ("attention.full", {"x": [PIECES]}, {"heads": 1, "keep": "own", "rotary": None}),
    ("attention.segment", {"x": [X]}, {"heads": 2, "segment": 3}),
    ("attention.segment", {"x": [PIECES]}, {"heads": 2, "keep": "own"}),
    ("attention.segment", {"x": [X]}, {"heads": 2, "segment": 3, "causal": False}),
    ("attention.window", {"x": [X]}, {"heads": 2, "window": 3}),
    ("attention.window", {"x": [PIECES]}, {"heads": 2, "window": 1, "keep": "other", "qk_norm": True}),
    ("conv.causal", {"x": [X]}, {"kernel": 3}),
    ("conv.causal", {"x": [X]}, {"kernel": 5, "activation": "silu", "bias": True}),
    ("embedding", {"x": [ids()]}, {"vocab": 2, "dim": DIM}),
    ("gate.product", {"x": [X, X]}, {}),
    ("gate.residual", {"x": [X, X]}, {}),
    ("gate.sigmoid", {"x": [X, X]}, {}),
    ("head.linear", {"x": [X]}, {"vocab": 3}),
    ("head.tied", {"x": [X], "table": [fixed(3, DIM)]}, {}),
    ("linear", {"x": [X]}, {"dim": 3}),
    ("linear", {"x": [PIECES]}, {}),
    ("memory.neural", {"write": [X]}, MEMORY),
    ("memory.neural", {"write": [X]}, {**MEMORY, "read": "chunk", "conv": 0}),
    ("memory.neural", BOTH, {**MEMORY, "momentum": False, "forget": False}),
    ("memory.neural", BOTH, {**MEMORY, "read": "before", "conv": 0}),
    ("memory.neural", BOTH, {**MEMORY, "read": "before", "conv": 2, "cap": "none", "max_step": 0.1}),
    ("memory.neural", ALL, MEMORY),
    ("memory.neural", ALL, {**MEMORY, "chunk": 4, "conv": 0, "network": "linear"}),
    ("mlp.swiglu", {"x": [X]}, {"hidden": 3}),
    ("norm.rms", {"x": [X]}, {}),
    ("sequence.concat", {"x": [fixed(2, DIM, "p"), stream(DIM, "a"), stream(DIM, "b")]}, {}),
    ("sequence.slice", {"x": [PIECES]}, {"keep": "other"}),
    ("tokens.persistent", {}, {"count": 2, "dim": DIM}),
]


def test_every_component_is_measured() -> None:
    assert {use for use, _, _ in PLACES} == set(TABLE)


def placed(use: str, inputs: dict[str, Any], parameters: dict[str, Any]) -> Site:
    here = site(use, inputs, block_segment=SEGMENT, block_dim=DIM, **parameters)
    return here if "opening" in inputs or use != "memory.neural" else replace(here, used=frozenset({"recall"}))


@pytest.mark.parametrize(("use", "inputs", "parameters"), PLACES)
def test_a_declared_dependence_is_true_and_tight(use: str, inputs: dict[str, Any], parameters: dict[str, Any]) -> None:
    laws.check_dependences(lookup(use), placed(use, inputs, parameters), TOKENS, tight=True)


@settings(max_examples=max(10, settings().max_examples // 2))
@given(graph=tgs.graphs(max_nodes=2))
def test_declared_dependences_hold_at_every_node_of_a_drawn_graph(graph: Graph) -> None:
    c = tg.compilation(graph, after="find-feedback")
    for name, here in c.sites.items():
        laws.check_dependences(c.nodes[name].component, here, max(2, min(c.period, 10)))


@given(data=st.data())
def test_what_is_allowed_is_what_the_kinds_mean(data: st.DataObject) -> None:
    """The measure can fail: a window one token shorter than the convolution's is caught, one longer is not tight."""
    kernel = data.draw(st.integers(3, 5))
    here = placed("conv.causal", {"x": [X]}, {"kernel": kernel})
    real = measured(Subject(lookup("conv.causal"), here, TOKENS))["x", "out"]
    (declared,) = lookup("conv.causal").dependences(here)
    for reach, fits in ((kernel - 1, False), (kernel, True), (kernel + 1, True)):
        may = allowed([type(declared)("x", "out", "window", reach)], TOKENS, SEGMENT)
        assert (not bool((real & ~may).any())) == fits
    assert torch.equal(real, allowed([declared], TOKENS, SEGMENT))
