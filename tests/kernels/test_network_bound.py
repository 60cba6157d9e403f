"""The bound derived from the graph: the old formulas, an upper bound of the true Jacobian, and its place in time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.test_memory_bound import jacobian_length
from tests.kernels.test_memory_cases import call, make
from tests.kernels.test_network_exact import DIM, GATED, TIED
from titans_graph.kernels.memory_bound import spectral_bound, step_bound
from titans_graph.kernels.networks import parse_network
from titans_graph.testing import strategies as tgs

Norms = Mapping[str, Tensor]


def old_mlp(options: Mapping[str, Any], norms: Norms) -> Tensor:
    """The formula for an MLP before networks were graphs: sum over layers of (input length * gain of everything after)^2."""
    depth, kind = options["depth"], options["activation"]
    skip = 1.0 if options["residual"] else 0.0
    slope = {"silu": 1.0999, "gelu": 1.1290}
    length = norms["w1"].new_ones(norms["w1"].shape)
    lengths: list[Tensor] = []
    slopes: list[Any] = []
    for layer in range(1, depth + 1):
        lengths.append(length)
        z = length * norms[f"w{layer}"]
        slopes.append(1.0 if layer == depth else 2 * z if kind == "relu2" else slope[kind])
        length = skip * length + (z.square() if kind == "relu2" and layer < depth else z)
    after: Any = 1.0
    total = torch.zeros_like(norms["w1"])
    for layer in range(depth, 0, -1):
        total = total + (lengths[layer - 1] * slopes[layer - 1] * after).square()
        after = after * (skip + slopes[layer - 1] * norms[f"w{layer}"])
    return total


def old_swiglu(norms: Norms) -> Tensor:
    gate, up, down = norms["gate"].square(), norms["up"].square(), norms["down"].square()
    return gate * up + gate * down + 1.0999**2 * up * down


def random_weights(network: Any, dim: int, rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = parse_network(network).weights(dim)
    return {n: torch.randn(rows, *s, generator=g, dtype=torch.float64) for n, s in shapes.items()}


def both(network: Any, old: Any, dim: int = 6) -> tuple[Tensor, Tensor]:
    weights = random_weights(network, dim)
    norms = {name: spectral_bound(weight) for name, weight in weights.items()}
    keys = torch.randn(3, 5, dim, dtype=torch.float64)
    return step_bound(parse_network(network), weights, keys), old(norms).clamp_min(1.0)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu2"])
@pytest.mark.parametrize("residual", [False, True])
def test_mlps_keep_their_bound(depth: int, activation: str, residual: bool) -> None:
    options = {"depth": depth, "activation": activation, "residual": residual, "hidden": 6}
    torch.testing.assert_close(*both({"mlp": options}, lambda norms: old_mlp(options, norms)), rtol=1e-12, atol=0)


def test_linear_and_swiglu_keep_their_bound() -> None:
    torch.testing.assert_close(*both("linear", lambda norms: torch.ones_like(norms["w"])), rtol=0, atol=0)
    torch.testing.assert_close(*both({"swiglu": {"hidden": 5}}, old_swiglu), rtol=1e-12, atol=0)


def test_the_bound_of_a_lowrank_matrix() -> None:
    torch.testing.assert_close(*both({"lowrank": 2}, lambda n: n["down"].square() + n["up"].square()), rtol=1e-12, atol=0)


def test_uses_of_one_weight_are_summed_before_they_are_squared() -> None:
    twice = {"nodes": {"w": {"use": "fast.linear"}, "y": {"use": "fast.linear", "weight": "w"}}}
    torch.testing.assert_close(*both(twice, lambda n: (2 * n["w"]).square()), rtol=1e-12, atol=0)


@settings(max_examples=60)
@given(network=tgs.network_graphs(DIM), seed=st.integers(0, 999))
def test_it_is_above_the_jacobian_of_random_networks(network: Any, seed: int) -> None:
    graph, weights = parse_network(network), random_weights(network, 3, 1, seed)
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(1, 3, generator=g, dtype=torch.float64), dim=-1)
    bound = step_bound(graph, weights, x[:, None])
    assert jacobian_length(graph, weights, x) <= float(bound) * (1 + 1e-9)


@pytest.mark.parametrize("network", [GATED, TIED])
def test_a_norm_is_bounded_at_the_token(network: Any) -> None:
    """Each token has a bound of its own, which no other token moves; without a norm after a fast weight there is one a row."""
    graph, weights = parse_network(network), random_weights(network, 4)
    keys = torch.randn(3, 5, 4, dtype=torch.float64)
    bound = step_bound(graph, weights, keys)
    assert bound.shape == (3, 5)
    moved = torch.cat([keys[:, :2], keys[:, 2:] + 1], 1)
    assert torch.equal(step_bound(graph, weights, moved)[:, :2], bound[:, :2])
    assert not torch.equal(step_bound(graph, weights, moved)[:, 2:], bound[:, 2:])
    before = parse_network({"nodes": {"n": {"use": "norm.rms"}, "w": {"use": "fast.linear"}}})
    assert not before.local()
    assert torch.allclose(step_bound(before, {"w": torch.eye(4)[None]}, keys[:1].float()), torch.tensor([4.0]))


def test_the_bound_is_no_signal() -> None:
    graph = parse_network(GATED)
    weights = {name: weight.requires_grad_() for name, weight in random_weights(GATED, 4).items()}
    keys = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert not step_bound(graph, weights, keys).requires_grad


@pytest.mark.parametrize("network", [GATED, TIED, {"mlp": {"norm": True, "output_norm": True, "hidden": 4}}])
@pytest.mark.parametrize("kernel", ["chunk", "reference"])
def test_no_token_moves_an_earlier_one(network: Any, kernel: str) -> None:
    case = make(network, bounded=True, slots=8, chunk=4)
    changed = {n: x.detach().clone() for n, x in case.tokens.items()}
    for n in ("q", "k", "v"):
        changed[n][:, :, 6:] += 1
    first, other = call(case, kernel)[0], call(case._replace(tokens=changed), kernel)[0]
    torch.testing.assert_close(first[:, :, :6], other[:, :, :6], rtol=1e-13, atol=1e-13)
    assert float((first - other).detach()[:, :, 6:].abs().amin()) > 0
