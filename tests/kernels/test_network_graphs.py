"""Networks as graphs: descriptions, their canonical text, the builder, and mistakes with what to do about them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

import titans_graph as tg
from tests.kernels.test_memory_cases import assert_close
from tests.kernels.test_network_exact import GATED, TIED
from titans_graph.kernels.networks import (
    FAMILIES,
    Family,
    Network,
    NetworkBuilder,
    NetworkError,
    PlainUse,
    parse_network,
    register,
)

CHAIN: Any = {
    "nodes": {
        "down": {"use": "fast.linear", "in": "x", "size": 8},
        "act": {"use": "silu", "in": "down"},
        "y": {"use": "fast.linear", "in": "act"},
    },
    "output": "y",
}


def w(**nodes: Any) -> Any:
    """A network of one product ``w`` and the given nodes."""
    return {"nodes": {"w": {"use": "fast.linear"}, **nodes}}


def test_a_graph_is_what_its_nodes_say() -> None:
    network = parse_network(CHAIN)
    assert network.weights(4) == {"down": (4, 8), "y": (8, 4)}
    assert network.uses(4) == ("down", "y")
    weights = {n: torch.randn(s) for n, s in network.weights(4).items()}
    x = torch.randn(5, 4)
    want = torch.nn.functional.silu(x @ weights["down"]) @ weights["y"]
    assert_close([network.apply(x, PlainUse(weights))], [want], 1e-6)


def test_in_and_output_have_defaults() -> None:
    short = {"nodes": {"down": {"use": "fast.linear", "size": 8}, "act": {"use": "silu"}, "y": {"use": "fast.linear"}}}
    assert parse_network(short) == parse_network(CHAIN)


def test_nodes_may_come_in_any_order() -> None:
    nodes = dict(reversed(CHAIN["nodes"].items()))
    assert parse_network({"nodes": nodes, "output": "y"}) == parse_network(CHAIN)


@pytest.mark.parametrize("description", [CHAIN, GATED, TIED, {"mlp": {"norm": True, "bias": True}}, {"lowrank": 4}, "lowrank"])
def test_the_canonical_text_reads_back(description: Any) -> None:
    network = parse_network(description)
    for text in (
        network.text(),
        json.dumps(description),
        json.dumps(json.loads(json.dumps(network.description())), sort_keys=True),
    ):
        assert parse_network(text).weights(8) == network.weights(8)
    assert parse_network(network.text()) == network
    assert parse_network(network.description()) == network
    assert hash(parse_network(network.text())) == hash(network)
    assert parse_network(network.text()).text() == network.text()


def test_defaults_are_not_in_the_canonical_text() -> None:
    plain = '{"mlp": {"activation": "silu", "depth": 2, "hidden": null, "residual": false}}'
    assert parse_network({"mlp": {"norm": False, "bias": False}}).text() == plain
    assert '"norm": true' in parse_network({"mlp": {"norm": True}}).text()
    assert parse_network(w(n={"use": "norm.rms", "eps": 1e-6})).text() == (
        '{"nodes": {"w": {"use": "fast.linear", "in": "x"}, "n": {"use": "norm.rms", "in": "w"}}, "output": "n"}'
    )


def test_sizes_are_numbers_or_multiples() -> None:
    sizes = {"4*dim": 24, " 3 * dim / 2 ": 9, "dim/2": 3, "dim": 6, 5: 5, "6*dim/4": 9}
    for size, want in sizes.items():
        network = parse_network({"nodes": {"a": {"use": "fast.linear", "size": size}, "y": {"use": "fast.linear"}}})
        assert network.weights(6)["a"] == (6, want)
    assert parse_network({"mlp": {"hidden": "2*dim"}}).weights(6)["w1"] == (6, 12)
    assert parse_network({"lowrank": "dim/3"}).weights(6)["down"] == (6, 2)


def test_shapes_of_the_shorthands() -> None:
    bias = {"mlp": {"depth": 2, "hidden": 5, "bias": True}}
    assert parse_network(bias).weights(3) == {"w1": (3, 5), "b1": (5,), "w2": (5, 3), "b2": (3,)}
    assert parse_network({"lowrank": {"rank": 2}}).weights(8) == {"down": (8, 2), "up": (2, 8)}
    for family in ("linear", "mlp", "swiglu", "lowrank"):
        assert parse_network(parse_network(family).description()) == parse_network(family)


def test_norms_of_an_mlp() -> None:
    network = parse_network({"mlp": {"depth": 2, "hidden": 6, "norm": True, "output_norm": True}})
    weights = {n: torch.randn(s, dtype=torch.float64) for n, s in network.weights(4).items()}

    def rms(z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(z, z.shape[-1:], eps=1e-6)

    x = torch.randn(3, 4, dtype=torch.float64)
    h = torch.nn.functional.silu(rms(x) @ weights["w1"])
    assert_close([network.apply(x, PlainUse(weights))], [rms(rms(h) @ weights["w2"])], 1e-12)
    layer = parse_network({"nodes": {"n": {"use": "norm.layer", "eps": 0.1}, "g": {"use": "fast.gain"}}})
    want = torch.nn.functional.layer_norm(x, (4,), eps=0.1)
    assert_close([layer.apply(x, PlainUse({"g": torch.ones(4, dtype=torch.float64)}))], [want], 1e-12)


LOOP = {
    "a": {"use": "add", "in": ["x", "c"]},
    "b": {"use": "silu", "in": "a"},
    "c": {"use": "fast.linear", "in": "b"},
}
WRONG: list[tuple[Any, str]] = [
    ({"nodes": {}}, "a mapping of names"),
    ({"nodes": {"w": "silu"}}, "write {use: silu"),
    ({"nodes": {"w": {"use": "fast.linear"}}, "outptu": "w"}, "did you mean 'output'"),
    (w(x={"use": "silu"}), "'x' is no name for a node of a memory network; 'x' is the network's input"),
    (w(**{"a.b": {"use": "silu"}}), "'a.b' is no name"),
    (w(y={"use": "slu"}), "node 'y': unknown operation 'slu'; did you mean 'silu'?"),
    (w(y={"use": "scale"}), "needs the option 'by'"),
    (w(y={"use": "scale", "by": 0}), "by must be a finite number other than 0"),
    (w(y={"use": "norm.rms", "eps": -1}), "eps must be a number above 0"),
    (w(y={"use": "silu", "slope": 1}), "silu has no option 'slope'; it takes none"),
    (w(y={"use": "fast.linear", "sise": 4}), "did you mean 'size'"),
    (w(y={"use": "fast.linear", "size": "dim*4"}), "a multiple of dim such as 4*dim or dim/2, not 'dim*4'"),
    (w(y={"use": "fast.linear", "size": "__import__('os')"}), "a multiple of dim"),
    (w(y={"use": "fast.linear", "size": True}), "size must be"),
    (w(y={"use": "add"}), "add takes at least 2 inputs, got 1"),
    (w(y={"use": "silu", "in": ["w", "x"]}), "silu takes 1 input, got 2"),
    (w(y={"use": "silu", "in": 3}), "in is the name of a node or a list of names, not 3"),
    (w(y={"use": "silu", "in": "v"}), "reads 'v', which does not exist"),
    (w(wide={"use": "silu"}, y={"use": "silu", "in": "wid"}), "did you mean 'wide'"),
    ({**w(), "output": "y"}, "output 'y' is no node"),
    (w(lost={"use": "silu", "in": "x"}, y={"use": "silu", "in": "w"}), "node 'lost' has no effect: the output 'y'"),
    ({"nodes": LOOP}, "form a loop: a -> b -> c -> a"),
    ({"nodes": {"y": {"use": "silu"}}}, "without fast weights learns nothing"),
    (w(y={"use": "fast.linear", "weight": "ww"}), "ties nothing; did you mean 'w'"),
    (w(y={"use": "fast.bias", "weight": "w"}), "is used by fast.linear in node 'w' and by fast.bias in 'y'"),
    (w(y={"use": "fast.conv"}), "it mixes tokens"),
    (w(y={"use": "fast.embedding"}), "products u @ W"),
    (w(y={"use": "muon"}), "'muon' has no chunk-parallel form: it orthogonalises the gradient"),
    (w(y={"use": "dropout"}), "it is random"),
    (w(y={"use": "fast.linear", "decay": "channel"}), "a decay per channel needs a mixing matrix per channel"),
    ({"muon": {}}, "no chunk-parallel form"),
    ({"mlp": {"norm": "rms"}}, "norm must be true or false"),
    ({"mlp": {"depth": 1000}}, "depth must be a whole number from 1 to 64"),
    ({"lowrank": 0}, "rank must be"),
    (w(**{f"n{i}": {"use": "silu"} for i in range(500)}), "at most 400"),
]


@pytest.mark.parametrize(("description", "message"), WRONG)
def test_wrong_graphs(description: Any, message: str) -> None:
    with pytest.raises(NetworkError, match=re.escape(message)):
        parse_network(description)


MISFITS: list[tuple[Any, str]] = [
    (w(y={"use": "fast.linear", "size": 4}), "output 'y' has size 4, but must have that of the input 'x', 6"),
    (
        w(wide={"use": "fast.linear", "size": 8}, y={"use": "add", "in": ["wide", "w"]}),
        "node 'y': add joins 'wide' of size 8 and 'w' of size 6; their sizes must agree",
    ),
    (
        w(wide={"use": "fast.linear", "size": 8}, y={"use": "fast.linear", "weight": "wide"}),
        "fast weight 'wide' has shape [6, 8] in node 'wide' and [8, 6] in node 'y'",
    ),
    (w(a={"use": "fast.linear", "size": "dim/4"}, y={"use": "fast.linear"}), "node 'a': dim/4 is no whole number for dim 6"),
    ({"lowrank": "dim/4"}, "dim/4 is no whole number for dim 6"),
]


@pytest.mark.parametrize(("description", "message"), MISFITS)
def test_sizes_that_do_not_agree(description: Any, message: str) -> None:
    with pytest.raises(NetworkError, match=re.escape(message)):
        parse_network(description).weights(6)


def test_mistakes_know_their_place() -> None:
    with pytest.raises(NetworkError) as caught:
        parse_network(w(y={"use": "fast.linear", "sise": 4}))
    assert caught.value.path == ("nodes", "y", "sise")
    with pytest.raises(NetworkError) as caught:
        parse_network({"mlp": {"depth": 0}})
    assert caught.value.path == ("mlp", "depth")


def test_the_builder_gives_the_same_network() -> None:
    n = tg.NetworkBuilder()
    h = n("fast.linear", n.x, size=8, name="down")
    h = n("silu", h, name="act")
    network = n.output(n("fast.linear", h, name="y"))
    assert network == parse_network(CHAIN)
    assert parse_network(network) is network
    state = tg.fast_weights(network, 4)
    assert list(state) == ["down", "y"]


def test_the_builder_ties_and_names() -> None:
    n = NetworkBuilder()
    a = n("fast.linear")
    b = n("fast.linear", a, weight=a)
    network = n.output(n("add", a, b))
    assert [node.name for node in network.nodes] == ["linear", "linear_2", "add"]
    assert network.weights(3) == {"linear": (3, 3)}


def test_the_builder_says_the_same() -> None:
    n = NetworkBuilder()
    with pytest.raises(NetworkError, match="did you mean 'silu'"):
        n("slu", n.x)
    with pytest.raises(NetworkError, match="add takes at least 2"):
        n("add", n.x)
    with pytest.raises(NetworkError, match="no value of this network"):
        n("silu", NetworkBuilder().x)
    with pytest.raises(NetworkError, match="fast weights learns nothing"):
        n.output(n("silu", n.x))
    with pytest.raises(NetworkError, match="already the name of a node"):
        n("silu", n.x, name="silu")
    assert isinstance(parse_network("linear"), Network)


def test_a_family_of_the_user_expands_and_prints_as_its_graph() -> None:
    def check(options: dict[str, Any]) -> None:
        if not isinstance(options["size"], int):
            raise NetworkError("test_pair: size must be a whole number", "size")

    family = Family(
        {"size": 4},
        lambda o: {"nodes": {"a": {"use": "fast.linear", "size": o["size"]}, "b": {"use": "fast.linear"}}},
        check,
        short="size",
    )
    register("test_pair", family)
    try:
        network = parse_network({"test_pair": 5})
        assert network.weights(3) == {"a": (3, 5), "b": (5, 3)}
        assert network.text().startswith('{"nodes"')
        with pytest.raises(NetworkError, match="size must be") as caught:
            parse_network({"test_pair": {"size": None}})
        assert caught.value.path == ("test_pair", "size")
    finally:
        del FAMILIES["test_pair"]
