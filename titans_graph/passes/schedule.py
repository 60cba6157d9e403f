"""Pass ``schedule``: the order of calls, cut into regions, for whole sequences and for single tokens.

``hoist`` (optional, before it) decides what stands outside a loop: with it only the loop's own nodes run segment by segment
and everything else runs over the whole call at once; without it a loop takes its whole block along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import networkx as nx

from titans_graph.ir import Ref
from titans_graph.passes.base import Pass
from titans_graph.passes.compilation import Compilation, Loop, Program, Region, Step

T = TypeVar("T")


@dataclass(frozen=True)
class Hoist(Pass):
    """Let everything that is in no loop run over the whole call at once."""

    name = "hoist"
    optional = True

    def run(self, c: Compilation) -> Compilation:
        """Set ``hoist``."""
        return replace(c, hoist=True)


@dataclass(frozen=True)
class Schedule(Pass):
    """Fill ``whole`` and ``token``: the two programs of the graph."""

    name = "schedule"

    def check_before(self, c: Compilation) -> None:
        """The type of every connection is known."""
        assert c.sound
        assert set(c.sites) == set(c.nodes), set(c.nodes) - set(c.sites)
        assert all(ref in c.types for node in c.nodes.values() for refs in node.inputs.values() for ref in refs)

    def run(self, c: Compilation) -> Compilation:
        """Order calls so that every value is made before it is read, keeping what belongs together in one region."""
        loops = c.loops if c.hoist else _widened(c)
        whole = _whole(c, loops)
        token = _token(c)
        return replace(c, whole=Program(tuple(whole)), token=Program(tuple(token)))

    def check_after(self, c: Compilation) -> None:
        """Both programs make every call once, and nothing is read before it is made."""
        assert c.whole is not None
        assert c.token is not None
        calls = {(name, s.name) for name in c.nodes for s in c.stages(name)}
        for program in (c.whole, c.token):
            made = set(map(Ref, c.inputs))
            done = [(s.node, s.stage.name) for r in program.regions for s in r.steps]
            assert len(done) == len(calls)
            assert set(done) == calls
            for region in program.regions:
                assert made.issuperset(region.inputs), region.name
                made.update(region.outputs)
            assert made.issuperset(c.outputs.values())


def _widened(c: Compilation) -> tuple[Loop, ...]:
    """Loops that take along every node of the block instances they touch, where that stays one loop.

    Where a widened loop and what stands outside of it would wait for each other (two loops of one block, with nodes
    between them), the loop stays as it is.
    """
    loops = list(c.loops)
    for index, loop in enumerate(c.loops):
        taken = {n for other in loops for n in other.nodes}
        instances = {c.nodes[n].instance for n in loop.nodes}
        extra = [n for n in c.nodes if c.nodes[n].instance in instances and n not in taken and _can_join(c, n, loop)]
        wider = [*loops[:index], Loop((*loop.nodes, *extra), loop.period), *loops[index + 1 :]]
        if nx.is_directed_acyclic_graph(_condensed(c, wider)):
            loops = wider
    return tuple(loops)


def _condensed(c: Compilation, loops: Sequence[Loop]) -> nx.DiGraph:
    """What waits for what, with every loop as a single item ``loop <index>``."""
    owner = {name: index for index, loop in enumerate(loops) for name in loop.nodes}
    item: dict[str, str] = {n: f"loop {owner[n]}" if n in owner else n for n in c.nodes}
    net = nx.DiGraph()
    net.add_nodes_from(dict.fromkeys(item.values()))
    for name, node in c.nodes.items():
        for refs in node.inputs.values():
            net.add_edges_from((item[r.node], item[name]) for r in refs if r.node in item and item[r.node] != item[name])
    return net


def _can_join(c: Compilation, name: str, loop: Loop) -> bool:
    """A node may join a loop when its outputs have time and its own periods divide the loop's."""
    timed = all(c.types[Ref(name, out.name)].timed for out in c.nodes[name].component.outputs)
    return timed and all(loop.period % p == 0 for p in c.nodes[name].component.periods(c.sites[name]))


