"""Pass ``expand``: blocks and repetitions become component instances with paths (``layers.0.memory``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from titans_graph.errors import AlgebraicLoop, Diagnostic
from titans_graph.ir import Block, Graph, Node, Ref
from titans_graph.ir.nesting import copies
from titans_graph.passes.base import Pass
from titans_graph.passes.compilation import Binding, Compilation, FlatNode
from titans_graph.registry import known, lookup


@dataclass(frozen=True)
class Expand(Pass):
    """Every use of a block is replaced by the block's nodes; references are followed through block borders.

    Blocks hold no circle, and their depth and the number of copies are bounded: validation of the declared graph sees to it.
    """

    name = "expand"

    def run(self, c: Compilation) -> Compilation:
        """Fill ``nodes``, ``inputs`` and ``outputs``."""
        main = c.graph.main
        shared = _Shared()
        scope = _Scope(c.graph, main, "", None, None, shared)
        nodes = {n.name: n for n in scope.flatten()}
        outputs = {name: found for name, ref in main.outputs.items() if (found := scope.resolve(ref)) is not None}
        bindings = tuple(scope.bindings())
        expanded = replace(c, nodes=nodes, inputs=dict(main.inputs), outputs=outputs, bindings=bindings)
        return expanded.report(*shared.problems)

    def check_after(self, c: Compilation) -> None:
        """Only components are left, every reference names a node or a graph input."""
        for node in c.nodes.values():
            assert known(node.use), node.use
            for refs in node.inputs.values():
                assert all(ref.node in c.nodes or ref.node in c.inputs for ref in refs), node.name


class _Shared:
    """What all scopes of one expansion share: where references end, nodes by name, and mistakes found on the way."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, Ref], Ref | None] = {}
        self.problems: dict[Diagnostic, None] = {}
        self._nodes: dict[int, dict[str, Node]] = {}

    def report(self, problem: Diagnostic) -> None:
        """Collect one mistake, once."""
        self.problems[problem] = None

    def node(self, block: Block, name: str) -> Node | None:
        """A node of a block; blocks are told apart by identity, and live as long as their graph."""
        if id(block) not in self._nodes:
            self._nodes[id(block)] = {n.name: n for n in reversed(block.nodes)}
        return self._nodes[id(block)].get(name)


@dataclass(frozen=True)
class _Scope:
    """One block instance: where its inputs come from is asked of the scope around it."""

    graph: Graph
    block: Block
    path: str
    parent: _Scope | None
    inputs: Mapping[str, Ref] | None
    shared: _Shared

    def flatten(self) -> list[FlatNode]:
        found: list[FlatNode] = []
        for node in self.block.nodes:
            for copy in range(copies(node)):
                if known(node.use):
                    found.append(self._leaf(node, copy))
                elif node.use in self.graph.blocks:
                    found.extend(self._inner(node, copy).flatten())
        return found

    def bindings(self) -> list[Binding]:
        """What every block instance inside this scope gets at its inputs."""
        found: list[Binding] = []
        for node in self.block.nodes:
            if known(node.use) or node.use not in self.graph.blocks:
                continue
            for copy in range(copies(node)):
                inner = self._inner(node, copy)
                for port, declared in inner.block.inputs.items():
                    actual = inner.resolve(Ref(port))
                    if actual is not None:
                        name = f"{self.block.name}.{node.name}" if self.path else node.name
                        found.append(Binding(declared, actual, port, inner.block.name, name, inner.path, node.place(port)))
                found.extend(inner.bindings())
        return found

    def _name(self, node: Node, copy: int) -> str:
        local = f"{node.name}.{copy}" if copies(node) > 1 or not known(node.use) else node.name
        return f"{self.path}.{local}" if self.path else local

    def _leaf(self, node: Node, copy: int) -> FlatNode:
        first = next(iter(lookup(node.use).inputs), None)
        inputs: dict[str, tuple[Ref, ...]] = {}
        labels: dict[str, tuple[str, ...]] = {}
        lost: set[str] = set()
        for port, refs in node.inputs.items():
            if copy and first is not None and port == first.name:
                inputs[port] = (Ref(self._name(node, copy - 1), self._first_output(node)),)
                labels[port] = (f"{node.name}.{copy - 1}",)
                continue
            pairs = [(found, ref.text()) for ref in refs if (found := self.resolve(ref)) is not None]
            inputs[port] = tuple(found for found, _ in pairs)
            labels[port] = tuple(label for _, label in pairs)
            lost |= {port} if len(pairs) < len(refs) else set()
        own = next(iter(self.block.inputs.values()), None)
        return FlatNode(
            name=self._name(node, copy),
            key=node.name,
            use=node.use,
            instance=self.path,
            block=self.block.name,
            values=node.parameters,
            inputs=inputs,
            labels=labels,
            segment=self.block.segment,
            dim=own.dim if own is not None else None,
            lost=frozenset(lost),
            span=node.span,
            spans=node.spans,
        )

    def _inner(self, node: Node, copy: int) -> _Scope:
        block = self.graph.blocks[node.use]
        inputs = {port: refs[0] for port, refs in node.inputs.items() if refs}
        first = next(iter(block.inputs), None)
        if copy and first is not None:
            inputs[first] = Ref(f"{node.name}#{copy - 1}")
        return _Scope(self.graph, block, self._name(node, copy), self, inputs, self.shared)

    @staticmethod
    def _first_output(node: Node) -> str:
        return lookup(node.use).outputs[0].name

    def resolve(self, ref: Ref) -> Ref | None:
        """The component output or graph input behind a reference; None where it is broken (reported elsewhere).

        Every reference of every instance is followed once, without recursion: passing through thousands of copies of a
        block that hands its input on is a long way.
        """
        found, way = self.shared.found, dict[tuple[str, Ref], None]()
        step: _Scope | Ref | None = self
        at = ref
        while isinstance(step, _Scope):
            key = (step.path, at)
            if key in found:
                step = found[key]
                break
            if key in way:
                self.shared.report(AlgebraicLoop(f"{ref.text()!r} is connected only to itself", step.block.span))
                step = None
                break
            way[key] = None
            step, at = step._follow(at)
        found.update(dict.fromkeys(way, step))
        return step

    def _follow(self, ref: Ref) -> tuple[_Scope | Ref | None, Ref]:
        """One step behind a reference: the end of the way, or the scope in which to look for another reference."""
        if ref.node in self.block.inputs:
            if self.parent is None:
                return Ref(ref.node), ref
            source = (self.inputs or {}).get(ref.node)
            return (None, ref) if source is None else (self.parent, source)
        name, _, copied = ref.node.partition("#")
        node = self.shared.node(self.block, name)
        if node is None:
            return None, ref
        copy = int(copied) if copied else copies(node) - 1
        if known(node.use):
            return Ref(self._name(node, copy), ref.port or self._first_output(node)), ref
        if node.use not in self.graph.blocks:
            return None, ref
        inner = self._inner(node, copy)
        found = inner.block.outputs.get(ref.port or next(iter(inner.block.outputs), ""))
        return (None, ref) if found is None else (inner, found)
