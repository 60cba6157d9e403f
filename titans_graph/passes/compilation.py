"""The value that passes hand on: a declared graph and everything found out about it so far.

Passes are functions from one :class:`Compilation` to the next; none changes its argument. No torch at module level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx

from titans_graph.errors import Diagnostic, Span
from titans_graph.ir import Graph, Ref
from titans_graph.ir.model import closest
from titans_graph.registry import Component, Site, lookup
from titans_graph.shapes import Stage, Value


@dataclass(frozen=True)
class FlatNode:
    """One component instance after expansion.

    ``name`` is its path (``layers.0.memory``), ``key`` its name inside its block, without the number of a copy, ``instance``
    the path of the block instance it stands in (``layers.0``, empty for the main graph), ``labels`` the references as
    written in the spec (they name the pieces of a sequence). ``lost``: input ports of whose references some mean nothing,
    which is reported elsewhere; such a node is not judged. ``dim``: the feature size that the block declares for its
    first input.
    """

    name: str
    key: str
    use: str
    instance: str
    block: str
    values: Mapping[str, Any]
    inputs: Mapping[str, tuple[Ref, ...]]
    labels: Mapping[str, tuple[str, ...]]
    segment: int | None
    dim: int | None
    lost: frozenset[str] = frozenset()
    span: Span | None = field(default=None, compare=False)
    spans: Mapping[str, Span] = field(default_factory=dict, compare=False)

    @property
    def local(self) -> str:
        """The name inside its block instance."""
        return self.name[len(self.instance) + 1 :] if self.instance else self.name

    @property
    def declared(self) -> str:
        """The name as declared: block and node, the same for every copy."""
        return f"{self.block}.{self.key}" if self.instance else self.key

    @property
    def component(self) -> type[Component]:
        """The component's class."""
        return lookup(self.use)

    def place(self, key: str = "") -> Span | None:
        """The place of a key (port or parameter) in the file, or of the node."""
        return closest(self.spans, key) or self.span


@dataclass(frozen=True)
class Binding:
    """One input of a block instance: what the block declares, what it gets, and where that is written.

    ``instance`` is the path of the block instance (``layers.0``).
    """

    declared: Value
    actual: Ref
    port: str
    block: str
    node: str
    instance: str
    span: Span | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Loop:
    """Nodes on a feedback path (or with a timing of their own that restarts every segment): run segment by segment."""

    nodes: tuple[str, ...]
    period: int


@dataclass(frozen=True)
class Step:
    """One call in a region: a stage of a node."""

    node: str
    stage: Stage


@dataclass(frozen=True)
class Region:
    """A straight run of calls that becomes one function, compiled as a whole.

    ``kind``: ``whole`` runs over the grid of a call, ``loop`` over one segment of ``period`` slots at a time, ``token`` over
    one token. ``inputs`` come from outside, ``outputs`` are read outside; ``states`` are the stateful nodes inside.
    """

    name: str
    kind: str
    instance: str
    steps: tuple[Step, ...]
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]
    states: tuple[str, ...]
    period: int = 0


@dataclass(frozen=True)
class Program:
    """Regions in the order they run."""

    regions: tuple[Region, ...]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: its time in seconds and the compilation after it (None for a pass that was disabled)."""

    name: str
    seconds: float
    after: Compilation | None
    optional: bool = False


@dataclass(frozen=True)
class Compilation:
    """A declared graph on its way to code. Later fields are filled by later passes.

    ``types`` maps every known flat output (and graph input) to its type; ``period`` is the grid alignment in tokens.
    ``broken`` holds (block, node) of declared nodes that have mistakes already: what is left of them is not looked at.
    ``kernels`` maps node name to the kernel chosen for it; ``share`` says whether equal regions share one code object.
    """

    graph: Graph
    diagnostics: tuple[Diagnostic, ...] = ()
    broken: frozenset[tuple[str, str]] = frozenset()
    nodes: Mapping[str, FlatNode] = field(default_factory=dict)
    inputs: Mapping[str, Value] = field(default_factory=dict)
    outputs: Mapping[str, Ref] = field(default_factory=dict)
    bindings: tuple[Binding, ...] = ()
    types: Mapping[Ref, Value] = field(default_factory=dict)
    sites: Mapping[str, Site] = field(default_factory=dict)
    loops: tuple[Loop, ...] = ()
    hoist: bool = False
    period: int = 1
    whole: Program | None = None
    token: Program | None = None
    kernels: Mapping[str, str] = field(default_factory=dict)
    share: bool = False
    lowered: Any = None
    records: tuple[PassRecord, ...] = ()

    def report(self, *found: Diagnostic) -> Compilation:
        """The same compilation with more diagnostics."""
        return replace(self, diagnostics=(*self.diagnostics, *found))

    @property
    def sound(self) -> bool:
        """Whether no error was found so far."""
        return not any(d.severity == "error" for d in self.diagnostics)

    def network(self) -> nx.MultiDiGraph:
        """The flat typed port graph: one node per component instance and graph input, one edge per connection.

        Edge data: ``source`` and ``target`` port, ``index`` in a list port, ``type`` (a Value, or None if unknown).
        """
        net = nx.MultiDiGraph()
        net.add_nodes_from((name, {"type": value}) for name, value in self.inputs.items())
        net.add_nodes_from((name, {"node": node}) for name, node in self.nodes.items())
        for node in self.nodes.values():
            for port, refs in node.inputs.items():
                for index, ref in enumerate(refs):
                    data = {"source": ref.port, "target": port, "index": index, "type": self.types.get(ref)}
                    net.add_edge(ref.node, node.name, **data)
        return net

    def stages(self, name: str) -> tuple[Stage, ...]:
        """The stages of a node whose site is known; none for one that was not inferred."""
        site = self.sites.get(name)
        return self.nodes[name].component.stages(site) if site is not None else ()

    def stage_network(self) -> nx.DiGraph:
        """Calls and what they wait for: nodes are ``(node, stage name)``, edges carry the ``ports`` that connect them."""
        net = nx.DiGraph()
        makers: dict[Ref, tuple[str, str]] = {}
        for name in self.nodes:
            for stage in self.stages(name):
                net.add_node((name, stage.name), stage=stage)
                makers.update({Ref(name, port): (name, stage.name) for port in stage.outputs})
        for name, node in self.nodes.items():
            for stage in self.stages(name):
                for port in stage.inputs:
                    for ref in node.inputs.get(port, ()):
                        if ref in makers:
                            net.add_edge(makers[ref], (name, stage.name), ports=(ref, Ref(name, port)))
        return net
