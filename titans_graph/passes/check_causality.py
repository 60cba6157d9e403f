"""Pass ``check-causality``: no output may depend on a later token; a spec that leaks is refused with the path."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx

from titans_graph.errors import CausalityLeak, Diagnostic
from titans_graph.ir import Ref
from titans_graph.ir.limits import MAX_DIAGNOSTICS
from titans_graph.passes.base import Pass
from titans_graph.passes.compilation import Compilation, FlatNode
from titans_graph.shapes import Dependence

PortNode = tuple[str, Ref]
Steps = dict[PortNode, PortNode | None]

# What each leaking kind means to a reader.
MEANING = {
    "segment": "every token of a segment reads all of it, later tokens too",
    "everything": "every token reads the whole sequence, later tokens too",
}


@dataclass(frozen=True)
class CheckCausality(Pass):
    """Every path from an input to an output is made of dependences that look back only.

    A leak is refused even behind a delay: its node cannot give token t's value when token t arrives, so it cannot stream.
    """

    name = "check-causality"

    def run(self, c: Compilation) -> Compilation:
        """Report one diagnostic per leaking node that lies on a path from an input to an output."""
        net, leaks = _port_network(c)
        before = _towards(net, {("out", Ref(name)) for name in c.inputs})
        after = _towards(net.reverse(copy=False), {("out", ref) for ref in c.outputs.values()})
        found: dict[object, Diagnostic] = {}
        for node, d in leaks:
            problem = _diagnose(before, after, node, d)
            if problem is not None:
                found[problem.span, problem.message.split(":")[0], problem.node] = problem
            if len(found) > MAX_DIAGNOSTICS:  # each has a path to show, and no more than these are shown
                break
        return c.report(*found.values())


def _port_network(c: Compilation) -> tuple[nx.DiGraph, list[tuple[FlatNode, Dependence]]]:
    """Ports as nodes: ``("in", Ref)`` and ``("out", Ref)``; edges are connections and dependences."""
    net = nx.DiGraph()
    leaks = []
    for name, site in c.sites.items():
        node = c.nodes[name]
        for port, refs in node.inputs.items():
            net.add_edges_from((("out", ref), ("in", Ref(name, port))) for ref in refs)
        for d in node.component.dependences(site):
            net.add_edge(("in", Ref(name, d.source)), ("out", Ref(name, d.target)))
            if d.leaks:
                leaks.append((node, d))
    return net, leaks


def _diagnose(before: Steps, after: Steps, node: FlatNode, d: Dependence) -> Diagnostic | None:
    entry, leave = ("in", Ref(node.name, d.source)), ("out", Ref(node.name, d.target))
    if entry not in before or leave not in after:
        return None
    ports = [*reversed(_path(before, entry)), *_path(after, leave)]
    names = list(dict.fromkeys(ref.text() for kind, ref in ports if kind == "out" or ref.node == node.name))
    message = f"an output depends on later tokens through {node.local!r}: {MEANING[d.kind]}"
    help = "path: " + " -> ".join(names)
    return CausalityLeak(message, node.span, node.declared, help)


def _towards(net: nx.DiGraph, ends: set[PortNode]) -> Steps:
    """From every port that the ends reach, the next port on a shortest way back to one of them."""
    steps: Steps = {end: None for end in sorted(ends, key=str) if end in net}
    front = list(steps)
    while front:
        wave: list[PortNode] = []
        for port in front:
            for reached in net.successors(port):
                if reached not in steps:
                    steps[reached] = port
                    wave.append(reached)
        front = wave
    return steps


def _path(steps: Steps, start: PortNode) -> list[PortNode]:
    path = [start]
    while (port := steps[path[-1]]) is not None:
        path.append(port)
    return path
