"""The strategy of whole graphs: blocks made by recipes, nested and repeated."""

from __future__ import annotations

from collections.abc import Collection

from hypothesis import note
from hypothesis import strategies as st

from titans_graph.ir import Block, Graph, Node, Ref
from titans_graph.registry import known
from titans_graph.shapes import Value, fixed
from titans_graph.shapes import ids as ids_value
from titans_graph.spec import to_yaml
from titans_graph.testing.strategies import recipes
from titans_graph.testing.strategies.draft import RECIPES, Draft, Recipe, recipe_of

assert "memory.neural" in RECIPES, recipes  # importing recipes fills the table

_SEGMENTS = (None, 4, 6, 8, 2)
_DIMS = (4, 6, 3, 2, 5)


def graphs(
    max_nodes: int = 4, *, uses: Collection[str] | None = None, always: Collection[str] = ()
) -> st.SearchStrategy[Graph]:
    """Valid graphs on a stream ``[B, T, dim]`` or on token ids ``[B, T]``.

    Drawn are all components that have a recipe (``uses``: these alone), blocks inside blocks with several inputs and outputs,
    repetitions, feedback through state, several outputs, and every parameter of the project's components. ``always``
    names components that each graph holds, whether or not they have a recipe (see :func:`recipe`). ``max_nodes``: how many
    steps a block has, each of one to a few nodes.

    The spec is noted, so that a failing example prints as a file. UsageError for a component that cannot be drawn.
    """
    allowed = [recipe_of(use) for use in ([use for use in RECIPES if known(use)] if uses is None else uses)]
    return _graphs(max_nodes, allowed, [recipe_of(use) for use in always])


@st.composite
def _graphs(draw: st.DrawFn, max_nodes: int, allowed: list[Recipe], always: list[Recipe]) -> Graph:
    dim = draw(st.sampled_from(_DIMS))
    tokens = any(r.ids for r in always) or (any(r.use == "embedding" for r in allowed) and draw(st.booleans()))
    vocab = draw(st.integers(2, 7)) if tokens else 0
    inner: list[_Inner] = []
    for i in range(draw(st.sampled_from([0, 1, 2]))):
        inner.append(_inner(draw, f"part{i}", dim, vocab, inner, allowed))
    d = Draft(draw, dim, draw(st.sampled_from(_SEGMENTS)), inputs=() if tokens else ("x",), ids="tokens" * tokens, vocab=vocab)
    if tokens:
        d.inputs["tokens"] = ids_value("tokens")
        recipe_of("embedding").build(d)
    _steps(d, draw(st.integers(0 if always else 1, max_nodes)), allowed, inner)
    for chosen in always:
        chosen.build(d)
    if tokens and draw(st.booleans()):
        recipe_of(draw(st.sampled_from(["head.tied", "head.linear"]))).build(d)
    main = d.block("main", draw(st.booleans()))
    graph = _pruned(Graph("drawn", main, {b.block.name: b.block for b in inner}))
    note(f"--- spec ---\n{to_yaml(graph)}")
    return graph


class _Inner:
    """A block that others may use, and the lengths in tokens that it works in."""

    weight = 6

    def __init__(self, block: Block, periods: set[int]) -> None:
        self.block, self.periods = block, periods

    def applies(self, d: Draft) -> bool:
        """Whether it may stand there: inside a loop everything works in pieces that divide the loop's period."""
        segments = {self.block.segment} - {None, d.loop}
        readable = d.ids is not None or not any(value.is_ids() for value in self.block.inputs.values())
        return readable and (not d.loop or (not segments and all(d.loop % n == 0 for n in self.periods)))

    def build(self, d: Draft) -> None:
        """Use it, perhaps several times in a row."""
        inputs = {name: self._source(d, value) for name, value in self.block.inputs.items()}
        ref = d.add(self.block.name, None, d.choose(1, 2, 3), **inputs)
        d.periods |= self.periods
        rest = list(self.block.outputs)[1:]
        d.offer(ref)
        if rest and d.flag():
            d.offer(Ref(ref.node, d.choose(*rest)))

    @staticmethod
    def _source(d: Draft, value: Value) -> Ref:
        """Something to connect to an input of that type."""
        if value.is_ids():
            assert d.ids is not None
            return d.ids
        return d.pick() if value.timed else d.add("tokens.persistent", {"count": value.single.length, "dim": value.dim})


def _inner(draw: st.DrawFn, name: str, dim: int, vocab: int, inner: list[_Inner], allowed: list[Recipe]) -> _Inner:
    """A block of one or two streams, perhaps with a fixed piece or the token ids beside them."""
    inputs = draw(st.sampled_from([("x",), ("x", "y")]))
    extra = draw(st.sampled_from(["", "prefix", "tokens"] if vocab else ["", "prefix"]))
    ids = "tokens" if extra == "tokens" else ""
    d = Draft(draw, dim, draw(st.sampled_from(_SEGMENTS)), inputs=inputs, ids=ids, vocab=vocab)
    if extra == "tokens":
        d.inputs["tokens"] = ids_value("tokens")
        recipe_of("embedding").build(d)
    if extra == "prefix":
        d.inputs["prefix"] = fixed(draw(st.integers(1, 3)), dim, "prefix")
        recipes.with_prefix(d, Ref("prefix"))
    _steps(d, draw(st.integers(1, 2)), allowed, inner)
    periods = d.periods if d.segment is None else d.periods | {d.segment}
    return _Inner(d.block(name, draw(st.booleans())), periods)


def _steps(d: Draft, count: int, allowed: list[Recipe], inner: list[_Inner]) -> None:
    for _ in range(count):
        every: list[Recipe | _Inner] = [*allowed, *inner]
        choices = [item for item in every for _ in range(item.weight) if item.applies(d)]
        d.draw(st.sampled_from(choices)).build(d)


def _pruned(graph: Graph) -> Graph:
    """The graph without blocks that nobody uses."""
    used: set[str] = set()
    waiting: list[Node] = [*graph.main.nodes]
    while waiting:
        use = waiting.pop().use
        if use in graph.blocks and use not in used:
            used.add(use)
            waiting.extend(graph.blocks[use].nodes)
    return Graph(graph.name, graph.main, {name: block for name, block in graph.blocks.items() if name in used})
