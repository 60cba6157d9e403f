"""Pass ``check-causality``: no output may depend on a later token; a spec that leaks is refused with the path."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx

from titans_graph.errors import CausalityLeak, Diagnostic
from titans_graph.ir import Ref
from titans_graph.passes.base import Pass
from titans_graph.passes.compilation import Compilation, FlatNode
from titans_graph.shapes import Dependence

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
        sources = {("out", Ref(name)) for name in c.inputs}
        targets = {("out", ref) for ref in c.outputs.values()}
        found = [d for leak in leaks if (d := _diagnose(c, net, sources, targets, *leak)) is not None]
        return c.report(*{(d.span, d.message.split(":")[0], d.node): d for d in found}.values())


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


def _diagnose(
    c: Compilation,
    net: nx.DiGraph,
    sources: set[tuple[str, Ref]],
    targets: set[tuple[str, Ref]],
    node: FlatNode,
    d: Dependence,
) -> Diagnostic | None:
    entry, leave = ("in", Ref(node.name, d.source)), ("out", Ref(node.name, d.target))
    before = _path(net.reverse(copy=False), entry, sources)
    after = _path(net, leave, targets)
    if before is None or after is None:
        return None
    ports = [*reversed(before), *after]
    names = list(dict.fromkeys(ref.text() for kind, ref in ports if kind == "out" or ref.node == node.name))
    message = f"an output depends on later tokens through {node.local!r}: {MEANING[d.kind]}"
    help = "path: " + " -> ".join(names)
    return CausalityLeak(message, node.span, node.declared, help)


def _path(net: nx.DiGraph, start: object, ends: set[tuple[str, Ref]]) -> list[tuple[str, Ref]] | None:
    if start not in net:
        return None
    paths = nx.single_source_shortest_path(net, start)
    reached = [paths[end] for end in ends if end in paths]
    return min(reached, key=len) if reached else None
