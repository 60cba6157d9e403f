"""Declared networks inside the component and the spec: streaming, causality, stability, compiled steps, places of mistakes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import titans_graph as tg
from tests.components.harness import POISON, build, calls, close, stream
from tests.kernels.test_memory_cases import STATE, Case, assert_close, call, gradients, largest_at_half_cap, make
from tests.kernels.test_network_exact import GATED, TIED
from titans_graph import shapes
from titans_graph.errors import WrongType
from titans_graph.kernels.memory import memory_step
from titans_graph.kernels.networks import parse_network

DIM, CHUNK = 8, 4
STORIES = [[13], [5, 8], [1, 1, 4, 7]]
NETWORKS: dict[str, Any] = {
    "gated": GATED,
    "tied": TIED,
    "mlp": {"mlp": {"depth": 2, "hidden": 6, "norm": True, "output_norm": True, "bias": True}},
    "lowrank": {"lowrank": 2},
}
each = pytest.mark.parametrize("name", NETWORKS)


@functools.cache
def memory(name: str) -> Any:
    """The component with its cap on, in float64, with random parameters."""
    torch.manual_seed(1)
    return build("memory.neural", {"write": [shapes.stream(DIM)]}, heads=2, chunk=CHUNK, network=NETWORKS[name], cap="keys")


def inputs(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"write": torch.randn(3, 13, DIM, generator=g, dtype=torch.float64)}


@each
@settings(max_examples=12)
@given(cuts=st.sets(st.integers(1, 12), max_size=5).map(sorted), slack=st.integers(0, 1))
def test_any_split_equals_the_whole(name: str, cuts: list[int], slack: int) -> None:
    component, given_ = memory(name), inputs()
    whole, _ = stream(component, given_, calls(STORIES, (), CHUNK))
    parts, _ = stream(component, given_, calls(STORIES, cuts, CHUNK, slack), poison=POISON)
    close(parts, whole)


@each
def test_token_by_token_equals_the_whole(name: str) -> None:
    component, given_ = memory(name), inputs()
    whole, _ = stream(component, given_, calls(STORIES, (), CHUNK))
    close(stream(component, given_, calls(STORIES, list(range(1, 13)), CHUNK))[0], whole)


@each
def test_no_token_reads_a_later_one_or_another_row(name: str) -> None:
    component, given_ = memory(name), inputs()
    whole, _ = stream(component, given_, calls(STORIES, (), CHUNK))
    changed = {"write": given_["write"].clone()}
    changed["write"][0, 6:] += torch.randn(7, DIM, dtype=torch.float64)
    other, _ = stream(component, changed, calls(STORIES, (), CHUNK))
    close(other[0, :6], whole[0, :6])
    close(other[1:], whole[1:])
    assert float((other[0, 6:] - whole[0, 6:]).detach().abs().amax(-1).min()) > 1e-6


@each
def test_every_fast_weight_starts_somewhere_and_learns(name: str) -> None:
    component = memory(name)
    component.zero_grad()
    out, _ = stream(component, inputs(), calls(STORIES, [5], CHUNK))
    torch.autograd.backward(out.square().sum())
    assert all(bool(p.grad.abs().sum() > 0) for p in component.initial.values())


@pytest.mark.parametrize("network", [GATED, {"mlp": {"depth": 3, "norm": True}}, {"mlp": {"output_norm": True, "bias": True}}])
@pytest.mark.parametrize("keys", ["random", "repeated"])
def test_thousands_of_tokens_stay_finite(network: Any, keys: str) -> None:
    """As for plain networks in test_memory_bound.py."""
    assert largest_at_half_cap(network, keys, 0.9, 4096, seed=1) < 20


def arguments(case: Case) -> tuple[list[list[Tensor]], list[Tensor], Tensor, Tensor]:
    return [case.state[n] for n in STATE], list(case.tokens.values()), case.valid, case.position


@pytest.mark.compile
@pytest.mark.parametrize("network", [GATED, TIED])
def test_a_step_fuses_into_the_callers_region(network: Any) -> None:
    case = make(network, "test_log_cosh", slots=1, bounded=True)
    run: Any = memory_step  # Called with unpacked lists, which no checker follows.

    def step(state: list[list[Tensor]], tokens: list[Tensor], valid: Tensor, position: Tensor) -> list[Tensor]:
        y, *ends = run(case.network, case.objective, "after", 4, True, *state, *tokens, valid, position)
        return [y, *(x for end in ends for x in end)]

    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = fast(*arguments(case)), call(case._replace(chunk=1), "reference")
    assert_close(got, want, 1e-12)
    assert_close(gradients(case, got), gradients(case, want), 1e-12)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_body_equals_the_eager_one() -> None:
    case = make(GATED, "test_log_cosh", slots=8, bounded=True)
    got, want = call(case, "compiled"), call(case)
    assert_close(got, want, 1e-12)
    assert_close(gradients(case, got), gradients(case, want), 1e-12)


SPEC = """titans_graph: 1
input: {x: [B, T, 8]}
nodes:
  m:
    use: memory.neural
    in: x
    heads: 2
    chunk: 4
    network:
      nodes:
        down: {use: fast.linear, in: x, size: 2}
        act: {use: silu, in: down}
        y:
          use: fast.linear
          in: act
    objective: {huber: {delta: 0.5}}