def _whole(c: Compilation, loops: tuple[Loop, ...]) -> list[Region]:
    """Condense loops to single items, order the items, and group neighbours of one block instance."""
    net = _condensed(c, loops)
    assert nx.is_directed_acyclic_graph(net), "loops and hoisted nodes depend on each other in a circle"
    groups: list[tuple[str, str, int, list[Step]]] = []
    entries: list[str] = _order(net, lambda e: _instance(c, loops, e))
    for entry in entries:
        if entry.startswith("loop "):
            loop = loops[int(entry[5:])]
            groups.append(("loop", _common(c, loop.nodes), loop.period, _calls(c, loop.nodes)))
        else:
            instance = _outer(c.nodes[entry].instance)
            steps = _calls(c, (entry,))
            if groups and groups[-1][0] == "whole" and groups[-1][1] == instance:
                groups[-1][3].extend(steps)
            else:
                groups.append(("whole", instance, 0, steps))
    return _regions(c, groups)


def _instance(c: Compilation, loops: tuple[Loop, ...], entry: str) -> str:
    return _common(c, loops[int(entry[5:])].nodes if entry.startswith("loop ") else (entry,))


def _outer(instance: str) -> str:
    """The outermost block instance (``layers.0`` of ``layers.0.mixer.0``): a layer is one region, whatever it is made of."""
    return ".".join(instance.split(".")[:2])


def _common(c: Compilation, names: tuple[str, ...]) -> str:
    """The outermost block instance that holds all of the given nodes, empty where they stand in several."""
    outer = {_outer(c.nodes[n].instance) for n in names}
    return outer.pop() if len(outer) == 1 else ""


def _calls(c: Compilation, names: tuple[str, ...]) -> list[Step]:
    """The stages of some nodes in an order in which every value is made before it is read."""
    inside = c.stage_network().subgraph([(n, s.name) for n in names for s in c.stages(n)])
    order: list[tuple[str, str]] = _order(nx.DiGraph(inside), lambda call: _outer(c.nodes[call[0]].instance))
    stages = {(n, s.name): s for n in names for s in c.stages(n)}
    return [Step(n, stages[n, s]) for n, s in order]


def _token(c: Compilation) -> list[Region]:
    """All calls of one token, one region for each run of calls of one block instance."""
    groups: list[tuple[str, str, int, list[Step]]] = []
    for step in _calls(c, tuple(c.nodes)):
        instance = _outer(c.nodes[step.node].instance)
        if groups and groups[-1][1] == instance:
            groups[-1][3].append(step)
        else:
            groups.append(("token", instance, 0, [step]))
    return _regions(c, groups)


def _order(net: nx.DiGraph, group: Callable[[T], str]) -> list[T]:
    """Topological order that stays in one group as long as it can, and else follows the order of declaration."""
    rank = {n: i for i, n in enumerate(net.nodes)}
    waiting = {n: net.in_degree(n) for n in net.nodes}
    ready = [n for n, degree in waiting.items() if degree == 0]
    done: list[T] = []
    current: str | None = None
    while ready:
        ready.sort(key=lambda n: (group(n) != current, rank[n]))
        chosen = ready.pop(0)
        done.append(chosen)
        current = group(chosen)
        for after in net.successors(chosen):
            waiting[after] -= 1
            if waiting[after] == 0:
                ready.append(after)
    return done


def _regions(c: Compilation, groups: list[tuple[str, str, int, list[Step]]]) -> list[Region]:
    """Groups of calls with the values that cross their borders."""
    readers: dict[Ref, set[int]] = {}
    for index, (_, _, _, steps) in enumerate(groups):
        for step in steps:
            for port in step.stage.inputs:
                for ref in c.nodes[step.node].inputs.get(port, ()):
                    readers.setdefault(ref, set()).add(index)
    for ref in c.outputs.values():
        readers.setdefault(ref, set()).add(len(groups))
    regions = []
    for index, (kind, instance, period, steps) in enumerate(groups):
        made = [Ref(s.node, port) for s in steps for port in s.stage.outputs]
        needed = dict.fromkeys(r for s in steps for p in s.stage.inputs for r in c.nodes[s.node].inputs.get(p, ()))
        regions.append(
            Region(
                name=_region_name(instance, kind, index, groups),
                kind=kind,
                instance=instance,
                steps=tuple(steps),
                inputs=tuple(r for r in needed if r not in made),
                outputs=tuple(r for r in made if readers.get(r, set()) - {index}),
                states=tuple(dict.fromkeys(s.node for s in steps if c.nodes[s.node].component.stateful)),
                period=period,
            )
        )
    return regions


def _region_name(instance: str, kind: str, index: int, groups: list[tuple[str, str, int, list[Step]]]) -> str:
    place = instance or "main"
    same = [i for i, g in enumerate(groups) if g[1] == instance and g[0] == kind]
    number = f":{same.index(index)}" if len(same) > 1 else ""
    return f"{place}:{kind}{number}"
