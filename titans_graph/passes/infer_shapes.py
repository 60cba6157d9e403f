"""Pass ``infer-shapes``: parameters become dataclasses, and every port gets its type.

Types flow along edges until nothing changes, because a feedback path has no first node; then every node is asked once
more with all its inputs known, and what it refuses becomes a diagnostic with the places both values come from.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from titans_graph.errors import Diagnostic, MissingInput, ShapeMismatch
from titans_graph.ir import Ref
from titans_graph.passes.base import Pass
from titans_graph.passes.compilation import Binding, Compilation, FlatNode
from titans_graph.registry import Port, Site, SiteError, parse_parameters, stand_ins
from titans_graph.shapes import UNKNOWN, Value

ACCEPTS = {
    "stream": ("a stream [B, T, dim]", Value.is_stream),
    "ids": ("ids [B, T]", Value.is_ids),
    "fixed": ("elements that belong to no token [n, dim]", Value.is_fixed),
    "sequence": ("features", lambda v: v.dim is not None),
}


@dataclass(frozen=True)
class InferShapes(Pass):
    """Fill ``types``, ``sites`` and ``period``; report what does not fit."""

    name = "infer-shapes"

    def run(self, c: Compilation) -> Compilation:
        """Infer to a fixed point, then check every node."""
        state = _Inference(c)
        state.settle()
        found = state.check()
        periods = [p for name, site in state.sites.items() for p in _periods(c.nodes[name], site)]
        return replace(c, types=state.types, sites=state.sites, period=_lcm(periods)).report(*found)


def _periods(node: FlatNode, site: Site) -> tuple[int, ...]:
    segment = (site.segment,) if site.segment is not None else ()
    return (*node.component.periods(site), *segment)


def _lcm(numbers: list[int]) -> int:
    return math.lcm(*numbers) if numbers else 1


def _fits(actual: Value, declared: Value) -> bool:
    """Whether a block input of one type takes a value of another: sizes agree, names of pieces do not count."""
    lengths = [[piece.length for piece in value.pieces] for value in (actual, declared)]
    return actual.dim == declared.dim and lengths[0] == lengths[1]


class _Inference:
    """The working state of one inference: what is known so far."""

    def __init__(self, c: Compilation) -> None:
        self.c = c
        self.types: dict[Ref, Value] = {Ref(name): value for name, value in c.inputs.items() if value != UNKNOWN}
        self.sites: dict[str, Site] = {}
        self.parameters: dict[str, Any] = {}
        self.found: list[Diagnostic] = []
        self.failed: set[str] = set()
        self.borders = {(b.actual, b.instance): b.declared for b in c.bindings}
        self._parse()

    def _parse(self) -> None:
        for node in self.c.nodes.values():
            if (node.block, node.key) in self.c.broken:
                self.failed.add(node.name)
                continue
            parameters, problems = parse_parameters(node.component.Parameters, node.values)
            if parameters is None:
                self.failed.add(node.name)
                if self.c.sound:  # otherwise validation of the declared graph has said it, in its place
                    self.found += [p.kind(p.message, node.place(p.key), node.declared, p.help) for p in problems]
            self.parameters[node.name] = parameters

    def settle(self) -> None:
        """Let types flow until nothing changes; nodes that refuse what they see stay unknown."""
        nodes = [n for n in self.c.nodes.values() if n.name not in self.failed]
        readers: dict[Ref, list[int]] = {}
        for i, node in enumerate(nodes):
            for ref in {ref for refs in node.inputs.values() for ref in refs}:
                readers.setdefault(ref, []).append(i)
        used = self._users()
        done: set[int] = set()
        sweep = list(range(len(nodes)))
        while sweep:  # in order of declaration, but only those that something new has reached
            heapq.heapify(sweep)
            later: set[int] = set()
            while sweep:
                i = heapq.heappop(sweep)
                fresh, complete = self._infer(nodes[i], used) if i not in done else ((), False)
                done |= {i} if complete else set()
                for reader in (r for ref in fresh for r in readers.get(ref, ())):
                    heapq.heappush(sweep, reader) if reader > i else later.add(reader)
            sweep = list(later)

    def _infer(self, node: FlatNode, used: dict[str, frozenset[str]]) -> tuple[Collection[Ref], bool]:
        """Ask one node for its types: which are new, and whether all are known now."""
        site = self._site(node, used, partial=node.component.partial)
        if site is None or self._bad_ports(node, site):
            return (), False
        try:
            outputs = node.component.infer(site)
        except SiteError:
            return (), False
        new = {Ref(node.name, port): value.named(node.local) for port, value in outputs.items()}
        fresh = {ref: value for ref, value in new.items() if ref not in self.types}
        self.types.update(fresh)
        return fresh, len(new) == len(node.component.outputs)

    def _users(self) -> dict[str, frozenset[str]]:
        used: dict[str, set[str]] = {}
        for node in self.c.nodes.values():
            for refs in node.inputs.values():
                for ref in refs:
                    used.setdefault(ref.node, set()).add(ref.port)
        for ref in self.c.outputs.values():
            used.setdefault(ref.node, set()).add(ref.port)
        return {name: frozenset(ports) for name, ports in used.items()}

    def _site(self, node: FlatNode, used: dict[str, frozenset[str]], *, partial: bool) -> Site | None:
        inputs = {}
        for port, refs in node.inputs.items():
            values = [self._type(ref, node.instance) for ref in refs]
            known = tuple(v.named(label) for v, label in zip(values, node.labels[port], strict=True) if v is not None)
            if len(known) < len(refs) or not refs or port in node.lost:
                if partial:
                    continue
                return None
            inputs[port] = known
        return Site(node.name, self.parameters[node.name], inputs, node.segment, node.dim, used.get(node.name, frozenset()))

    def _type(self, ref: Ref, instance: str) -> Value | None:
        """The type of a value as a block instance sees it: what the block declares, where it is given something else.

        That mistake is reported at the border, and what would follow from it inside is not.
        """
        value = self.types.get(ref)
        path = instance.split(".") if instance and value is not None else []
        for end in range(2, len(path) + 1, 2):  # a block instance adds its node's name and the number of the copy
            declared = self.borders.get((ref, ".".join(path[:end])))
            if value is not None and declared is not None and declared != UNKNOWN and not _fits(value, declared):
                value = declared
        return value

    def check(self) -> list[Diagnostic]:
        """Ask every node whose inputs are known once more; what it refuses is reported."""
        self.found += [problem for b in self.c.bindings if (problem := self._misfit(b)) is not None]
        self.found += self._borders()
        used = self._users()
        for node in self.c.nodes.values():
            if node.name in self.failed:
                self.found += self._refused_beside(node, used)
                continue
            site = self._site(node, used, partial=False)
            if site is None:
                self.found += self._refused_early(node, used)
                continue
            refused = self._refused(node, site)
            self.found += refused
            if not refused:
                self.sites[node.name] = site
        return self.found

    def _refused(self, node: FlatNode, site: Site) -> list[Diagnostic]:
        """What a node says against a site, or the sites of its ports; nothing where it takes it."""
        bad = self._bad_ports(node, site)
        if bad:
            return bad
        try:
            node.component.infer(site)
            node.component.periods(site)
        except SiteError as error:
            unsized = site.dim is None and self._first_input(node) == UNKNOWN
            return [] if unsized else [self._refusal(node, site, error)]
        return []

    def _first_input(self, node: FlatNode) -> Value | None:
        """What the node's block declares for its first input."""
        block = self.c.graph.blocks.get(node.block, self.c.graph.main) if node.instance else self.c.graph.main
        return next(iter(block.inputs.values()), None)

    def _refused_beside(self, node: FlatNode, used: dict[str, frozenset[str]]) -> list[Diagnostic]:
        """What a node with mistakes in its parameters says against others of them, whatever stands in their place."""
        if not node.component.partial and any(p.required and not node.inputs.get(p.name) for p in node.component.inputs):
            return []
        said: list[list[Diagnostic]] = []
        for parameters in stand_ins(node.component.Parameters, node.values):
            self.parameters[node.name] = parameters
            site = self._site(node, used, partial=node.component.partial)
            if site is None or not site.inputs or self._bad_ports(node, site):
                return []
            try:
                node.component.infer(site)
            except SiteError as error:
                own = error.key in node.values and error.kind is not MissingInput
                said.append([self._refusal(node, site, error)] if own else [])
        return said[0] if len(said) == 2 and said[0] == said[1] else []

    def _refused_early(self, node: FlatNode, used: dict[str, frozenset[str]]) -> list[Diagnostic]:
        """What a node on a feedback path refuses of the inputs that are known.

        Its own outputs stay unknown for that, and so do the inputs that come back from them: without this the loop would
        look like one without delay. An input that is not known yet is not one that is missing.
        """
        site = self._site(node, used, partial=True) if node.component.partial else None
        found = self._refused(node, site) if site is not None and site.inputs else []
        return [d for d in found if not isinstance(d, MissingInput)]

    def _borders(self) -> list[Diagnostic]:
        """What a model reads and gives: one input with time, outputs of one piece with time."""
        main = self.c.graph.main
        found: list[Diagnostic] = []
        for name in list(self.c.inputs)[1:]:
            help = "join the streams outside, or give the model one input"
            found.append(ShapeMismatch(f"a model has one input, {name!r} is another", main.place(name), name, help))
        for name, value in self.c.inputs.items():
            if not value.timed and value != UNKNOWN:
                found.append(ShapeMismatch(f"input {name!r} {value.text()} has no time axis", main.place(name), name))
        for name, ref in self.c.outputs.items():
            given = self.types.get(ref)
            if given is not None and not (len(given.pieces) == 1 and given.timed):
                message = f"output {name!r} must be one stream [B, T, dim], got {given.text()}"
                place = main.place(f"-> {name}")
                found.append(ShapeMismatch(message, place, name, "pick one piece with sequence.slice"))
        return found

    def _misfit(self, binding: Binding) -> Diagnostic | None:
        outside = binding.instance.rsplit(".", 2)[0] if binding.instance.count(".") > 1 else ""
        actual, declared = self._type(binding.actual, outside), binding.declared
        if actual is None or declared == UNKNOWN or _fits(actual, declared):
            return None
        source = self.c.nodes.get(binding.actual.node)
        origin = f"{source.declared!r}" if source is not None else f"graph input {binding.actual.node!r}"
        message = (
            f"input {binding.port!r} of block {binding.block!r} is declared {declared.text()}, "
            f"got {actual.text()} from {origin}"
        )
        return ShapeMismatch(message, binding.span, binding.node)

    def _bad_ports(self, node: FlatNode, site: Site) -> list[Diagnostic]:
        found: list[Diagnostic] = []
        for port in node.component.inputs:
            for index, value in enumerate(site.inputs.get(port.name, ())):
                wanted, fits = ACCEPTS[port.accepts]
                if not fits(value):
                    found.append(self._bad_port(node, port, index, value, wanted))
        return found

    def _bad_port(self, node: FlatNode, port: Port, index: int, value: Value, wanted: str) -> Diagnostic:
        message = (
            f"input {port.name!r} of {node.use} needs {wanted}, got {value.text()} from {self._origin(node, port.name, index)}"
        )
        help = "pick one piece with sequence.slice" if len(value.pieces) > 1 else ""
        return ShapeMismatch(message, node.place(port.name), node.declared, help)

    def _origin(self, node: FlatNode, port: str, index: int) -> str:
        label = node.labels[port][index]
        ref = node.inputs[port][index]
        source = self.c.nodes.get(ref.node)
        if source is None:
            return f"graph input {label!r}"
        place = source.span
        return f"{label!r}" + (f" ({place.file}:{place.line})" if place is not None else "")

    def _refusal(self, node: FlatNode, site: Site, error: SiteError) -> Diagnostic:
        message = error.message
        if error.kind is ShapeMismatch:
            sources = [
                f"{port} {value.text()} from {self._origin(node, port, index)}"
                for port, values in site.inputs.items()
                for index, value in enumerate(values)
            ]
            message += " (" + "; ".join(sources) + ")" if sources else ""
        return error.kind(message, node.place(error.key), node.declared, error.help)
