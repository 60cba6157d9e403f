"""Blocks inside blocks: none contains itself, and all copies together stay within bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from titans_graph.errors import Diagnostic, LimitExceeded
from titans_graph.ir.limits import MAIN, MAX_DEPTH, MAX_NODES, MAX_REPEAT
from titans_graph.ir.model import Block, Graph, Node

_SHOWN = 6
"""Names of a circle that a message shows."""


def back_edges(uses: Mapping[str, list[str]]) -> dict[tuple[str, str], list[str]]:
    """The uses that close a circle, each with the circle's names; without them no block contains itself."""
    found: dict[tuple[str, str], list[str]] = {}
    done: set[str] = set()
    for root in uses:
        # The path from the root, in order, each name with the uses of it that are still to be followed.
        path = {} if root in done else {root: iter(uses[root])}
        while path:
            name = next(reversed(path))
            inner = next(path[name], None)
            if inner is None:
                done.add(name)
                del path[name]
            elif inner in path:
                found[name, inner] = _shown(list(path), inner)
            elif inner not in done:
                path[inner] = iter(uses.get(inner, ()))
    return found


def _shown(path: list[str], inner: str) -> list[str]:
    """The names of a circle, for a message."""
    circle = path[path.index(inner) :]
    return [*circle[:_SHOWN], *(["..."] if len(circle) > _SHOWN else []), inner]


def nesting_problems(graph: Graph) -> list[tuple[tuple[str, str], Diagnostic]]:
    """(block, node) and diagnostic for uses that nest without end, too deep, or make too many copies."""
    blocks = {**graph.blocks, MAIN: graph.main}
    uses = {name: [n.use for n in block.nodes if n.use in graph.blocks] for name, block in blocks.items()}
    circles = back_edges(uses)
    if circles:
        return [_circle(blocks, edge, circle) for edge, circle in circles.items()]
    return _too_much(blocks, uses)


def without_circles(graph: Graph) -> Graph:
    """The graph with every use that closes a circle emptied, so that it can be expanded."""
    blocks = {**graph.blocks, MAIN: graph.main}
    uses = {name: [n.use for n in block.nodes if n.use in graph.blocks] for name, block in blocks.items()}
    circles = back_edges(uses)

    def opened(name: str, block: Block) -> Block:
        if not any((name, use) in circles for use in uses[name]):
            return block
        nodes = tuple(replace(n, use="") if (name, n.use) in circles else n for n in block.nodes)
        return replace(block, nodes=nodes)

    if not circles:
        return graph
    inner = {name: opened(name, block) for name, block in graph.blocks.items()}
    return replace(graph, main=opened(MAIN, graph.main), blocks=inner)


def circle_message(circle: list[str]) -> str:
    """What is said of a block that contains itself."""
    return f"block {circle[0]!r} contains itself: {' -> '.join(circle)}"


def _circle(blocks: Mapping[str, Block], edge: tuple[str, str], circle: list[str]) -> tuple[tuple[str, str], Diagnostic]:
    node = next(n for n in blocks[edge[0]].nodes if n.use == edge[1])
    return (edge[0], node.name), LimitExceeded(circle_message(circle), node.place("use"), node.name)


def _too_much(blocks: Mapping[str, Block], uses: Mapping[str, list[str]]) -> list[tuple[tuple[str, str], Diagnostic]]:
    """Sizes and depths from the innermost block outwards; the first use past a bound is reported."""
    sizes: dict[str, int] = {}
    depths: dict[str, int] = {}
    for name in _inner_first(uses):
        depths[name] = 1 + max((depths[u] for u in uses[name]), default=0)
        sizes[name] = 0
        for node in blocks[name].nodes:
            sizes[name] += copies(node) * sizes.get(node.use if node.use in uses else "", 1)
            deep = depths[name] > MAX_DEPTH and node.use in uses and depths[node.use] == depths[name] - 1
            if sizes[name] > MAX_NODES or deep:
                message = f"blocks are nested deeper than {MAX_DEPTH}" if deep else _MANY
                return [((name, node.name), LimitExceeded(message, node.place("use"), node.name))]
    return []


_MANY = f"blocks and repeats make more than {MAX_NODES} nodes"


def copies(node: Node) -> int:
    """The copies a repeat makes; a wrong repeat, reported elsewhere, counts once."""
    return node.repeat if type(node.repeat) is int and 1 <= node.repeat <= MAX_REPEAT else 1


def _inner_first(uses: Mapping[str, list[str]]) -> list[str]:
    """Names so that each comes after all it uses; the uses have no circle."""
    order: list[str] = []
    seen: set[str] = set()
    stack = [(name, False) for name in uses]
    while stack:
        name, ready = stack.pop()
        if ready:
            order.append(name)
        elif name not in seen:
            seen.add(name)
            stack.append((name, True))
            stack.extend((inner, False) for inner in uses[name])
    return order
