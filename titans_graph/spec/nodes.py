"""Nodes of a spec: one entry of ``nodes:`` to a :class:`titans_graph.ir.Node`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from titans_graph import registry
from titans_graph.errors import DuplicateKey, LimitExceeded, MissingKey, Span, WrongType
from titans_graph.ir import signature
from titans_graph.ir.model import Node, Ref
from titans_graph.ir.nesting import circle_message
from titans_graph.ir.signature import SUGAR, Signature
from titans_graph.ir.values import UNRESOLVED
from titans_graph.spec.tree import Entry, Items, Scalar, Table, Tree

if TYPE_CHECKING:
    from titans_graph.spec.blocks import Blocks, Template

_EXAMPLE = "write {use: norm.rms, in: x}"


_LARGEST = 1000
"""Values of more elements than this have one place for all of it."""


def _places(path: str, tree: Tree) -> dict[str, Span]:
    """The places of everything inside a mapping, as ``key/inner``: what is written, or the key of what has parts."""
    if not isinstance(tree, Table):
        return {}
    found: dict[str, Span] = {}
    for key, entry in tree.entries.items():
        inner = f"{path}/{key}"
        found[inner] = entry.value.span if isinstance(entry.value, Scalar) else entry.key.span
        found |= _places(inner, entry.value)
    return found


class NodeReader:
    """Reads the nodes of one block. ``origin`` is the block's name as written, ``names`` what references can mean."""

    def __init__(self, blocks: Blocks, block: str, origin: str, names: set[str], values: Mapping[str, Any]) -> None:
        self.blocks, self.block, self.origin, self.names, self.values = blocks, block, origin, names, values
        self.scope = blocks.scope

    def node(self, entry: Entry) -> Node:
        """The node; one whose ``use`` is broken still exists, so that references to it are fine."""
        name, table = entry.key.text, entry.value
        if not isinstance(table, Table):
            self.scope.report(WrongType, f"node {name!r} is not a mapping", table.span, name, _EXAMPLE)
            return self.lost(name, entry)
        use = table.get("use")
        template = self.blocks.templates.get(use.text) if isinstance(use, Scalar) else None
        known = self.signature(use, template, entry)
        spans = {"use": use.span} if use is not None else {}
        inputs, parameters = self.connections(table, known, spans)
        repeat = self.repeat(table, spans)
        word = use.text if isinstance(use, Scalar) else ""
        if template is not None and (self.block, name) not in self.blocks.silent:
            word = self.use_block(template, known, table, parameters)
            parameters = {}
        return Node(name, word, parameters, inputs, repeat, entry.key.span, spans)

    def lost(self, name: str, entry: Entry) -> Node:
        """A node of which only the name is left."""
        self.blocks.silent.add((self.block, name))
        self.blocks.partial.add(self.block)
        return Node(name, "", span=entry.key.span)

    def signature(self, use: Tree | None, template: Template | None, entry: Entry) -> Signature | None:
        """The ports and parameters behind ``use``; None where it is broken (then reported here) or unknown."""
        name = entry.key.text
        if isinstance(use, Scalar) and isinstance(use.value, str) and use.value:
            circle = self.blocks.circles.get((self.origin, use.text))
            if circle and template is not None:
                self.scope.report(LimitExceeded, circle_message(circle), use.span, name)
                self.blocks.silent.add((self.block, name))
                return template.signature
            if template is not None:
                if template.table is None:
                    self.blocks.silent.add((self.block, name))
                    self.blocks.partial.add(self.block)
                    return None
                return template.signature
            return signature.of_component(use.value) if registry.known(use.value) else None
        self.blocks.silent.add((self.block, name))
        if use is None:
            near = any(k in ("uses", "Use", "user", "type", "component") for k in getattr(entry.value, "entries", ()))
            help = "the key is called 'use'" if near else _EXAMPLE
            self.scope.report(MissingKey, f"node {name!r} does not say what it uses", entry.key.span, name, help)
        else:
            self.scope.report(WrongType, "use names a component or block", use.span, name, _EXAMPLE)
        return None

    def connections(
        self, table: Table, known: Signature | None, spans: dict[str, Span]
    ) -> tuple[dict[str, tuple[Ref, ...]], dict[str, Any]]:
        """Input ports and parameters of a node; a key that is neither goes where it probably belongs."""
        inputs: dict[str, tuple[Ref, ...]] = {}
        parameters: dict[str, Any] = {}
        for key, entry in table.entries.items():
            if key in ("use", "repeat"):
                continue
            port = (known.first if known else "") or SUGAR if key == SUGAR else key
            if port in inputs:
                message = f"{SUGAR!r} means input {port!r}, which is connected twice"
                self.scope.report(DuplicateKey, message, entry.key.span, help=f"keep one of {SUGAR!r} and {port!r}")
                continue
            spans[port], spans[f"{port}:"] = entry.value.span, entry.key.span
            if key == SUGAR or self.is_port(known, key, entry.value):
                inputs[port] = self.references(port, entry.value, spans)
            else:
                parameters[key] = self.scope.value(entry.value, self.values)
                if entry.value.size <= _LARGEST:
                    spans.update(_places(key, entry.value))
        return inputs, parameters

    def is_port(self, known: Signature | None, key: str, tree: Tree) -> bool:
        """Whether a key is an input port; where nothing tells, whether its value names nodes."""
        items = tree.items if isinstance(tree, Items) else (tree,)
        names = bool(items) and all(isinstance(i, Scalar) and i.text.partition(".")[0] in self.names for i in items)
        return names if known is None else known.is_port(key, names)

    def references(self, port: str, tree: Tree, spans: dict[str, Span]) -> tuple[Ref, ...]:
        """The references of a port: one, or a list."""
        if not isinstance(tree, Items):
            return (self.blocks.reference(tree),)
        for i, item in enumerate(tree.items):
            spans[f"{port}[{i}]"] = item.span
        return tuple(self.blocks.reference(item) for item in tree.items)

    def repeat(self, table: Table, spans: dict[str, Span]) -> Any:
        """The number of copies, unchecked but for mistakes in its formula."""
        tree = table.get("repeat")
        if tree is None:
            return 1
        spans["repeat"] = tree.span
        value = self.scope.value(tree, self.values)
        return 1 if value is UNRESOLVED else value

    def use_block(self, template: Template, known: Signature | None, table: Table, given: dict[str, Any]) -> str:
        """The block made for the parameters that a node gives; keys it does not know are reported here."""
        for key in [k for k in given if known and k not in known.parameters]:
            assert known is not None
            kind, message, help = known.unknown(key, port=False)
            self.scope.report(kind, message, table.entries[key].key.span, "", help)
            del given[key]
        return self.blocks.instance(template, given)
