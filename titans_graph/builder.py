"""Declaring a graph in Python, call by call; the same graph, checks and messages as for a spec file.

Stands after :mod:`titans_graph.spec`, whose formulas and axes it shares. Nothing is looked up before the graph is asked
for, so that calls may come in any order.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from titans_graph.errors import (
    Diagnostic,
    DuplicateKey,
    SpecError,
    UnknownName,
    UnusedParameter,
    UsageError,
    WrongType,
    raise_errors,
)
from titans_graph.ir.hints import EnoughMistakes, hint
from titans_graph.ir.limits import MAIN, NAME
from titans_graph.ir.model import BAD_REF, Block, Graph, Node, Ref
from titans_graph.ir.signature import SUGAR, Signature
from titans_graph.ir.signature import of as signature_of
from titans_graph.ir.validate import capped, inspect
from titans_graph.ir.values import UNRESOLVED, plain, plain_problem
from titans_graph.shapes import Value, ids
from titans_graph.spec.formula import names as formula_names
from titans_graph.spec.scope import Scope
from titans_graph.spec.shape import shape

_REFERENCE = re.compile(rf"{NAME.pattern}(\.{NAME.pattern})?")


@dataclass(frozen=True, eq=False)
class Handle:
    """A value in a graph under construction: what a node or input gives. Attributes are the node's other outputs."""

    _owner: Builder = field(repr=False)
    _ref: Ref

    def __getattr__(self, port: str) -> Handle:
        """The output ``port`` of the same node."""
        if port.startswith("_") or self._ref.port:
            raise AttributeError(port)
        return Handle(self._owner, Ref(self._ref.node, port))


Source = Handle | str | Sequence[Handle | str]
"""What an input can be connected to: a handle, ``"name"`` or ``"name.port"``, or a list of those."""


@dataclass
class _Use:
    """One call of ``add``, with what ``connect`` brought later."""

    name: str
    use: str
    sources: tuple[Source, ...]
    keys: dict[str, Any]
    repeat: int | str


