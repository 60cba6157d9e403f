"""Objectives of the user: registered by name, checked, exact in every form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import titans_graph as tg
from tests.kernels.test_memory_cases import assert_matches_reference, make
from tests.kernels.test_network_exact import log_cosh
from titans_graph.kernels.memory_objectives import ObjectiveError, parse_objective, register_objective


def cosine(prediction: Tensor, value: Tensor, scale: float, sharp: bool) -> Tensor:
    """One number per token: 1 - cosine, smoothed at zero."""
    dot = (prediction * value).sum(-1)
    lengths = ((prediction.square().sum(-1) + 1e-2) * (value.square().sum(-1) + 1e-2)).sqrt()
    loss = scale * (1 - dot / lengths)
    return loss.square() if sharp else loss


register_objective("test_cosine", cosine, scale=1, sharp=False)
register_objective("test_mean", lambda p, v: (p - v).square().mean())
register_objective("test_tokens", lambda p, v: (p - v).square().sum(-2))


def test_its_text_reads_back() -> None:
    objective = parse_objective("test_cosine")
    assert objective.text() == '{"test_cosine": {"scale": 1.0, "sharp": false}}'
    assert parse_objective(objective.text()) == objective
    assert parse_objective({"test_cosine": {"sharp": True}}) != objective
    assert parse_objective({"test_cosine": None}) == objective


@pytest.mark.parametrize("read", ["after", "before", "chunk"])
@pytest.mark.parametrize("network", ["linear", {"mlp": {"hidden": 4, "norm": True}}])
@pytest.mark.parametrize("objective", [{"test_cosine": {"scale": 2}}, {"test_cosine": {"sharp": True}}, "test_log_cosh"])
def test_it_matches_the_reference(network: Any, objective: Any, read: str) -> None:
    assert_matches_reference(make(network, objective, read))


def test_it_works_in_a_call() -> None:
    q, k, v = torch.randn(3, 1, 1, 6, 4)
    given = {"step": torch.full((1, 1, 6), 0.05), "chunk": 3}
    weights = {"w": torch.randn(1, 1, 4, 4)}
    call: Any = tg.neural_memory
    y, _ = call("linear", weights, q, k, v, objective="test_cosine", **given)
    assert y.shape == q.shape


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("test_cosin", "did you mean 'test_cosine'"),
        ("nothing_near", "others with register_objective"),
        ({"test_cosine": {"scal": 1}}, "takes 'scale', 'sharp'"),
        ({"test_cosine": {"scale": True}}, "scale must be a number"),
        ({"test_cosine": {"scale": "big"}}, "scale must be a number"),
        ({"test_cosine": {"scale": float("inf")}}, "scale must be a number"),
        ({"test_cosine": {"sharp": 1}}, "sharp must be true or false"),
    ],
)
def test_wrong_descriptions(description: Any, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        parse_objective(description)


def test_wrong_registrations() -> None:
    register_objective("test_cosine", cosine, scale=1, sharp=False)
    with pytest.raises(ObjectiveError, match="already registered"):
        register_objective("test_cosine", log_cosh)
    with pytest.raises(ObjectiveError, match="already registered"):
        register_objective("l2", cosine)
    with pytest.raises(ObjectiveError, match="default of 'scale'"):
        tg.register_objective("test_list", cosine, scale=[1])  # type: ignore[arg-type]
    with pytest.raises(ObjectiveError, match="no name"):
        register_objective("test cosine", cosine)
    with pytest.raises(ObjectiveError, match="needs a function"):
        register_objective("test_nothing", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["test_mean", "test_tokens"])
def test_a_loss_that_mixes_tokens_is_refused(name: str) -> None:
    with pytest.raises(ObjectiveError, match="one number per token or coordinate"):
        parse_objective(name).loss(torch.zeros(2, 5, 3), torch.zeros(2, 5, 3))
