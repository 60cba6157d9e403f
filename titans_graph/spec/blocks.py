"""Blocks of a spec: from trees to ``graph.Block``, one for every set of parameters they are used with."""

from __future__ import annotations

import functools
import json
import re
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from titans_graph import registry
from titans_graph.errors import (
    DuplicateKey,
    IdleOverride,
    LimitExceeded,
    MissingKey,
    Span,
    UnknownKey,
    UnusedParameter,
    WrongType,
)
from titans_graph.ir.hints import hint, nearest
from titans_graph.ir.limits import MAIN, MAX_BLOCKS, MAX_ELEMENTS, NAME
from titans_graph.ir.model import BAD_REF, Block, Ref
from titans_graph.ir.nesting import back_edges
from titans_graph.ir.signature import Signature
from titans_graph.ir.values import UNRESOLVED
from titans_graph.registry import Port
from titans_graph.shapes import UNKNOWN, Value
from titans_graph.spec.nodes import NodeReader
from titans_graph.spec.scope import Scope, TooMuch, axis_names, below, mentioned
from titans_graph.spec.shape import shape
from titans_graph.spec.tree import Entry, Items, Scalar, Table, Tree

KEYS = ("parameters", "input", "segment", "nodes", "output")
"""Keys of a block."""
_REFERENCE = re.compile(rf"{NAME.pattern}(\.{NAME.pattern})?")


@dataclass(frozen=True)
class Template:
    """A block as written: its tree, and the names a use of it can set."""

    name: str
    table: Table | None
    span: Span
    own: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, entry: Entry) -> Template:
        """The template behind one entry of ``blocks:``."""
        table = entry.value if isinstance(entry.value, Table) else None
        return cls(name, table, entry.key.span, _keys(table, "parameters"), _keys(table, "input"))

    def check_names(self, scope: Scope) -> None:
        """Report names that a use of the block could not tell apart."""
        for name in set(self.own) & set(self.inputs):
            table = self.table.get("parameters") if self.table else None
            assert isinstance(table, Table)
            message = f"{name!r} is both an input and a parameter of block {self.name!r}"
            scope.report(DuplicateKey, message, table.entries[name].key.span, help="give the parameter another name")

    @functools.cached_property
    def signature(self) -> Signature:
        """Ports and parameters a node that uses the block can have."""
        ports = {name: Port(name, "input of the block", accepts="sequence") for name in self.inputs}
        return Signature(f"block {self.name!r}", ports, (), self.own)


def _keys(table: Table | None, key: str) -> tuple[str, ...]:
    inner = table.get(key) if table else None
    return tuple(inner.entries) if isinstance(inner, Table) else ()


@dataclass
class Blocks:
    """All blocks of a spec, made as they are used. ``made`` is the result, in order of first use."""

    scope: Scope
    values: Mapping[str, Any]
    templates: Mapping[str, Template]
    made: dict[str, Block] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    silent: set[tuple[str, str]] = field(default_factory=set)
    instances: dict[tuple[str, str], str] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    queue: deque[tuple[str, Template, Mapping[str, Any]]] = field(default_factory=deque)
    circles: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        uses = {name: [u for u in _uses(t.table) if u in self.templates] for name, t in self.templates.items()}
        self.circles = back_edges(uses)

    def finish(self) -> None:
        """Make every block that is waiting, then those nobody uses (so that their mistakes are found too)."""
        self.drain()
        for name, template in self.templates.items():
            if template.table is not None and name not in self.numbers:
                self.instance(template, {})
                self.drain()

    def drain(self) -> None:
        """Make the blocks that are waiting; TooMuch where they are too many."""
        while self.queue:
            name, template, values = self.queue.popleft()
            assert template.table is not None
            self.made[name] = self.block(name, template.name, template.table, template.span, values)

    def instance(self, template: Template, given: Mapping[str, Any]) -> str:
        """The name of the block for one set of parameters; the first keeps the template's name, then ``name.2``."""
        table = template.table
        own = self.scope.parameters(table.get("parameters") if table else None, self.values, given)
        key = (template.name, json.dumps(own, default=repr))
        if key not in self.instances:
            name = self.fresh(template.name)
            self.instances[key] = name
            self.queue.append((name, template, below(own, self.values)))
        return self.instances[key]

    def fresh(self, name: str) -> str:
        """An unused block name."""
        number = self.numbers.get(name, 0) + 1
        while number > 1 and (f"{name}.{number}" in self.templates or registry.known(f"{name}.{number}")):
            number += 1
        self.numbers[name] = number
        return f"{name}.{number}" if number > 1 else name

    def block(self, name: str, origin: str, table: Table, span: Span, values: Mapping[str, Any]) -> Block:
        """One block from its tree; ``origin`` is the name it is written under."""
        nodes = table.get("nodes")
        entries = nodes.entries if isinstance(nodes, Table) else {}
        if not isinstance(nodes, Table):
            self.lacks(name, "nodes", nodes, span, table, "nodes: {normed: {use: norm.rms, in: x}}")
        self.count += len(entries)
        if self.count > MAX_ELEMENTS or len(self.instances) > MAX_BLOCKS:
            message = f"blocks make more than {MAX_BLOCKS} blocks or {MAX_ELEMENTS} nodes"
            self.scope.report(LimitExceeded, message, span)
            raise TooMuch
        spans: dict[str, Span] = {}
        inputs = self.inputs(name, table, span, values, spans)
        reader = NodeReader(self, name, origin, {*entries, *inputs}, values)
        made = tuple(reader.node(entry) for entry in entries.values())
        outputs = self.outputs(name, table, span, spans)
        return Block(name, inputs, made, outputs, self.segment(table, values, spans), span, spans)

    def lacks(self, name: str, key: str, tree: Tree | None, span: Span, table: Table, help: str) -> None:
        """Report a key that is missing (unless a misspelt one stands for it) or not what it should be."""
        self.partial.add(name)
        if tree is not None and not (isinstance(tree, Scalar) and tree.value is None):
            self.scope.report(WrongType, f"{key} is a mapping", tree.span, help=f"write {help}")
            return
        strange = [k for k in table.entries if k not in KEYS]
        if not any(nearest(k, [key]) for k in strange):
            what = "spec" if name == MAIN else f"block {name!r}"
            self.scope.report(MissingKey, f"the {what} has no {key!r}", span, help=f"write {help}")

    def inputs(
        self, name: str, table: Table, span: Span, values: Mapping[str, Any], spans: dict[str, Span]
    ) -> dict[str, Value]:
        """The inputs of a block with their types."""
        tree = table.get("input")
        if not isinstance(tree, Table):
            self.lacks(name, "input", tree, span, table, "input: {x: [B, T, $dim]}")
            return {}
        found = {}
        for key, entry in tree.entries.items():
            spans[key] = entry.value.span
            axes = entry.value.items if isinstance(entry.value, Items) else ()
            written = [(a.value if isinstance(a, Scalar) else a, a.span) for a in axes]
            value = shape(self.scope, key, written, entry.value.span, values)
            if value is None:
                self.silent.add((name, ""))
            found[key] = value or UNKNOWN
        return found

    def segment(self, table: Table, values: Mapping[str, Any], spans: dict[str, Span]) -> int | None:
        """The segment, None where there is none or its mistake is reported."""
        tree = table.get("segment")
        if tree is None:
            return None
        spans["segment"] = tree.span
        value = self.scope.value(tree, values)
        if value is None or value is UNRESOLVED:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            message = f"segment must be a number of tokens, at least 1, got {value!r:.60}"
            self.scope.report(WrongType, message, tree.span)
            return None
        return value

    def outputs(self, name: str, table: Table, span: Span, spans: dict[str, Span]) -> dict[str, Ref]:
        """The outputs: a single reference is named after the node or port it means."""
        tree = table.get("output")
        if tree is None or (isinstance(tree, Scalar) and tree.value is None):
            self.lacks(name, "output", None, span, table, "output: y")
            return {}
        if not isinstance(tree, Table):
            ref = self.reference(tree)
            key = ref.port or ref.node
            spans[f"-> {key}"] = tree.span
            return {key if ref is not BAD_REF else "out": ref}
        for key, entry in tree.entries.items():
            spans[f"-> {key}"] = entry.value.span
        return {key: self.reference(entry.value) for key, entry in tree.entries.items()}

    def reference(self, tree: Tree) -> Ref:
        """``name`` or ``name.port``; BAD_REF where it is neither."""
        if isinstance(tree, Scalar) and _REFERENCE.fullmatch(tree.text):
            node, _, port = tree.text.partition(".")
            return Ref(node, port)
        got = f", got {tree.text!r:.60}" if isinstance(tree, Scalar) else ""
        self.scope.report(WrongType, f"expected a reference{got}", tree.span, help="write a name or name.port")
        return BAD_REF


