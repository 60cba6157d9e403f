"""Pass ``expand``: paths of nested blocks, chains of repeated ones, and references followed through block borders."""

from __future__ import annotations

import titans_graph as tg
from titans_graph.passes import Compilation

NESTED = """\
graph nested
block inner(x: [B, T, 8], z: [B, T, 8])
  y = add(x=[x, z])
  -> y=y
block outer(x: [B, T, 8])
  n = norm.rms(x=x)
  pair = inner(x=n, z=x) repeat 2
  -> y=pair
main(x: [B, T, 8])
  layers = outer(x=x) repeat 2
  -> y=layers
"""


def expanded(text: str) -> Compilation:
    return tg.compilation(tg.parse(text), after="expand")


def test_nested_copies_have_paths_in_order() -> None:
    names = ["layers.0.n", "layers.0.pair.0.y", "layers.0.pair.1.y", "layers.1.n", "layers.1.pair.0.y", "layers.1.pair.1.y"]
    assert list(expanded(NESTED).nodes) == names


def test_copies_chain_through_the_first_input_and_share_the_others() -> None:
    c = expanded(NESTED)
    wiring = {name: [ref.text() for ref in node.inputs["x"]] for name, node in c.nodes.items()}
    assert wiring == {
        "layers.0.n": ["x"],
        "layers.0.pair.0.y": ["layers.0.n.out", "x"],
        "layers.0.pair.1.y": ["layers.0.pair.0.y.out", "x"],
        "layers.1.n": ["layers.0.pair.1.y.out"],
        "layers.1.pair.0.y": ["layers.1.n.out", "layers.0.pair.1.y.out"],
        "layers.1.pair.1.y": ["layers.1.pair.0.y.out", "layers.0.pair.1.y.out"],
    }
    assert c.outputs["y"].text() == "layers.1.pair.1.y.out"


def test_a_node_knows_its_block_its_copy_and_its_declaration() -> None:
    node = expanded(NESTED).nodes["layers.1.pair.0.y"]
    assert (node.block, node.instance, node.local, node.declared) == ("inner", "layers.1.pair.0", "y", "inner.y")


def test_a_repeated_component_chains_too() -> None:
    c = expanded("graph g\nmain(x: [B, T, 8])\n  n = norm.rms(x=x) repeat 3\n  -> y=n\n")
    assert [ref.text() for node in c.nodes.values() for ref in node.inputs["x"]] == ["x", "n.0.out", "n.1.out"]
    assert c.outputs["y"].text() == "n.2.out"
