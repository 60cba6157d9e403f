"""Products that forward keeps for backward: how many they are, that they are not made again, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.kernels.test_memory_cases import assert_close, assert_matches_reference, make
from tests.kernels.test_memory_scan import ragged
from titans_graph.kernels.memory_compile import ADVANCE, FORWARD, PULLBACK, body_of
from titans_graph.kernels.memory_ops import SCAN, form_of, scan_op
from titans_graph.kernels.memory_products import kept_width, scaled
from titans_graph.kernels.networks import parse_network

DIM, CHUNK = 3, 4
TWICE = {
    "nodes": {
        "up": {"use": "fast.linear", "in": "x", "size": 8},
        "once": {"use": "fast.linear", "in": "up", "weight": "down", "size": 3},
        "act": {"use": "gelu", "in": "up"},
        "again": {"use": "fast.linear", "in": "act", "weight": "down", "size": 3},
        "sum": {"use": "add", "in": ["once", "again"]},
    }
}
"""A narrowing weight used twice: every use of a query meets the inputs of both uses of the keys."""

NETWORKS: list[tuple[Any, int]] = [
    ("linear", 0),
    ({"mlp": {"hidden": 5}}, 0),
    ({"mlp": {"hidden": 6}}, 3),
    ({"mlp": {"hidden": 8}}, 3),
    ({"mlp": {"hidden": 8, "depth": 3}}, 3),
    ({"swiglu": {"hidden": 8}}, 3),
    ({"lowrank": 1}, 1),
    (TWICE, 2 * 3),
]


def arguments(network: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What a body is called with (float64, two rows), and cotangents of its results."""
    g = torch.Generator().manual_seed(0)
    shapes = list(parse_network(network).weights(DIM).values())

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=g, dtype=torch.float64) * 0.5

    state, ends = ([normal(*s) for _ in range(2) for s in shapes] for _ in range(2))
    gates = [normal(CHUNK).sigmoid() * 0.1, -normal(CHUNK).abs(), -normal(CHUNK).abs()]
    valid = torch.tensor([[True] * CHUNK, [False, True, True, False]])
    return [*state, *(normal(CHUNK, DIM) for _ in range(3)), *gates, valid], [normal(CHUNK, DIM), *ends]


def products_of(body: Any, args: Sequence[Tensor]) -> int:
    """Matrix products that a body computes."""
    graph = make_fx(body)(*args)
    graph.graph.eliminate_dead_code()
    return sum(node.target is torch.ops.aten.bmm.default for node in graph.graph.nodes)


@pytest.mark.parametrize("read", ["after", "before", "chunk"])
@pytest.mark.parametrize(("network", "width"), NETWORKS)
def test_kept_products_are_not_made_again(network: Any, width: int, read: str) -> None:
    form = form_of(parse_network(network).text(), "l2", read, False)
    count = len(form.network.weights(DIM))
    args, cotangents = arguments(network)
    want = kept_width(form.network, DIM)
    assert want == width
    kept = list(body_of(form, FORWARD, count, kept=want > 0)(*args))[1 + 2 * count :]
    assert [x.shape for x in kept] == [(2, CHUNK, want)] * (want > 0)
    for kind, given in ((PULLBACK, args), (ADVANCE, [*args[: 2 * count], *args[2 * count + 1 :]])):
        rest = cotangents if kind == PULLBACK else []
        plain, short = (body_of(form, kind, count, kept=k) for k in (False, want > 0))
        assert_close(list(short(*given, *kept, *rest)), list(plain(*given, *rest)), 1e-12)
        saved = products_of(plain, [*given, *rest]) - products_of(short, [*given, *kept, *rest])
        assert (saved > 0) == (want > 0)


def test_gradients_of_a_scaled_product_do_without_its_value() -> None:
    g = torch.Generator().manual_seed(0)
    args = [torch.randn(2, *s, generator=g, dtype=torch.float64) for s in ((4, 1), (4, 7), (7, 3))]
    cotangent = torch.randn(2, 4, 3, generator=g, dtype=torch.float64)

    def plain(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return rows * (a @ b)

    def gradients(function: Any) -> Any:
        return lambda *given: torch.func.vjp(function, *given)[1](cotangent)

    assert_close([scaled(*args)], [plain(*args)], 1e-14)
    assert_close(list(gradients(scaled)(*args)), list(gradients(plain)(*args)), 1e-14)
    assert products_of(gradients(scaled), args) == products_of(gradients(plain), args) - 1 == 2


def test_backward_uses_what_was_kept() -> None:
    form = form_of(parse_network({"mlp": {"hidden": 8}}).text(), "l2", "after", False)
    args, cotangents = arguments({"mlp": {"hidden": 8}})
    kept = body_of(form, FORWARD, 2, kept=True)(*args)[-1]
    pull = body_of(form, PULLBACK, 2, kept=True)
    want = list(pull(*args, kept, *cotangents))
    with pytest.raises(AssertionError):
        assert_close(list(pull(*args, kept + 1e-3, *cotangents)), want, 1e-6)


@pytest.mark.parametrize("read", ["after", "before", "chunk"])
@pytest.mark.parametrize("network", [{"mlp": {"hidden": 8, "depth": 3}}, {"swiglu": {"hidden": 9}}, {"lowrank": 1}, TWICE])
def test_memories_that_keep_products_match_the_reference(network: Any, read: str) -> None:
    objective = {"huber": {"delta": 0.5}}
    assert_matches_reference(make(network, objective, read, bounded=True, slots=20))
    assert_matches_reference(ragged(make(network, objective, read, slots=16, batch=4)))


def test_results_of_the_operator_belong_to_its_name() -> None:
    """Regions in torch's cache on disk are found by this name: with other results it must be another one."""
    case = make({"mlp": {"hidden": 8}}, bounded=True)
    static = case.network, case.objective, case.read, case.chunk, True, True, 1
    state = [x.detach() for x in case.state["weights"]]
    args = *[state] * 5, [x.detach() for x in case.tokens.values()], case.valid, case.position
    with FakeTensorMode(allow_non_fake_inputs=True):
        results = scan_op(*static, *args)
    shapes = [tuple(x.shape) for x in results]
    weights = [(2, 2, 3, 8), (2, 2, 8, 3)]
    kept = [(3 * 4 * 3 * 8 + 1,)] * 2
    assert {SCAN: shapes} == {
        "titans_graph::memory_scan_6": [(2, 2, 12, 3), *weights * 3, (2, 2, 12), *kept * 2, (2, 2, 12, 3)]
    }
