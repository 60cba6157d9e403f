"""Declared networks: the chunk form against the token-by-token truth, outputs, final states and all gradients, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.test_memory_cases import (
    GRADIENT_BAR,
    OUTPUT_BAR,
    assert_close,
    assert_matches_reference,
    call,
    gradients,
    make,
)
from tests.kernels.test_memory_scan import ragged
from tests.kernels.test_memory_streaming import run_parts
from titans_graph.kernels.memory_objectives import register_objective
from titans_graph.kernels.networks import NetworkError, parse_network
from titans_graph.testing import strategies as tgs

DIM = 3


def log_cosh(prediction: Tensor, value: Tensor, width: float) -> Tensor:
    """A user's own loss: per token, not per coordinate."""
    error = (prediction - value) / width
    return (error + torch.nn.functional.softplus(-2 * error) - 0.6931471805599453).sum(-1)


register_objective("test_log_cosh", log_cosh, width=0.5)

GATED: Any = {
    "nodes": {
        "normed": {"use": "norm.rms", "in": "x"},
        "down": {"use": "fast.linear", "in": "normed", "size": 2},
        "shift": {"use": "fast.bias", "in": "down"},
        "act": {"use": "gelu", "in": "shift"},
        "steady": {"use": "norm.rms", "in": "act", "eps": 1e-3},
        "up": {"use": "fast.linear", "in": "steady"},
        "gate": {"use": "fast.gain", "in": "x"},
        "open": {"use": "sigmoid", "in": "gate"},
        "y": {"use": "product", "in": ["up", "open"]},
    }
}
TIED: Any = {
    "nodes": {
        "w": {"use": "fast.linear", "size": "2*dim"},
        "half": {"use": "fast.linear"},
        "act": {"use": "tanh"},
        "again": {"use": "fast.linear", "size": "2*dim", "weight": "w"},
        "both": {"use": "product", "in": ["again", "w"]},
        "steady": {"use": "norm.layer", "eps": 0.01},
        "small": {"use": "scale", "by": -0.5},
        "y": {"use": "fast.linear", "weight": "half"},
    }
}


def mlp(depth: int, activation: str, **options: Any) -> Any:
    return {"mlp": {"depth": depth, "activation": activation, "hidden": 4, **options}}


COVER: list[tuple[Any, Any, str, bool]] = [
    ("linear", "l2", "after", True),
    (mlp(1, "silu", norm=True), "dot", "before", True),
    (mlp(1, "gelu", output_norm=True, residual=True), "l2", "chunk", False),
    (mlp(1, "relu2", bias=True, output_norm=True), {"lp": {"p": 3}}, "after", True),
    (mlp(2, "silu", norm=True, output_norm=True), "l2", "after", True),
    (mlp(2, "gelu", bias=True), {"huber": {"delta": 0.3}}, "after", True),
    (mlp(2, "relu2", norm=True), "l2", "before", False),
    (mlp(2, "silu", residual=True, hidden=3, norm=True, bias=True), "test_log_cosh", "after", True),
    (mlp(3, "gelu", residual=True, output_norm=True), "l2", "before", True),
    (mlp(3, "silu", norm=True, bias=True), {"test_log_cosh": {"width": 2.0}}, "chunk", True),
    (mlp(3, "relu2", residual=True, norm=True, hidden=3), {"huber": {"delta": 1.0}}, "after", True),
    (mlp(4, "silu", residual=True, norm=True, output_norm=True, bias=True), "l2", "after", True),
    (mlp(4, "gelu", norm=True), "dot", "after", True),
    (mlp(4, "relu2", output_norm=True), {"lp": {"p": 2.5}}, "before", True),
    ({"swiglu": {"hidden": 4}}, "test_log_cosh", "before", True),
    ({"lowrank": 2}, "l2", "after", True),
    ({"lowrank": 1}, {"huber": {"delta": 0.5}}, "chunk", False),
    *[(GATED, "l2", read, bounded) for read in ("after", "before", "chunk") for bounded in (True, False)],
    (GATED, {"huber": {"delta": 0.3}}, "after", True),
    (GATED, "dot", "before", True),
    (GATED, {"lp": {"p": 3}}, "after", False),
    (GATED, {"test_log_cosh": {"width": 0.7}}, "after", True),
    *[(TIED, "l2", read, True) for read in ("after", "before", "chunk")],
    (TIED, "test_log_cosh", "after", False),
]


@pytest.mark.parametrize(("network", "objective", "read", "bounded"), COVER)
def test_matches_the_reference(network: Any, objective: Any, read: str, bounded: bool) -> None:
    assert_matches_reference(make(network, objective, read, bounded=bounded, dim=DIM))


@pytest.mark.parametrize(
    ("network", "objective", "read"),
    [
        (GATED, "l2", "after"),
        (GATED, "test_log_cosh", "before"),
        (TIED, {"huber": {"delta": 0.5}}, "chunk"),
        (mlp(3, "silu", norm=True, output_norm=True, bias=True), "l2", "after"),
        ({"lowrank": 2}, "dot", "before"),
    ],
)
def test_ragged_rows_match_the_reference(network: Any, objective: Any, read: str) -> None:
    assert_matches_reference(ragged(make(network, objective, read, bounded=True, slots=16, batch=4)))


@pytest.mark.parametrize(
    ("network", "objective", "read"),
    [(GATED, "l2", "after"), (TIED, "test_log_cosh", "before"), (mlp(2, "gelu", norm=True), "l2", "chunk")],
)
@pytest.mark.parametrize("cuts", [[5], [1, 2, 3, 9], list(range(12))], ids=str)
def test_any_split_equals_the_whole(network: Any, objective: Any, read: str, cuts: list[int]) -> None:
    """With the step bounded at each token's own key, single tokens by memory_step included."""
    case = make(network, objective, read, bounded=True)
    whole, parts = call(case), run_parts(case, cuts, steps=True)
    assert_close(parts, whole, 1e-12)
    assert_close(gradients(case, parts), gradients(case, whole), 1e-10)


@settings(max_examples=25)
@given(
    network=tgs.network_graphs(DIM),
    objective=st.sampled_from(["l2", "dot", {"huber": {"delta": 0.5}}, {"lp": {"p": 3}}, "test_log_cosh"]),
    read=st.sampled_from(["after", "before", "chunk"]),
    uneven=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_networks_match_the_reference(network: Any, objective: Any, read: str, uneven: bool, seed: int) -> None:
    case = make(network, objective, read, bounded=True, chunk=4, slots=16 if uneven else 8, batch=4 if uneven else 1, seed=seed)
    case = ragged(case) if uneven else case
    want = call(case, "reference")
    assume(all(bool((x.isfinite() & (x.abs() < 1e3)).all()) for x in want))
    got = call(case)
    assert_close(got, want, OUTPUT_BAR)
    assert_close(gradients(case, got), gradients(case, want), GRADIENT_BAR)
    assert parse_network(parse_network(network).text()) == parse_network(network)


@given(network=tgs.network_graphs(DIM), dim=st.integers(1, 6))
def test_other_sizes_fit_or_are_refused(network: Any, dim: int) -> None:
    graph = parse_network(network)
    try:
        shapes = graph.weights(dim)
    except NetworkError:
        return
    assert set(shapes) == set(graph.uses(dim))
