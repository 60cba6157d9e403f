"""What the public strategies draw: everything that is registered, every kind of feature, in few and readable nodes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from torch import nn

import titans_graph as tg
from titans_graph import errors, registry
from titans_graph.components.norm_rms import RMSNorm
from titans_graph.ir import Graph, Node
from titans_graph.spec import read, read_text, to_yaml
from titans_graph.testing import strategies as tgs
from titans_graph.testing.strategies import Reading

SAME = settings(
    max_examples=400, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


def nodes(graph: Graph, use: str = "") -> list[Node]:
    every = [node for block in (graph.main, *graph.blocks.values()) for node in block.nodes]
    return [node for node in every if not use or node.use == use]


def told(graph: Graph, use: str, **parameters: object) -> bool:
    """Whether some node of that kind has these parameters; ``...`` stands for any value."""
    return any(
        all(key in node.parameters and value in (..., node.parameters[key]) for key, value in parameters.items())
        for node in nodes(graph, use)
    )


def memory(test: Callable[[Node], bool]) -> Callable[[Graph], bool]:
    return lambda graph: any(test(node) for node in nodes(graph, "memory.neural"))


def having(use: str) -> Callable[[Graph], bool]:
    return lambda graph: bool(nodes(graph, use))


def parameter(key: str, word: str, default: str = "") -> Callable[[Graph], bool]:
    return memory(lambda node: word in str(node.parameters.get(key, default)))


def inputs(kind: str) -> Callable[[Graph], bool]:
    return lambda g: any(getattr(v, kind)() for b in g.blocks.values() for v in b.inputs.values())


FEATURES: dict[str, Callable[[Graph], bool]] = {
    **{f"component {use}": having(use) for use in registry.TABLE},
    "a block": lambda g: bool(g.blocks),
    "a block in a block": lambda g: any(n.use in g.blocks for b in g.blocks.values() for n in b.nodes),
    "a block repeated": lambda g: any(n.use in g.blocks and n.repeat > 1 for n in nodes(g)),
    "a component repeated": lambda g: any(n.use not in g.blocks and n.repeat > 1 for n in nodes(g)),
    "a block of two streams": lambda g: any(len(b.inputs) > 1 for b in g.blocks.values()),
    "a block with a fixed input": inputs("is_fixed"),
    "a block that reads ids": inputs("is_ids"),
    "a block with a segment of its own": lambda g: any(b.segment not in (None, g.main.segment) for b in g.blocks.values()),
    "a second output of a block": lambda g: any(
        ref.node in {n.name for n in nodes(g) if n.use in g.blocks} and ref.port
        for n in nodes(g)
        for refs in n.inputs.values()
        for ref in refs
    ),
    "token ids": lambda g: g.main.inputs.keys() == {"tokens"},
    "several outputs": lambda g: len(g.main.outputs) > 1,
    "an odd feature size": lambda g: any((v.dim or 0) % 2 for v in g.main.inputs.values()),
    "feedback through state": memory(lambda n: "opening" in n.inputs),
    "a memory that asks itself": memory(lambda n: any(r.node == n.name for refs in n.inputs.values() for r in refs)),
    "several heads": lambda g: any(n.parameters.get("heads", 1) > 1 for n in nodes(g)),
    "a window": lambda g: told(g, "attention.window", window=...),
    "grouped heads": lambda g: any(told(g, f"attention.{k}", kv_heads=1) for k in ("full", "window", "segment")),
    "heads of a size of their own": lambda g: any("head_dim" in n.parameters for n in nodes(g)),
    "rotary positions off": lambda g: any(n.parameters.get("rotary", 0) is None for n in nodes(g)),
    "a network graph": memory(lambda n: "nodes" in str(n.parameters.get("network"))),
    "a short network": memory(lambda n: n.parameters.get("network") == "linear"),
    **{f"objective {o}": parameter("objective", o, "l2") for o in ("l2", "dot", "huber", "lp")},
    **{f"read {r}": parameter("read", r, "after") for r in ("after", "before", "chunk")},
    **{f"{key} off": parameter(key, "False") for key in ("momentum", "forget", "output_gate")},
    "no convolution": memory(lambda n: n.parameters.get("conv") == 0),
    "no cap": memory(lambda n: n.parameters.get("cap") == "none"),
    "the reference kernel": memory(lambda n: n.parameters.get("kernel") == "reference"),
    "no persistent tokens": lambda g: told(g, "tokens.persistent", count=0),
}
READINGS: dict[str, Callable[[Reading], bool]] = {
    "packed documents": lambda r: r.document is not None and bool((r.document != r.document[:, :1]).any()),
    "rows cut at different places": lambda r: r.document is not None and bool((r.document != r.document[:1]).any()),
    "an id that comes back": lambda r: (
        r.document is not None
        and bool((r.document[:, 0] == r.document[:, -1]).any())
        and bool((r.document != r.document[:, :1]).any())
    ),
    "rows at different positions": lambda r: any(0 < len(rows) < r.x.shape[0] for rows in r.resets[1:]),
    "an empty call": lambda r: 0 in r.parts,
    "single tokens": lambda r: 1 in r.parts,
    "one row": lambda r: r.x.shape[0] == 1,
    "several rows": lambda r: r.x.shape[0] > 1,
    "more than a chunk": lambda r: max(r.parts) > 8,
}


def test_everything_there_is_gets_drawn() -> None:
    seen: set[str] = set()

    @SAME
    @given(graph=tgs.graphs(), data=st.data())
    def draw(graph: Graph, data: st.DataObject) -> None:
        seen.update(name for name, found in FEATURES.items() if found(graph))
        reading = data.draw(tgs.readings(graph))
        seen.update(name for name, found in READINGS.items() if found(reading))

    draw()
    assert seen == {*FEATURES, *READINGS}, {*FEATURES, *READINGS} - seen


def test_every_component_has_a_recipe() -> None:
    assert set(registry.TABLE) <= set(tgs.RECIPES)


@pytest.mark.parametrize("use", registry.TABLE)
@settings(max_examples=5)
@given(data=st.data())
def test_a_graph_holds_what_it_is_asked_for(use: str, data: st.DataObject) -> None:
    graph = data.draw(tgs.graphs(max_nodes=1, always=[use]))
    assert nodes(graph, use)
    assert tg.check(graph) == []


@given(graph=tgs.graphs(uses=["add", "linear"]))
def test_nothing_else_is_drawn_than_what_is_named(graph: Graph) -> None:
    assert {n.use for n in nodes(graph)} - set(graph.blocks) <= {
        "add",
        "linear",
        "tokens.persistent",
        "sequence.concat",
        "attention.window",
        "attention.full",
        "attention.segment",
    }


def test_examples_shrink_to_readable_specs() -> None:
    """A failure that needs feedback and a memory's network is shown as the feedback and little else."""
    found = find(
        tgs.graphs(), FEATURES["feedback through state"], settings=settings(max_examples=1000, derandomize=True, database=None)
    )
    text = to_yaml(found)
    assert len(found.main.nodes) <= 8, text
    assert not found.blocks
    assert len(text.splitlines()) <= 14, text
    assert read_text(text).graph == found