def _uses(table: Table | None) -> list[str]:
    """The ``use`` words of a block's nodes."""
    nodes = table.get("nodes") if table else None
    entries = nodes.entries.values() if isinstance(nodes, Table) else ()
    uses = [entry.value.get("use") for entry in entries if isinstance(entry.value, Table)]
    return [use.text for use in uses if isinstance(use, Scalar)]


def check_keys(scope: Scope, table: Table, known: tuple[str, ...]) -> None:
    """Report keys that the language does not know."""
    for key, entry in table.entries.items():
        if key not in known:
            scope.report(UnknownKey, f"unknown key {key!r}", entry.key.span, help=hint(key, known))


def check_parameters(scope: Scope, table: Table, own: tuple[str, ...], extra: set[str]) -> None:
    """Report parameters of a spec or block that nothing in it mentions; ``extra`` is mentioned elsewhere."""
    tree = table.get("parameters")
    if not isinstance(tree, Table):
        return
    used = {*mentions(table), *extra, *scope.meant, *_keys(table, "input")}
    for name in own:
        if name not in used:
            message, help = f"parameter {name!r} is never used", f"write ${name} where it belongs, or take it out"
            scope.report(UnusedParameter, message, tree.entries[name].key.span, help=help)


def check_overrides(scope: Scope, table: Table, own: Table, given: Collection[str], extra: set[str]) -> None:
    """Report ``given`` parameters of a spec that only the defaults of other given ones read; ``extra`` is read elsewhere."""
    readers = {name: mentioned([entry.value]) for name, entry in own.entries.items()}

    def reached(names: Iterable[str]) -> set[str]:
        """What is read by ``names``, and by the defaults of those that have not been given."""
        found, waiting = set[str](), list(names)
        while waiting:
            name = waiting.pop()
            if name not in found and name not in given:
                waiting.extend(readers.get(name, ()))
            found.add(name)
        return found

    read = reached({*_mentions(table, "input", "segment", "nodes"), *axis_names(table.get("input")), *extra})
    for name in (name for name in given if name in readers and name not in read):
        for other in (other for other in given if name in reached(readers.get(other, ()))):
            message = f"override of parameter {name!r} has no effect: only the default of {other!r} reads it"
            help = f"{other!r} is overridden as well: leave out one of the two"
            scope.report(IdleOverride, message, own.entries[name].key.span, help=help)
            break


def _mentions(table: Table, *keys: str) -> set[str]:
    return mentioned([table.get(key) for key in keys])


def mentions(table: Table) -> set[str]:
    """The parameters that the tree of a spec or block mentions."""
    return _mentions(table, "parameters", "input", "segment", "nodes") | axis_names(table.get("input"))