output: m.recall
"""


def check(tmp_path: Path, *changes: tuple[str, str]) -> list[Any]:
    text = SPEC
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    return tg.check(path)


def test_a_spec_holds_a_network(tmp_path: Path) -> None:
    assert check(tmp_path) == []
    path = tmp_path / "spec.yaml"
    model = tg.load(path)
    assert sum("initial" in name for name, _ in model.named_parameters()) == 2
    graph = tg.parse(tg.graph(path).text())
    assert tg.check(graph) == []
    y, _ = model(torch.randn(2, 9, 8))
    assert y.shape == (2, 9, 8)


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        (("use: silu", "use: slu"), 12, "node 'act': unknown operation 'slu'; did you mean 'silu'?"),
        (("size: 2", "size: two"), 11, "size must be a whole number"),
        (("          in: act", "          in: atc"), 15, "did you mean 'act'"),
        (("use: silu, in: down", "use: silu, in: x"), 11, "node 'down' has no effect"),
        (("          use: fast.linear", "          use: fast.conv"), 14, "it mixes tokens"),
        (("          use: fast.linear\n", "          use: fast.linear\n          size: 5\n"), 13, "output 'y' has size 5"),
        (("delta: 0.5", "delta: no"), 16, "delta must be a number"),
        (("huber: {delta: 0.5}", "hubert: {}"), 16, "did you mean 'huber'"),
        (
            ("down: {use: fast.linear, in: x, size: 2}", "down: {use: fast.linear, in: x, size: dim/3}"),
            11,
            "no whole number for dim 4",
        ),
    ],
)
def test_mistakes_are_reported_where_they_stand(tmp_path: Path, change: tuple[str, str], line: int, words: str) -> None:
    (found,) = check(tmp_path, change)
    assert isinstance(found, WrongType)
    assert words in found.message
    assert found.span is not None
    assert found.span.line == line


def test_names_that_torch_uses_are_fine(tmp_path: Path) -> None:
    assert check(tmp_path, ("down: {", "keys: {"), ("in: down", "in: keys")) == []
    names = [name for name, _ in tg.load(tmp_path / "spec.yaml").named_parameters() if "initial" in name]
    assert [name.rpartition(".")[2] for name in names] == ["keys_", "y"]


def test_the_builder_takes_a_network() -> None:
    n = tg.NetworkBuilder()
    h = n("fast.linear", n.x, size=2, name="down")
    network = n.output(n("fast.linear", n("silu", h), name="y"))
    b = tg.Builder()
    x = b.input("x", ["B", "T", 8])
    m = b.add("memory.neural", x, heads=2, chunk=4, network=network)
    b.output(m.recall)
    assert b.check() == []
    assert b.graph().main.nodes[0].parameters["network"] == network.description()
    assert tg.check(tg.parse(b.graph().text())) == []
    assert [k for k in b.build().state_dict() if "initial" in k]
    model = tg.load("blocks/lmm", dim=16, heads=2, network=network)
    assert {k.rpartition(".")[2] for k in model.state_dict() if "initial" in k} == {"down", "y"}


def test_the_order_of_nodes_is_part_of_a_network(tmp_path: Path) -> None:
    """Where `in` is not given; two uses of a block whose networks differ in nothing else are two blocks."""
    text = """titans_graph: 1
input: {x: [B, T, 8]}
nodes:
  one: {use: layer, in: x, network: {nodes: {a: {use: silu}, b: {use: tanh}, w: {use: fast.linear}}}}
  two: {use: layer, in: one, network: {nodes: {b: {use: tanh}, a: {use: silu}, w: {use: fast.linear}}}}
output: two
blocks:
  layer:
    parameters: {network: linear}
    input: {x: [B, T, 8]}
    nodes:
      m: {use: memory.neural, in: x, heads: 2, chunk: 4, network: $network}
    output: m.recall
"""
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    for graph in (tg.graph(path), tg.parse(tg.graph(path).text())):
        found = [parse_network(node.values["network"]) for node in tg.compilation(graph).nodes.values()]
        assert [[node.use for node in network.nodes] for network in found] == [
            ["silu", "tanh", "fast.linear"],
            ["tanh", "silu", "fast.linear"],
        ]
