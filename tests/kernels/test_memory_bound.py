"""The bound that shrinks the step as weights grow: an upper bound, and stability over thousands of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_memory_cases import TIED, largest_at_half_cap
from titans_graph.kernels.memory_bound import spectral_bound, step_bound
from titans_graph.kernels.memory_reference import predict
from titans_graph.kernels.networks import Network, parse_network


@pytest.mark.parametrize("shape", [(8, 8), (5, 20), (20, 5), (64, 64)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_spectral_bound_is_above_and_near(shape: tuple[int, int], scale: float) -> None:
    weight = scale * torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    exact = torch.linalg.matrix_norm(weight, 2)
    ratio = spectral_bound(weight) / exact
    assert float(ratio.min()) >= 1 - 1e-5
    assert float(ratio.max()) <= min(shape) ** (1 / 32) + 1e-5


def test_zero_weights_have_a_finite_bound() -> None:
    net = parse_network({"mlp": {"hidden": 4}})
    zeros = {n: torch.zeros(2, *s) for n, s in net.weights(3).items()}
    assert torch.equal(step_bound(net, zeros, torch.zeros(2, 1, 3)), torch.ones(2))


def jacobian_length(network: Network, weights: dict[str, Tensor], x: Tensor) -> float:
    """The squared spectral norm of the Jacobian of one output by all weights, by brute force."""
    names, values = list(weights), [w[:, None] for w in weights.values()]

    def output(*parts: Tensor) -> Tensor:
        return predict(network, names, list(parts), x[:, None]).flatten()

    jacobian: Any = torch.autograd.functional.jacobian
    parts = jacobian(output, tuple(values))
    return float(torch.linalg.matrix_norm(torch.cat([p.flatten(1) for p in parts], 1), 2)) ** 2


NETWORKS: list[Any] = [
    "linear",
    {"mlp": {"hidden": 6}},
    {"mlp": {"depth": 3, "hidden": 4, "residual": True, "activation": "gelu"}},
    {"mlp": {"depth": 3, "hidden": 6, "activation": "relu2"}},
    {"swiglu": {"hidden": 6}},
    {"lowrank": 2},
    TIED.expand({}),
    {"mlp": {"depth": 3, "hidden": 6, "norm": True, "output_norm": True, "bias": True, "residual": True}},
]


@pytest.mark.parametrize("description", NETWORKS)
def test_step_bound_is_above_the_jacobian(description: Any) -> None:
    network = parse_network(description)
    g = torch.Generator().manual_seed(2)
    for _ in range(20):
        weights = {n: torch.randn(1, *s, generator=g, dtype=torch.float64) for n, s in network.weights(4).items()}
        x = torch.nn.functional.normalize(torch.randn(1, 4, generator=g, dtype=torch.float64), dim=-1)
        assert jacobian_length(network, weights, x) <= float(step_bound(network, weights, x[:, None])) * (1 + 1e-9)


def test_linear_steps_are_not_changed() -> None:
    weights = {"w": torch.randn(3, 8, 8) * 10}
    assert torch.equal(step_bound(parse_network("linear"), weights, torch.randn(3, 5, 8)), torch.ones(3))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("keys", ["random", "repeated"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_thousands_of_tokens_stay_finite(depth: int, keys: str, momentum: float) -> None:
    assert largest_at_half_cap({"mlp": {"depth": depth, "hidden": 32}}, keys, momentum, 8192, seed=depth) < 10


def test_half_precision_stays_in_range() -> None:
    for scale in (0.0, 30.0):
        weight = scale * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        bound = spectral_bound(weight.half())
        assert bound.dtype == torch.float16
        assert bound.isfinite()
        assert float(bound) >= 0.99 * float(torch.linalg.matrix_norm(weight, 2))