class Doubled(RMSNorm):
    """A component that is not the project's."""


@contextmanager
def installed(use: str) -> Iterator[None]:
    registry.TABLE[use] = f"{__name__}:Doubled"
    try:
        yield
    finally:
        del registry.TABLE[use]
        registry.lookup.cache_clear()


def test_a_component_of_a_user_is_drawn_with_a_recipe_or_the_obvious_one() -> None:
    with installed("mine.doubled"), installed("mine.other"):

        @tgs.recipe("mine.other")
        def other(d: tgs.Draft) -> None:
            d.offer(d.add("mine.other", {"eps": 0.5}, x=d.pick()))

        try:
            with pytest.raises(errors.UsageError, match="has a recipe already"):
                tgs.recipe("mine.other")(other)
            (node,) = nodes(find(tgs.graphs(), having("mine.other"), settings=SAME), "mine.other")
            assert node.parameters == {"eps": 0.5}
            obvious = find(tgs.graphs(always=["mine.doubled"]), lambda graph: tg.check(graph) == [], settings=SAME)
            assert nodes(obvious, "mine.doubled")
        finally:
            del tgs.RECIPES["mine.other"]


def test_unknown_components_and_those_without_an_obvious_wiring_are_refused() -> None:
    assert issubclass(Doubled, nn.Module)
    with pytest.raises(errors.UsageError, match="did you mean 'linear'"):
        tgs.graphs(always=["linera"])


@pytest.mark.parametrize("kind", ["graphs", "near_valid_specs"])
def test_a_failing_example_prints_a_spec_that_can_be_pasted_into_a_file(kind: str, tmp_path: Path) -> None:
    """The last text in the notes of the failure, as it stands there, is the example that failed."""
    seen: list[Graph | tgs.Planted] = []

    @settings(
        max_examples=50, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(example=tgs.graphs() if kind == "graphs" else tgs.near_valid_specs())
    def test(example: Graph | tgs.Planted) -> None:
        seen.append(example)
        pytest.fail("by intent")

    with pytest.raises(pytest.fail.Exception) as caught:
        test()
    shown = "\n".join(caught.value.__notes__)
    *_, text = re.findall(r"^--- .* ---\n((?:.+\n)+)$", shown, re.MULTILINE)
    failed = seen[-1]
    if isinstance(failed, Graph):
        (tmp_path / "pasted.yaml").write_text(text)
        assert read(tmp_path / "pasted.yaml").graph == failed
        assert tg.load(tmp_path / "pasted.yaml").graph == failed
    else:
        assert text == failed.text
