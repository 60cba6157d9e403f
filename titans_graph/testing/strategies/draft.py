"""A block under construction, and the table of recipes: how each component is wired into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hypothesis import strategies as st

from titans_graph.errors import UsageError, suggest
from titans_graph.ir import Block, Node, Ref
from titans_graph.registry import Port, known, lookup, names
from titans_graph.shapes import Value, stream

T = TypeVar("T")


class Draft:
    """A block under construction, handed to recipes.

    All streams that recipes exchange are ``[B, T, dim]`` with one ``dim``. ``segment`` is the block's, or None; ``ids`` the
    token ids where the block reads them, else None; ``vocab`` their number. What is offered and never read ends up in the
    block's outputs, so that nothing is unused.
    """

    def __init__(
        self, draw: st.DrawFn, dim: int, segment: int | None, *, inputs: Sequence[str] = ("x",), ids: str = "", vocab: int = 0
    ) -> None:
        self.draw, self.dim, self.segment, self.vocab = draw, dim, segment, vocab
        self.nodes: list[Node] = []
        self.inputs: dict[str, Value] = {name: stream(dim, name) for name in inputs}
        self.ids = Ref(ids) if ids else None
        self.streams = [Ref(name) for name in inputs]
        self.unread = dict.fromkeys(self.streams)
        self.periods: set[int] = set()
        self.loop = 0
        """The period of the feedback loop that is being drawn, 0 outside of loops."""

    def choose(self, *options: T) -> T:
        """One of the options; the first is the simplest."""
        return self.draw(st.sampled_from(options))

    def flag(self) -> bool:
        """True or false; false is the simpler."""
        return self.draw(st.booleans())

    def number(self, low: int, high: int) -> int:
        """A whole number within bounds, both included."""
        return self.draw(st.integers(low, high))

    def add(self, use: str, parameters: dict[str, Any] | None = None, repeat: int = 1, **inputs: Any) -> Ref:
        """Add a node and give a reference to its first output; an input is a reference or a list of them."""
        name = f"{use.replace('.', '_')}_{len(self.nodes)}"
        tuples = {port: (refs,) if isinstance(refs, Ref) else tuple(refs) for port, refs in inputs.items()}
        self.nodes.append(Node(name, use, parameters or {}, tuples, repeat))
        for refs in tuples.values():
            for ref in refs:
                self.unread.pop(ref, None)
        return Ref(name)

    def connect(self, ref: Ref, **inputs: Ref) -> None:
        """Connect further inputs of a node added before, which closes a loop."""
        at = next(i for i, node in enumerate(self.nodes) if node.name == ref.node)
        node = self.nodes[at]
        self.nodes[at] = replace(node, inputs={**node.inputs, **{port: (source,) for port, source in inputs.items()}})
        for source in inputs.values():
            self.unread.pop(source, None)

    def offer(self, ref: Ref) -> None:
        """Offer a stream ``[B, T, dim]`` to later nodes."""
        self.streams.append(ref)
        self.unread[ref] = None

    def pick(self) -> Ref:
        """Some stream, rather a late or unread one."""
        return self.draw(st.sampled_from([*self.unread, *self.streams[-3:]]))

    def period(self, *options: int, free: bool = False) -> int:
        """One of the lengths in tokens that divide the block's segment (``free``: only that of the loop being drawn).

        It is noted as a length that the block works in.
        """
        whole = self.loop or (None if free else self.segment)
        chosen = self.choose(*[n for n in options if whole is None or whole % n == 0] or [1])
        self.periods.add(chosen)
        return chosen

    def heads(self, most: int = 3) -> int:
        """A number of heads that divides ``dim``."""
        return self.choose(*[h for h in range(1, most + 1) if self.dim % h == 0])

    def back(self, ref: Ref, dim: int) -> Ref:
        """The stream of ``dim`` features brought back to the block's ``dim``."""
        return ref if dim == self.dim else self.add("linear", {"dim": self.dim}, x=ref)

    def block(self, name: str, several: bool) -> Block:
        """The finished block; what nobody read becomes its outputs, joined or, with ``several``, some apart."""
        ends = list(self.unread) or [self.streams[-1]]
        count = self.number(1, len(ends) - 1) if several and len(ends) > 1 else 0
        apart, ends = ends[:count], ends[count:]
        out = self.add("add", x=ends) if len(ends) > 1 else ends[0]
        outputs = {ref.node if not ref.port else f"{ref.node}_{ref.port}": ref for ref in dict.fromkeys([out, *apart])}
        return Block(name, self.inputs, tuple(self.nodes), outputs, self.segment)


@dataclass(frozen=True)
class Recipe:
    """How a component is wired into a block. ``build`` adds nodes to a :class:`Draft` and offers what they give.

    ``ids``: only where the block reads token ids. ``alone``: never inside a feedback loop (its output has no time, or it
    works in pieces that need not divide the loop's). ``weight``: how often it is drawn, 1 for once.
    """

    use: str
    build: Callable[[Draft], None]
    ids: bool = False
    alone: bool = False
    weight: int = 1

    def applies(self, draft: Draft) -> bool:
        """Whether it can be used there."""
        return (draft.ids is not None or not self.ids) and not (draft.loop and self.alone)


RECIPES: dict[str, Recipe] = {}
"""The recipes by component id; :func:`recipe` adds to them."""

Build = TypeVar("Build", bound=Callable[[Draft], None])


def recipe(use: str, *, ids: bool = False, alone: bool = False, weight: int = 1) -> Callable[[Build], Build]:
    """Decorate a function that adds a component to a :class:`Draft`, so that :func:`graphs` draws it.

        @tgs.recipe("mine.shift")
        def shift(d: tgs.Draft) -> None:
            d.offer(d.add("mine.shift", {"by": d.number(1, 4)}, x=d.pick()))

    UsageError where the component has a recipe already. See :class:`Recipe` for the others.
    """

    def register(build: Build) -> Build:
        if use in RECIPES:
            raise UsageError(f"component {use!r} has a recipe already; remove it from RECIPES first")
        RECIPES[use] = Recipe(use, build, ids, alone, weight)
        return build

    return register


def recipe_of(use: str) -> Recipe:
    """The recipe of a component; of one without, where it takes streams and needs no parameters, the obvious one.

    UsageError where the component is unknown, or is not that simple.
    """
    if use in RECIPES:
        return RECIPES[use]
    if not known(use):
        raise UsageError(f"unknown component {use!r}; {suggest(use, names())}")
    return Recipe(use, _obvious(use, lookup(use).inputs))


def _obvious(use: str, ports: Sequence[Port]) -> Callable[[Draft], None]:
    """Every required input gets a stream, every parameter its default."""
    odd = next((port for port in ports if port.required and port.accepts not in ("stream", "sequence")), None)
    if odd is not None:
        raise UsageError(
            f"component {use!r} has no recipe, and its input {odd.name!r} is no stream: register one with recipe()"
        )

    def build(d: Draft) -> None:
        wanted = [port for port in ports if port.required]
        inputs: dict[str, Any] = {port.name: [d.pick(), d.pick()] if port.many else d.pick() for port in wanted}
        d.offer(d.add(use, **inputs))

    return build