class Builder:
    """Builds a graph; ``parameters`` are names for sizes, used as axes (``"dim"``) and in formulas (``"$dim * 4"``).

    Mistakes are collected: :meth:`check` lists them, :meth:`build` raises SpecError with all of them.
    """

    def __init__(self, name: str = "model", segment: int | None = None, **parameters: Any) -> None:
        self.name, self.segment = name, segment
        self.parameters: Mapping[str, Any] = parameters
        self._root = self
        self._blocks: dict[str, Builder] = {}
        self._inputs: dict[str, Sequence[int | str]] = {}
        self._uses: list[_Use] = []
        self._outputs: list[tuple[str, Source]] = []
        self._mistakes: list[Diagnostic] = []

    def input(self, name: str, axes: Sequence[int | str]) -> Handle:
        """Declare an input: ``["B", "T"]`` tokens, ``["B", "T", dim]`` features, ``[n, dim]`` elements beside time."""
        if name in self._inputs:
            self._mistake(DuplicateKey, f"{name!r} is already the name of an input", name, "give it another name")
        self._inputs[name] = axes
        return Handle(self, Ref(name))

    def add(self, use: str | Builder, *sources: Source, name: str | None = None, repeat: int | str = 1, **keys: Any) -> Handle:
        """Add a node that uses a component or block. ``sources`` go to its first input.

        Keywords whose values are handles (or lists of handles) are input ports, all others parameters. ``repeat``
        chains copies. Without a name the node is called after what it uses.
        """
        word = use.name if isinstance(use, Builder) else use
        if not isinstance(cast(Any, word), str):
            raise UsageError(f"add(use, *sources, ...) takes the id of a component or a block first, got {word!r:.60}")
        chosen = self._fresh(word) if name is None else name
        self._uses.append(_Use(chosen, word, sources, keys, repeat))
        return Handle(self, Ref(chosen))

    def connect(self, node: Handle | str, **ports: Source) -> None:
        """Connect further inputs of a node added before: the way to close a feedback loop."""
        name = node._ref.node if isinstance(node, Handle) else node
        found = next((use for use in self._uses if use.name == name), None)
        if found is None:
            known = [use.name for use in self._uses]
            self._mistake(UnknownName, f"unknown name {name!r}", name, hint(name, known))
            return
        for port, source in ports.items():
            if port in found.keys:
                self._mistake(DuplicateKey, f"input {port!r} is connected twice", name, "connect it once")
            found.keys[port] = [source] if isinstance(source, str) else source
            if isinstance(source, str):
                found.keys[port] = Handle(self, self._parsed(source, name))

    def block(self, name: str, segment: int | None = None) -> Builder:
        """A builder for a block, which nodes then use by its name; it shares the parameters of this builder."""
        made = Builder(name, segment)
        made._root = self._root
        made.parameters = self._root.parameters
        if name in self._root._blocks:
            self._mistake(DuplicateKey, f"{name!r} is already the name of a block", name, "give it another name")
        self._root._blocks[name] = made
        return made

    def output(self, *values: Source, **named: Source) -> None:
        """Declare outputs; those without a name are called after their node or port."""
        for value in values:
            ref = value._ref if isinstance(value, Handle) else Ref(*str(value).partition(".")[::2])
            self._outputs.append((ref.port or ref.node, value))
        self._outputs.extend(named.items())

    def graph(self) -> Graph:
        """The declared graph; SpecError where a call was mistaken (:meth:`check` looks at the graph as well)."""
        graph, problems, _ = self._declare()
        if problems:
            raise SpecError(capped(problems))
        return graph

    def check(self) -> list[Diagnostic]:
        """All mistakes, those of the calls and those of the graph; empty when it is sound."""
        graph, problems, partial = self._declare()
        return capped([*problems, *inspect(graph, partial=partial).diagnostics])

    def build(self, **options: Any) -> Any:
        """The model; options as for ``titans_graph.build``. SpecError with all mistakes."""
        raise_errors(self.check())
        return importlib.import_module("titans_graph").build(self.graph(), **options)

    def _mistake(self, kind: type[Diagnostic], message: str, node: str, help: str = "") -> None:
        where = node if self is self._root else f"{self.name}/{node}"
        self._mistakes.append(kind(message, None, where, help))

    def _fresh(self, use: str) -> str:
        """A name after what a node uses that no other has: ``norm_rms``, ``norm_rms_2``."""
        stem = re.sub(r"[^\w-]", "_", use)
        stem = stem if NAME.fullmatch(stem) else f"n_{stem}"
        taken = {*self._inputs, *(u.name for u in self._uses)}
        number = 1
        while (chosen := stem if number == 1 else f"{stem}_{number}") in taken:
            number += 1
        return chosen

    def _parsed(self, text: str, node: str) -> Ref:
        """A reference from text; BAD_REF where it is none."""
        if not _REFERENCE.fullmatch(text):
            self._mistake(WrongType, f"expected a reference, got {text!r:.60}", node, "write a name or name.port")
            return BAD_REF
        return Ref(*text.partition(".")[::2])

    def _declare(self) -> tuple[Graph, list[Diagnostic], frozenset[str]]:
        """The graph, the mistakes of the calls, and the blocks that have some."""
        if self._root is not self:
            raise UsageError(f"{self.name!r} is a block; ask the builder that it was made by")
        parts = {MAIN: self, **self._blocks}
        makers = {name: _Maker(part, name) for name, part in parts.items()}
        frames = {name: maker.frame() for name, maker in makers.items()}
        made = {name: maker.block(frames) for name, maker in makers.items()}
        problems = [p for maker in makers.values() for p in maker.problems()]
        mentioned = {n for maker in makers.values() for n in maker.mentioned}
        for name in self.parameters:
            if name not in mentioned:
                help = f"write {name!r} as an axis or ${name} in a value, or take it out"
                problems.append(UnusedParameter(f"parameter {name!r} is never used", help=help))
        partial = frozenset(name for name, maker in makers.items() if maker.problems())
        main = made.pop(MAIN)
        return Graph(self.name, main, made), problems, partial


