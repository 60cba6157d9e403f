"""Structural checks of a declared graph: names, ports, parameters, connections; the same for YAML, text and Python.

The first stage after declaring. Types and timing are the passes' business; here everything is checked that needs no
shapes. One mistake gives one diagnostic: what follows from a mistake already reported is not reported again.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from titans_graph import registry
from titans_graph.errors import (
    Diagnostic,
    DuplicateKey,
    LimitExceeded,
    MissingInput,
    Span,
    UnknownComponent,
    UnknownName,
    UnknownPort,
    UnusedNode,
    WrongType,
    in_order,
)
from titans_graph.ir import unused
from titans_graph.ir.hints import ENOUGH, EnoughMistakes, hint, meant
from titans_graph.ir.limits import BLOCK_NAME, MAIN, MAX_DIAGNOSTICS, MAX_REPEAT, NAME, RESERVED
from titans_graph.ir.model import BAD_REF, Block, Graph, Node, Ref
from titans_graph.ir.nesting import nesting_problems, without_circles
from titans_graph.ir.signature import SUGAR, Signature
from titans_graph.ir.signature import of as signature_of
from titans_graph.ir.values import UNRESOLVED, has_unresolved, plain_problem
from titans_graph.registry import parse_parameters
from titans_graph.shapes import UNKNOWN


@dataclass
class Findings:
    """What the checks found out: ``diagnostics``, and which (block, node) pairs have a mistake of their own."""

    diagnostics: list[Diagnostic] = field(default_factory=list)
    broken: set[tuple[str, str]] = field(default_factory=set)
    meant: set[str] = field(default_factory=set)
    """What misspelt ``use`` words probably mean."""
    signatures: dict[str, Signature | None] = field(default_factory=dict)


def validate(graph: Graph) -> list[Diagnostic]:
    """All structural mistakes of a graph by place; empty when it is sound. A last line counts those past 100."""
    return capped(inspect(graph).diagnostics)


def capped(diagnostics: list[Diagnostic]) -> list[Diagnostic]:
    """Diagnostics in order, without repetition, at most 100 and a line that says how many more there are."""
    found = in_order(diagnostics)
    if len(found) <= MAX_DIAGNOSTICS:
        return found
    rest = len(found) - MAX_DIAGNOSTICS
    return [*found[:MAX_DIAGNOSTICS], LimitExceeded(f"{rest} more mistakes are not shown")]


def inspect(
    graph: Graph, *, partial: frozenset[str] = frozenset(), silent: frozenset[tuple[str, str]] = frozenset()
) -> Findings:
    """The checks behind :func:`validate`, uncapped.

    A loader that left things out after reporting them says so: ``partial`` names blocks in which unused things may be
    a consequence, ``silent`` the (block, node) pairs whose ``use`` is already reported.
    """
    findings = Findings(broken=set(silent))
    with contextlib.suppress(EnoughMistakes):
        _inspect(graph, partial, silent, findings)
    findings.diagnostics = in_order(findings.diagnostics)
    return findings


def _inspect(graph: Graph, partial: frozenset[str], silent: frozenset[tuple[str, str]], findings: Findings) -> None:
    blocks = {MAIN: graph.main, **{name: block for name, block in graph.blocks.items() if name != MAIN}}
    doubtful = bool(partial)
    for name, block in graph.blocks.items():
        if name == MAIN:
            message = f"the block name {MAIN!r} is taken by the graph's own nodes"
            findings.diagnostics.append(DuplicateKey(message, block.span, help="give the block another name"))
        elif not BLOCK_NAME.fullmatch(name):
            findings.diagnostics.append(WrongType(f"{name!r} is no name for a block", block.span, help=_NAME_HELP))
    for name, block in blocks.items():
        checker = _BlockCheck(graph, name, block, findings, name in partial)
        checker.run(silent)
        doubtful = doubtful or checker.doubtful_use
    for node_name, problem in nesting_problems(graph):
        findings.diagnostics.append(problem)
        findings.broken.add(node_name)
    if not doubtful:
        findings.diagnostics.extend(unused.unused_blocks(graph, findings.meant))


def prune(graph: Graph, broken: frozenset[tuple[str, str]]) -> Graph | None:
    """The graph without what cannot be followed: references to nothing, values that were not resolved, blocks that
    contain themselves; None where its blocks make more nodes than anybody can look at."""

    def clean(name: str, block: Block) -> Block:
        if not any(where == name for where, _ in broken):
            return block
        known = {*block.inputs, *(n.name for n in block.nodes)}
        nodes = tuple(_pruned(n, known) if (name, n.name) in broken else n for n in block.nodes)
        return replace(block, nodes=nodes, outputs={k: r for k, r in block.outputs.items() if r.node in known})

    blocks = {name: clean(name, block) for name, block in graph.blocks.items()}
    pruned = without_circles(replace(graph, main=clean(MAIN, graph.main), blocks=blocks))
    return None if nesting_problems(pruned) else pruned


def _pruned(node: Node, known: set[str]) -> Node:
    inputs = {port: tuple(r for r in refs if r.node in known) for port, refs in node.inputs.items()}
    parameters = {k: v for k, v in node.parameters.items() if not has_unresolved(v)}
    repeat = node.repeat if repeat_problem(node.repeat) is None else 1
    return replace(node, inputs={p: r for p, r in inputs.items() if r}, parameters=parameters, repeat=repeat)


def repeat_problem(repeat: Any) -> tuple[type[Diagnostic], str] | None:
    """What is wrong with a number of copies, or None."""
    if type(repeat) is not int or repeat < 1:
        return WrongType, f"repeat must be a whole number, at least 1, got {repeat!r:.60}"
    return (LimitExceeded, f"repeat is at most {MAX_REPEAT}, got {repeat}") if repeat > MAX_REPEAT else None


_LARGEST = 2**31
_NAME_HELP = "a name begins with a letter or underscore; letters, digits, '_' and '-' follow"


class _BlockCheck:
    """The checks of one block. ``reads`` collects who reads what, for the search for unused things."""

    def __init__(self, graph: Graph, name: str, block: Block, findings: Findings, partial: bool) -> None:
        self.graph, self.name, self.block, self.findings = graph, name, block, findings
        self.nodes = {n.name: n for n in block.nodes}
        self.names = {*block.inputs, *self.nodes}
        self.reads: dict[str, set[str]] = {n: set() for n in self.names}
        self.read_by_output: set[str] = set()
        self.partial = partial
        # Without readable inputs nobody knows whether an unknown name is one of them.
        self.blind = partial and not block.inputs
        self.doubtful_use = False

    def report(self, kind: type[Diagnostic], message: str, span: Span | None, node: str = "", help: str = "") -> None:
        """Collect one mistake; the node's path is kept only where no place tells it."""
        path = node if self.name == MAIN else f"{self.name}/{node}" if node else self.name
        self.findings.diagnostics.append(kind(message, span, path if span is None else node, help))
        self.findings.broken.add((self.name, node))
        if len(self.findings.diagnostics) > ENOUGH:
            raise EnoughMistakes

    def signature(self, use: str) -> Signature | None:
        """What stands behind ``use``, looked up once."""
        cache = self.findings.signatures
        if use not in cache:
            cache[use] = signature_of(use, self.graph.blocks)
        return cache[use]

    def run(self, silent: frozenset[tuple[str, str]]) -> None:
        """All checks of the block."""
        self.check_names()
        self.check_inputs((self.name, "") in silent)
        for node in self.block.nodes:
            known = self.check_use(node, (self.name, node.name) in silent)
            self.check_parameters(node, known)
            self.check_connections(node, known)
            self.check_repeat(node, known)
        self.check_outputs()
        if not self.partial:
            for name, span, message in unused.unused_names(self.block, self.reads, self.read_by_output):
                self.report(UnusedNode, message, span, name, "connect it, or take it out")

    def check_names(self) -> None:
        """Every name is legal and stands for one thing."""
        for name, count in Counter(n.name for n in self.block.nodes).items():
            span = self.nodes[name].span
            if count > 1 or name in self.block.inputs:
                other = "an input" if name in self.block.inputs else "another node"
                self.report(DuplicateKey, f"{name!r} is already the name of {other}", span, name, "give it another name")
            elif not NAME.fullmatch(name):
                self.report(WrongType, f"{name!r} is no name for a node", span, name, _NAME_HELP)
        for name in (*self.block.inputs, *self.block.outputs):
            if not NAME.fullmatch(name):
                self.report(WrongType, f"{name!r} is no name for a port", self.block.place(name), "", _NAME_HELP)
            elif name in RESERVED and name in self.block.inputs:
                help = "'use', 'in' and 'repeat' are keys of a node"
                self.report(WrongType, f"an input cannot be called {name!r}", self.block.place(name), "", help)

    def check_inputs(self, silent: bool) -> None:
        """Inputs are single pieces of positive size; the segment is a positive number or absent.

        ``silent``: an input may be of a type that is UNKNOWN, because its mistake is reported.
        """
        if not self.block.inputs and not self.blind:
            self.report(MissingInput, "the block has no input", self.block.span, "", "declare one: {x: [B, T, dim]}")
        for name, value in self.block.inputs.items():
            if silent and value == UNKNOWN:
                continue
            sizes: list[Any] = [n for n in (value.dim, *(p.length for p in value.pieces)) if n is not None]
            wrong = [n for n in sizes if not (type(n) is int and 1 <= n <= _LARGEST)]
            if len(value.pieces) != 1:
                message = f"input {name!r} cannot have the type {value.text()}"
                help = "write [B, T] for tokens, [B, T, dim] for features, [n, dim] for n elements beside time"
                self.report(WrongType, message, self.block.place(name), "", help)
            elif wrong:
                message = f"input {name!r} cannot have the size {wrong[0]!r:.60}"
                help = f"a size is a whole number from 1 to {_LARGEST}"
                self.report(WrongType, message, self.block.place(name), "", help)
        segment: Any = self.block.segment
        if segment is not None and not (type(segment) is int and 1 <= segment <= _LARGEST):
            message = f"segment must be a number of tokens, at least 1, got {segment!r}"
            self.report(WrongType, message, self.block.place("segment"))

    def check_use(self, node: Node, silent: bool) -> Signature | None:
        """The signature of what the node uses, or None (reported here unless ``silent``)."""
        if silent:
            self.doubtful_use = True
            return None
        known = self.signature(node.use)
        if known is None:
            help = hint(node.use, {*registry.names(), *self.graph.blocks})
            self.report(UnknownComponent, f"unknown component {node.use!r}", node.place("use"), node.name, help)
            self.doubtful_use = self.doubtful_use or not meant(help)
            self.findings.meant.add(meant(help))
        return known

    def check_parameters(self, node: Node, known: Signature | None) -> None:
        """Values are plain; names, types and ranges are what the component says."""
        for key, value in node.parameters.items():
            problem = plain_problem(value)
            if not problem and has_unresolved(value):
                self.findings.broken.add((self.name, node.name))
            if problem:
                self.report(WrongType, f"parameter {key!r}: {problem}", node.place(key), node.name)
                return
        if known is None:
            return
        strange = [key for key in node.parameters if key not in known.parameters]
        for key in strange:
            kind, message, help = known.unknown(key, port=False)
            self.report(kind, message, node.key_place(key), node.name, help)
        if known.component is None:
            return
        usable = {k: v for k, v in node.parameters.items() if k not in strange and not has_unresolved(v)}
        complete = len(usable) == len(node.parameters)
        near = {known.nearest(key) for key in strange}
        for found in parse_parameters(known.component.Parameters, usable)[1]:
            lacking = next((p for p in known.parameters if found.message.startswith(f"parameter {p!r} is missing")), "")
            if lacking in near or (lacking and node.parameters.get(lacking) is UNRESOLVED) or not (complete or found.key):
                continue
            self.report(found.kind, found.message, node.place(found.key), node.name, found.help)

    def check_connections(self, node: Node, known: Signature | None) -> None:
        """Every connected port exists and gets existing values, every required one is connected."""
        for port, refs in node.inputs.items():
            self.check_port(node, known, port, refs)
            for i, ref in enumerate(refs):
                place = node.spans.get(f"{port}[{i}]") or node.place(port)
                target = self.check_ref(ref, place, node.name)
                if target:
                    self.reads[target].add(node.name)
        if known is None:
            self.partial = self.partial or not any(node.inputs.values())
            return
        keys = (*node.inputs, *node.parameters)
        strange = [key for key in keys if key not in known.inputs and key not in known.parameters]
        meant = {known.nearest(key) for key in strange}
        wrong_port = any(port not in known.inputs for port in node.inputs)
        for name, wanted in known.inputs.items():
            if wanted.required and not node.inputs.get(name) and name not in meant and not wrong_port:
                self.missing(node, known, wanted)
                self.partial = True

    def missing(self, node: Node, known: Signature, port: registry.Port) -> None:
        """Report a required input without a connection."""
        key = f"{SUGAR}: ..." if port.name == known.first else f"{port.name}: ..."
        message = f"input {port.name!r} of {known.label} is not connected ({port.doc})"
        self.report(MissingInput, message, node.span, node.name, f"write {key}")

    def check_port(self, node: Node, known: Signature | None, port: str, refs: tuple[Ref, ...]) -> None:
        """The port exists and takes that many values."""
        if known is None:
            return
        if port not in known.inputs:
            kind, message, help = known.unknown(port, port=True)
            self.report(kind, message, node.key_place(port), node.name, help)
        elif not known.inputs[port].many and len(refs) > 1:
            message = f"input {port!r} of {known.label} takes one value, got {len(refs)}"
            self.report(WrongType, message, node.place(port), node.name, "join them first: add, sequence.concat or a gate")

    def check_ref(self, ref: Ref, place: Span | None, node: str) -> str:
        """The name a reference means (the probable one where it is misspelt), or an empty string."""
        if ref is BAD_REF or (self.blind and ref.node not in self.names):
            self.findings.broken.add((self.name, node))
            self.partial = True
            return ""
        if ref.node not in self.names:
            help = hint(ref.node, self.names)
            self.report(UnknownName, f"unknown name {ref.node!r}", place, node, help)
            self.partial = self.partial or not meant(help)
            return meant(help)
        if ref.port:
            self.check_ref_port(ref, place, node)
        return ref.node

    def check_ref_port(self, ref: Ref, place: Span | None, node: str) -> None:
        """The output port that a reference names exists."""
        if ref.node not in self.nodes:
            self.report(UnknownPort, f"{ref.node!r} is an input and has no ports", place, node, f"write {ref.node}")
            return
        known = self.signature(self.nodes[ref.node].use)
        if known is not None and ref.port not in known.outputs:
            message = f"{known.label} has no output {ref.port!r}"
            self.report(UnknownPort, message, place, node, hint(ref.port, known.outputs))

    def check_repeat(self, node: Node, known: Signature | None) -> None:
        """A repeat is a number in range, and there is a single input to chain the copies through."""
        place, problem = node.place("repeat"), repeat_problem(node.repeat)
        if problem is not None:
            self.report(*problem, place, node.name)
        elif node.repeat > 1 and known is not None and (not known.first or known.inputs[known.first].many):
            message = f"{known.label} cannot repeat: each copy reads the one before through its first input, one value"
            self.report(WrongType, message, place, node.name)

    def check_outputs(self) -> None:
        """There is an output, and outputs name existing values."""
        if not self.block.outputs:
            if not self.partial:
                self.report(MissingInput, "the block has no output", self.block.span, "", "name one: output: y")
            self.partial = True
        for name, ref in self.block.outputs.items():
            target = self.check_ref(ref, self.block.place(f"-> {name}"), "")
            if target:
                self.read_by_output.add(target)
