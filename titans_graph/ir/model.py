"""The declared graph: what a spec file, a builder and a graph text all turn into.

It is a tree of plain frozen values with every parameter resolved: blocks hold nodes, nodes name a component or another
block and where their inputs come from. It prints (:mod:`titans_graph.ir.text`), is checked for names and ports
(:mod:`titans_graph.ir.validate`), and the passes rewrite it from here on. No torch, no YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from titans_graph.errors import Span
from titans_graph.shapes import Value


@dataclass(frozen=True)
class Ref:
    """A reference to a value: an output ``port`` of a ``node`` (or the name of a block input, which has no port).

    An empty port is the node's first output.
    """

    node: str
    port: str = ""

    def text(self) -> str:
        """``node`` or ``node.port``."""
        return f"{self.node}.{self.port}" if self.port else self.node


BAD_REF = Ref("?")
"""Stands (by identity) for a reference whose mistake is reported already."""


def closest(spans: Mapping[str, Span], key: str) -> Span | None:
    """The place of ``a/b/c``, or of the closest that is known of what it stands in."""
    while key not in spans and "/" in key:
        key = key.rpartition("/")[0]
    return spans.get(key)


@dataclass(frozen=True)
class Node:
    """One use of a component or block.

    ``parameters`` are the values given in the spec, resolved (defaults are not filled in). ``inputs`` maps input ports
    to references, a tuple even for ports that take one value. ``repeat`` chains that many copies, each reading the one
    before through its first input. ``span`` is the place of the node. ``spans`` holds places of single keys:
    ``key`` that of a parameter's value or a port's references (``use`` and ``repeat`` among them), ``key/inner`` of what
    stands inside a value, ``key[i]`` of one reference of a list, ``key:`` of the key itself.
    """

    name: str
    use: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, tuple[Ref, ...]] = field(default_factory=dict)
    repeat: int = 1
    span: Span | None = field(default=None, compare=False)
    spans: Mapping[str, Span] = field(default_factory=dict, compare=False)

    def place(self, key: str = "") -> Span | None:
        """The place of a key (parameter or port, ``key/inner`` inside a parameter) of this node, or of the node itself."""
        return closest(self.spans, key) or self.span

    def key_place(self, key: str) -> Span | None:
        """The place where a key itself is written, for mistakes in its name."""
        return self.spans.get(f"{key}:") or self.place(key)


@dataclass(frozen=True)
class Block:
    """Nodes with named inputs and outputs; ``segment`` is the length in tokens that stateful timings refer to, or None.

    The first output is the one that a reference without a port means. ``spans`` holds the places of inputs by name, of
    outputs as ``-> name``, and of ``segment``.
    """

    name: str
    inputs: Mapping[str, Value]
    nodes: tuple[Node, ...]
    outputs: Mapping[str, Ref]
    segment: int | None = None
    span: Span | None = field(default=None, compare=False)
    spans: Mapping[str, Span] = field(default_factory=dict, compare=False)

    def node(self, name: str) -> Node | None:
        """The node of that name, or None."""
        return next((n for n in self.nodes if n.name == name), None)

    def place(self, key: str = "") -> Span | None:
        """The place of an input, an output (``-> name``) or ``segment``, or of the block itself."""
        return self.spans.get(key, self.span)


@dataclass(frozen=True)
class Graph:
    """A whole declared model: the main block and the blocks it uses, by name."""

    name: str
    main: Block
    blocks: Mapping[str, Block] = field(default_factory=dict)

    def text(self) -> str:
        """The graph as text; :func:`titans_graph.parse` reads it back."""
        from titans_graph.ir.text import to_text

        return to_text(self)