class _Maker:
    """Makes one block from a builder's calls; run anew each time the graph is asked for."""

    def __init__(self, builder: Builder, name: str) -> None:
        self.builder, self.name = builder, name
        self.scope = Scope()
        self.late: list[Diagnostic] = []
        self.mentioned: set[str] = set()

    def problems(self) -> list[Diagnostic]:
        """The mistakes of the block's calls."""
        return [*self.builder._mistakes, *self.scope.problems, *self.late]

    def report(self, kind: type[Diagnostic], message: str, node: str, help: str = "") -> None:
        """Collect one mistake of a node."""
        where = node if self.name == MAIN else f"{self.name}/{node}"
        self.late.append(kind(message, None, where, help))

    def frame(self) -> Block:
        """The block without nodes: enough to know its ports."""
        inputs = {name: self.input(name, axes) for name, axes in self.builder._inputs.items()}
        outputs = {name: BAD_REF for name, _ in self.builder._outputs}
        return Block(self.name, inputs, (), outputs, self.builder.segment)

    def input(self, name: str, axes: Sequence[int | str]) -> Value:
        """The type of one input."""
        listed = list(axes) if isinstance(axes, list | tuple) else []
        for axis in listed:
            self.mentioned.update([axis, *formula_names(axis)] if isinstance(axis, str) else ())
        try:
            found = shape(self.scope, name, [(axis, None) for axis in listed], None, self.builder.parameters)
        except EnoughMistakes:
            found = None
        self.mentioned |= self.scope.meant
        return found or ids(name)

    def block(self, frames: Mapping[str, Block]) -> Block:
        """The finished block; ``frames`` tell the ports of the others."""
        blocks = {name: frame for name, frame in frames.items() if name != MAIN}
        nodes = tuple(self.node(use, signature_of(use.use, blocks)) for use in self.builder._uses)
        outputs: dict[str, Ref] = {}
        for name, source in self.builder._outputs:
            refs = self.refs(source, "")
            if len(refs) != 1 or name in outputs:
                kind = DuplicateKey if name in outputs else WrongType
                self.report(kind, f"output {name!r} is declared twice" if name in outputs else _ONE, "")
            outputs[name] = next(iter(refs), BAD_REF)
        frame = frames[self.name]
        return Block(frame.name, frame.inputs, nodes, outputs, frame.segment)

    def node(self, use: _Use, known: Signature | None) -> Node:
        """One node: keywords sorted into ports and parameters."""
        inputs: dict[str, tuple[Ref, ...]] = {}
        parameters: dict[str, Any] = {}
        if use.sources:
            first = (known.first if known else "") or SUGAR
            inputs[first] = tuple(ref for source in use.sources for ref in self.refs(source, use.name))
        for key, value in use.keys.items():
            if not _names_nodes(value) and not (known and key in known.inputs):
                parameters[key] = self.value(key, value, use.name)
            elif key in inputs:
                self.report(DuplicateKey, f"input {key!r} is connected twice", use.name, "connect it once")
            else:
                inputs[key] = self.refs(value, use.name)
        repeat = self.evaluated(use.repeat, use.name)
        return Node(use.name, use.use, parameters, inputs, 1 if repeat is UNRESOLVED else repeat)

    def value(self, key: str, value: Any, node: str) -> Any:
        """A parameter's value, formulas evaluated; UNRESOLVED where it is no plain value (reported)."""
        problem = plain_problem(value, tuples=True)
        if problem:
            self.report(WrongType, f"parameter {key!r}: {problem}", node)
            return UNRESOLVED
        return self.evaluated(plain(value), node)

    def evaluated(self, value: Any, node: str) -> Any:
        """The same value with formulas replaced by what they give."""
        if isinstance(value, dict):
            return {key: self.evaluated(item, node) for key, item in value.items()}
        if isinstance(value, list):
            return [self.evaluated(item, node) for item in value]
        if not isinstance(value, str):
            return value
        self.mentioned.update(formula_names(value))
        where = node if self.name == MAIN else f"{self.name}/{node}"
        result = self.scope.formula(value, None, self.builder.parameters, where)
        self.mentioned |= self.scope.meant
        return result

    def refs(self, source: Any, node: str) -> tuple[Ref, ...]:
        """References from a handle, a text or a list of them."""
        items = source if isinstance(source, list | tuple) else (source,)
        return tuple(self.ref(item, node) for item in items)

    def ref(self, item: Any, node: str) -> Ref:
        """One reference; BAD_REF where it is none or belongs to another block."""
        if isinstance(item, str) and _REFERENCE.fullmatch(item):
            return Ref(*item.partition(".")[::2])
        if not isinstance(item, Handle):
            self.report(WrongType, f"expected a reference, got {item!r:.60}", node, "write a name or name.port")
            return BAD_REF
        if item._owner is not self.builder:
            message = f"{item._ref.text()!r} belongs to {item._owner.name!r}, not to {self.builder.name!r}"
            self.report(UnknownName, message, node, "a block sees other values only through its inputs")
            return BAD_REF
        return item._ref


_ONE = "an output is one value"


def _names_nodes(value: Any) -> bool:
    """Whether a keyword's value is a connection: a handle, or a list with one in it."""
    return isinstance(value, Handle) or (isinstance(value, list | tuple) and any(isinstance(v, Handle) for v in value))
