"""What nothing reads: nodes and inputs that reach no output, blocks that nobody uses.

A setting without effect is a mistake in a spec. Of a chain of unused nodes only its last is reported: the others are
used as soon as that one is.
"""

from __future__ import annotations

from collections.abc import Mapping

from titans_graph.errors import Diagnostic, Span, UnusedNode
from titans_graph.ir.model import Block, Graph


def reachable(starts: set[str], reads: Mapping[str, set[str]]) -> set[str]:
    """Everything that the starts read, directly or not; ``reads`` maps a name to the names that read it."""
    sources: dict[str, list[str]] = {}
    for source, readers in reads.items():
        for reader in readers:
            sources.setdefault(reader, []).append(source)
    found, stack = set(starts), list(starts)
    while stack:
        for source in sources.get(stack.pop(), ()):
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


def ends(names: list[str], reads: Mapping[str, set[str]]) -> list[str]:
    """Of unused names those at the end of a chain; of a circle that only feeds itself, the first."""
    if not names:
        return []
    import networkx as nx  # here, because sound graphs never need it

    inside = set(names)
    graph = nx.DiGraph()
    graph.add_nodes_from(names)
    graph.add_edges_from((name, reader) for name in names for reader in reads[name] if reader in inside)
    order = {name: i for i, name in enumerate(names)}
    groups = nx.condensation(graph)
    last = [groups.nodes[g]["members"] for g in groups if groups.out_degree(g) == 0]
    return sorted((min(members, key=order.__getitem__) for members in last), key=order.__getitem__)


def unused_names(block: Block, reads: Mapping[str, set[str]], outputs: set[str]) -> list[tuple[str, Span | None, str]]:
    """Unused inputs and nodes of a block as (name, place, message)."""
    used = reachable(outputs, reads)
    places = {**{name: block.place(name) for name in block.inputs}, **{n.name: n.span for n in block.nodes}}
    found = []
    for name in ends([n for n in places if n not in used], reads):
        what = "input" if name in block.inputs else "node"
        found.append((name, places[name], f"{what} {name!r} is never used: nothing that reaches an output reads it"))
    return found


def unused_blocks(graph: Graph, meant: set[str]) -> list[Diagnostic]:
    """Blocks that the main block does not use, not even through others; ``meant`` by misspelt words count as used."""
    reads: dict[str, set[str]] = {name: set() for name in graph.blocks}
    for name, block in graph.blocks.items():
        for node in block.nodes:
            if node.use in reads:
                reads[node.use].add(name)
    used = reachable({n.use for n in graph.main.nodes} | meant, reads)
    lost = ends([name for name in graph.blocks if name not in used], reads)
    return [
        UnusedNode(f"block {name!r} is never used", graph.blocks[name].span, name, "use it, or take it out") for name in lost
    ]
