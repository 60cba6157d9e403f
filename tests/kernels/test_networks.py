"""Descriptions of memory networks and objectives: canonical text, shapes, and errors that help."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from titans_graph.kernels.memory_objectives import ObjectiveError, parse_objective
from titans_graph.kernels.networks import FAMILIES, NetworkError, parse_network, register


@pytest.mark.parametrize(
    "description",
    ["linear", {"linear": {}}, {"mlp": 3}, {"mlp": {"hidden": 8}}, "mlp", {"swiglu": None}, '{"swiglu": 6}'],
)
def test_text_round_trips(description: Any) -> None:
    network = parse_network(description)
    assert parse_network(network.text()) == network
    assert hash(parse_network(network.text())) == hash(network)
    assert parse_network(network) is network


def test_defaults_are_filled_in() -> None:
    full = {"depth": 2, "activation": "silu", "hidden": None, "residual": False}
    assert parse_network("mlp") == parse_network({"mlp": full})
    assert parse_network("linear").text() == "linear"


def test_shapes() -> None:
    assert parse_network("linear").weights(8) == {"w": (8, 8)}
    assert parse_network({"mlp": 3}).weights(8) == {"w1": (8, 32), "w2": (32, 32), "w3": (32, 8)}
    assert parse_network({"mlp": 1}).weights(8) == {"w1": (8, 8)}
    assert parse_network({"swiglu": 6}).weights(4) == {"gate": (4, 6), "up": (4, 6), "down": (6, 4)}


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("liner", "did you mean 'linear'"),
        ({"mlp": {"dept": 2}}, "did you mean 'depth'"),
        ({"mlp": {"depth": 0}}, "depth must be"),
        ({"mlp": {"depth": True}}, "depth must be"),
        ({"mlp": {"hidden": 1.5}}, "hidden must be"),
        ({"mlp": {"activation": "tanh"}}, "silu, gelu, relu2"),
        ({"mlp": {"residual": 1}}, "true or false"),
        ({"mlp": "deep"}, "must be a mapping"),
        ({"mlp": {}, "linear": {}}, "one {name: options}"),
        ({"swiglu": {"hidden": -1}}, "hidden must be"),
        ("{mlp", "not JSON"),
    ],
)
def test_wrong_descriptions(description: Any, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        parse_network(description)


def test_residual_without_effect_is_an_error() -> None:
    with pytest.raises(NetworkError, match="no effect"):
        parse_network({"mlp": {"residual": True}}).weights(8)


def test_names_are_taken_once() -> None:
    register("linear", FAMILIES["linear"])
    with pytest.raises(NetworkError, match="already registered"):
        register("linear", FAMILIES["mlp"])


def test_initial_values_keep_the_size_of_signals() -> None:
    network, g = parse_network({"mlp": 2}), torch.Generator().manual_seed(0)
    for name, shape in network.weights(64).items():
        out = torch.randn(256, shape[0], generator=g) @ network.initialise(name, shape, g)
        assert 0.9 < float(out.std()) < 1.1
    vectors = parse_network({"nodes": {"shift": {"use": "fast.bias"}, "g": {"use": "fast.gain"}}})
    assert torch.equal(vectors.initialise("g", (3,)), torch.ones(3))
    assert torch.equal(vectors.initialise("shift", (3,)), torch.zeros(3))


def test_parsing_needs_no_torch() -> None:
    code = "import sys, titans_graph.kernels.networks as n; n.parse_network('mlp').weights(4);assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("description", ["l2", "dot", {"huber": {"delta": 0.5}}, "huber", {"lp": {"p": 3}}])
def test_objective_text_round_trips(description: Any) -> None:
    objective = parse_objective(description)
    assert parse_objective(objective.text()) == objective


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("l3", "known here: l2, dot, huber, lp"),
        ({"lp": {"p": 1}}, "at least 2"),
        ({"huber": {"p": 1}}, "takes 'delta'"),
        ({"l2": {"p": 1}}, "takes no option"),
        ({"huber": {"delta": True}}, "must be a number"),
        ("{l2", "not JSON"),
        (["l2"], "one {name: options}"),
    ],
)
def test_wrong_objectives(description: Any, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        parse_objective(description)


def test_objective_values() -> None:
    prediction, value = torch.tensor([3.0, 0.25]), torch.tensor([1.0, 0.0])
    assert float(parse_objective("l2").loss(prediction, value)) == 4.0625
    assert float(parse_objective("dot").loss(prediction, value)) == -3.0
    assert float(parse_objective("huber").loss(prediction, value)) == 1.5 + 0.03125
    assert float(parse_objective({"lp": {"p": 3}}).loss(prediction, value)) == 8.015625
