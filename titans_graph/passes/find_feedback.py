"""Pass ``find-feedback``: which nodes form loops through state, and whether every loop has a delay.

Cycles are looked for among calls (stages), where a delay shows as an absent edge; a loop is then the strongly connected
component of *nodes*, so that a stateful node is never split between the loop and what is hoisted out of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import networkx as nx

from titans_graph.errors import AlgebraicLoop, Diagnostic, SegmentProblem, SlowLoop
from titans_graph.ir import Ref
from titans_graph.passes.base import Pass
from titans_graph.passes.compilation import Compilation, Loop


@dataclass(frozen=True)
class FindFeedback(Pass):
    """Fill ``loops``; report feedback without delay and segments that conflict."""

    name = "find-feedback"

    def run(self, c: Compilation) -> Compilation:
        """Find cycles of calls (errors) and strongly connected nodes (loops)."""
        net = c.stage_network()
        algebraic = [_message(c, net, cycle) for cycle in _cycles(net)] or _untyped(c)
        if algebraic:
            return c.report(*{(d.span, d.message): d for d in algebraic}.values())
        loops, found = [], []
        for members in _components(c):
            period, problems = _period(c, members)
            found += problems
            if period is not None:
                loops.append(Loop(members, period))
        return replace(c, loops=tuple(loops)).report(*found)

    def check_after(self, c: Compilation) -> None:
        """No node is in two loops, and every loop has a period."""
        members = [n for loop in c.loops for n in loop.nodes]
        assert len(members) == len(set(members))
        assert all(loop.period > 0 for loop in c.loops)


def _cycles(net: nx.DiGraph) -> Iterable[list[tuple[str, str]]]:
    """One cycle for each strongly connected set of calls."""
    for members in nx.strongly_connected_components(net):
        inside = net.subgraph(members)
        if len(members) > 1 or inside.number_of_edges():
            yield [edge[0] for edge in nx.find_cycle(inside)]


def _untyped(c: Compilation) -> list[Diagnostic]:
    """Loops whose types could not even be inferred, because every node on them waits for another."""
    if not c.sound:
        return []
    net = nx.DiGraph()
    for name in (n for n in c.nodes if n not in c.sites):
        for port, refs in c.nodes[name].inputs.items():
            pairs = ((ref, Ref(name, port)) for ref in refs if ref not in c.types)
            net.add_edges_from(((ref.node, ""), (name, ""), {"ports": (ref, target)}) for ref, target in pairs)
    return [_message(c, net, cycle) for cycle in _cycles(net)]


def _message(c: Compilation, net: nx.DiGraph, cycle: list[tuple[str, str]]) -> Diagnostic:
    ports = []
    for a, b in pairwise([*cycle, cycle[0]]):
        source, target = net.edges[a, b]["ports"]
        ports += [source.text(), target.text()]
    first = min((c.nodes[name] for name, _ in cycle), key=lambda n: (n.span.line, n.span.column) if n.span else (0, 0))
    help = "loop: " + " -> ".join([*ports, ports[0]]) + "; let it pass through state (memory.neural: opening -> recalled)"
    return AlgebraicLoop(f"feedback without delay through {first.local!r}", first.span, first.declared, help)


def _components(c: Compilation) -> Iterable[tuple[str, ...]]:
    """Nodes that must run segment by segment: feedback loops, and single nodes that read their own earlier state."""
    net = nx.DiGraph()
    net.add_nodes_from(c.sites)
    net.add_edges_from(
        (ref.node, n) for n in c.sites for refs in c.nodes[n].inputs.values() for ref in refs if ref.node in c.sites
    )
    order = {name: i for i, name in enumerate(c.nodes)}
    found = (sorted(s, key=order.__getitem__) for s in nx.strongly_connected_components(net))
    chosen = [tuple(s) for s in found if len(s) > 1 or net.has_edge(s[0], s[0]) or _delays(c, s[0])]
    return sorted(chosen, key=lambda s: order[s[0]])


def _delays(c: Compilation, name: str) -> list[int]:
    """The delays in tokens that a node puts between its ports (its segment where a dependence says 0)."""
    site = c.sites[name]
    found = [d for d in c.nodes[name].component.dependences(site) if d.delayed]
    return [d.reach or site.segment or 0 for d in found]


def _period(c: Compilation, members: tuple[str, ...]) -> tuple[int | None, list[Diagnostic]]:
    delays = {name: _delays(c, name) for name in members}
    known = sorted({d for found in delays.values() for d in found if d})
    node = c.nodes[next((n for n in members if delays[n]), members[0])]
    if not known:
        return None, [SegmentProblem("a loop without a period", node.span, node.declared, "give the block a segment")]
    if len(known) > 1:
        message = f"one feedback loop holds conflicting segments {', '.join(map(str, known))}"
        return None, [SegmentProblem(message, node.span, node.declared, "give all blocks of the loop one segment")]
    period = known[0]
    if period == 1:
        return 1, [SlowLoop("this loop runs token by token", node.span, node.declared, "a longer segment is faster")]
    wrong: list[Diagnostic] = [
        SegmentProblem(
            f"{c.nodes[n].local!r} works in pieces of {p} tokens inside a loop of {period}",
            c.nodes[n].span,
            c.nodes[n].declared,
            f"the loop's segment {period} must be a multiple of {p}",
        )
        for n in members
        for p in c.nodes[n].component.periods(c.sites[n])
        if period % p
    ]
    return (None if wrong else period), wrong
