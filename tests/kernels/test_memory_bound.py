"""The bound that shrinks the step as weights grow: an upper bound, and stability over thousands of tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_memory_cases import TIED
from titans_graph.kernels.memory import memory_scan
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
    """Unit keys, nothing forgotten, half the cap that counts like keys of the chunk up to the token's own."""
    dim, slots, chunk = 16, 8192, 64
    g = torch.Generator().manual_seed(depth)
    network = parse_network({"mlp": {"depth": depth, "hidden": 32}})
    initial = [network.initialise(n, s, g)[None, None] for n, s in network.weights(dim).items()]
    zeros = [torch.zeros_like(w) for w in initial]
    q, k, v = (torch.nn.functional.normalize(torch.randn(1, 1, slots, dim, generator=g), dim=-1) for _ in range(3))
    if keys == "repeated":
        k = k[:, :, :1].expand_as(k)
    blocks = k.view(1, 1, -1, chunk, dim)
    similarity = (blocks @ blocks.mT).abs().tril().sum(-1).view(1, 1, slots)
    # For equal keys the sum of 1 / r over a chunk grows like ln C; without the logarithm a linear memory diverges.
    step = 0.5 * (1 - 0.9) / (2 * similarity * (1 + similarity.log()))
    log_momentum = torch.full_like(step, momentum).log()
    valid, position = torch.ones(1, slots, dtype=torch.bool), torch.arange(slots)[None]
    with torch.no_grad():
        y, _, weights, momenta = memory_scan(
            json.dumps({"mlp": {"depth": depth, "hidden": 32}}), "l2", "after", chunk, True, initial, initial, zeros,
            initial, zeros, q, k, v, step, log_momentum, torch.zeros_like(step), valid, position,
        )  # fmt: skip
    largest = max(float(x.abs().max()) for x in (y, *weights, *momenta))
    assert largest < 10


def test_half_precision_stays_in_range() -> None:
    for scale in (0.0, 30.0):
        weight = scale * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        bound = spectral_bound(weight.half())
        assert bound.dtype == torch.float16
        assert bound.isfinite()
        assert float(bound) >= 0.99 * float(torch.linalg.matrix_norm(weight, 2))
