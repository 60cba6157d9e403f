"""Every form of a graph reads back as the same graph: text, YAML, and one through the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ir import fakes
from titans_graph.ir import Block, Graph, Node, Ref, parse, to_text
from titans_graph.shapes import Value, fixed, ids, stream
from titans_graph.spec import read_text, to_yaml


@pytest.fixture(autouse=True, scope="module")
def _fake_components() -> Iterator[None]:
    with fakes.installed():
        yield


ODD = ["null", "on", "_", "y", "B", "T", "repeat-1", "segment", "graph", "main", "éß", "名前", "true", "e1", "x" * 90]
NAMES = st.one_of(st.sampled_from(ODD), st.from_regex(r"[a-z_][a-z0-9_-]{0,6}", fullmatch=True)).filter(
    lambda name: name not in ("use", "in", "repeat")
)
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(["$", "$a", "$$", "08", "1e3", "on", "<<", "", "#", "\u2028"]))
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXTS,
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
SIZES = st.integers(1, 4096)


def _input(name: str) -> st.SearchStrategy[Value]:
    return st.one_of(
        st.just(ids(name)), SIZES.map(lambda n: stream(n, name)), st.tuples(SIZES, SIZES).map(lambda n: fixed(*n, name))
    )


@st.composite
def blocks(draw: st.DrawFn, name: str, inner: list[Block]) -> Block:
    """A sound block: a chain of nodes, each reading whatever stands in the block, later nodes as well."""
    names = draw(st.lists(NAMES, min_size=2, max_size=7, unique=True))
    count = draw(st.integers(1, min(3, len(names) - 1)))
    inputs = {n: draw(_input(n)) for n in names[:count]}
    made = []
    for i, node in enumerate(names[count:]):
        before = names[: count + i]
        # The last names before it are read for sure, so that none is left unused.
        sources = [Ref(n) for n in (names[:count] if i == 0 else before[-1:])]
        block = draw(st.sampled_from([None, *inner]))
        if block is not None and (i > 0 or count == 1):
            ports = dict.fromkeys(block.inputs, (sources[0],))
            made.append(Node(node, block.name, {}, ports, draw(st.integers(1, 9))))
            continue
        parameters = draw(st.dictionaries(st.sampled_from(["value", "other"]), VALUES, max_size=2))
        later = draw(st.lists(st.sampled_from(names[count:]).map(Ref), max_size=2))
        made.append(Node(node, "any.fake", parameters, {"x": tuple(sources), "y": tuple(later)}))
    outputs = {draw(NAMES): Ref(names[-1]), names[-1]: Ref(names[-1])}
    return Block(name, inputs, tuple(made), outputs, draw(st.none() | SIZES))


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """A sound graph of up to three blocks, every block used."""
    found: list[Block] = []
    for i in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(["null", "b", "b.2", "y-1.z", "1.5".replace("1", "e")])) + f"{i}"
        found.append(draw(blocks(name, found)))
    main = draw(blocks("main", found))
    used = {n.use for b in (main, *found) for n in b.nodes}
    return Graph(draw(TEXTS.filter(bool)), main, {b.name: b for b in found if b.name in used})


def _reachable(graph: Graph) -> Graph:
    """The graph without blocks that only unused blocks use."""
    seen: list[str] = []
    stack = [graph.main]
    while stack:
        for node in stack.pop().nodes:
            if node.use in graph.blocks and node.use not in seen:
                seen.append(node.use)
                stack.append(graph.blocks[node.use])
    return Graph(graph.name, graph.main, {name: b for name, b in graph.blocks.items() if name in seen})


SOUND = graphs().map(_reachable)


def same(one: Graph, other: Graph) -> None:
    """Equal, and with everything in the same order and of the same type."""
    assert one == other
    assert repr(_plain(one)) == repr(_plain(other))


def _plain(graph: Graph) -> Any:
    def block(b: Block) -> Any:
        nodes = [(n.name, n.use, n.parameters, dict(n.inputs), n.repeat) for n in b.nodes]
        return b.name, dict(b.inputs), nodes, dict(b.outputs), b.segment

    return graph.name, block(graph.main), sorted((name, block(b)) for name, b in graph.blocks.items())


@given(SOUND)
def test_text_reads_back(graph: Graph) -> None:
    same(parse(to_text(graph)), graph)


@given(SOUND)
def test_yaml_reads_back(graph: Graph) -> None:
    declared = read_text(to_yaml(graph))
    assert declared.diagnostics == []
    assert declared.graph is not None
    same(declared.graph, graph)


@given(SOUND)
def test_yaml_then_text_reads_back(graph: Graph) -> None:
    declared = read_text(to_yaml(graph))
    assert declared.graph is not None
    same(parse(declared.graph.text()), graph)


@given(TEXTS, TEXTS, TEXTS, VALUES)
def test_text_holds_any_words_at_all(one: str, two: str, three: str, value: Any) -> None:
    node = Node(one, two, {three: value}, {two: (Ref(three, one),), three + "'": ()})
    graph = Graph(three, Block("main", {two: stream(3, two)}, (node,), {one: Ref(two)}), {})
    same(parse(to_text(graph)), graph)
