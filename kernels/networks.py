"""Memory networks: what a neural memory computes from its fast weights (arXiv 2501.00663, section 3.1).

A network is a declared graph: ordinary nodes and fast (inner-learned) weights, from the table in
:mod:`~titans_graph.kernels.network_ops`. Everything else (the gradient per token, the chunk-parallel form, the bound of the
step, decoding) is derived from the graph. Short names (``linear``, ``mlp``, ``swiglu``, ``lowrank``, those of
:func:`register`) expand into graphs. Descriptions are parsed and shapes are known without torch, because the checker of
specs imports them from here.

A description is plain data: ``{"nodes": {"down": {"use": "fast.linear", "in": "x", "size": 8}, ...}, "output": "y"}``. The
input is called ``x``; ``in`` is one name or a list, by default the node before (``x`` for the first); ``output`` is by default
the last node.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

from titans_graph.kernels.network_families import FAMILIES, OWN, Family, register
from titans_graph.kernels.network_graph import Network, PlainUse, Shapes
from titans_graph.kernels.network_ops import INPUT, OPS, NetworkError, Node, Op, Options, Plain, Use, near, no_form

__all__ = [
    "FAMILIES",
    "INPUT",
    "OPS",
    "Family",
    "Network",
    "NetworkBuilder",
    "NetworkError",
    "Node",
    "Options",
    "PlainUse",
    "Shapes",
    "Use",
    "Wire",
    "parse_network",
    "register",
]

MOST_NODES = 400
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def parse_network(description: str | Mapping[str, Any] | Network) -> Network:
    """A network from ``"linear"``, ``{"mlp": {"depth": 2}}``, ``{"mlp": 2}``, ``{"nodes": ...}``, or JSON text of these.

    Raises :class:`NetworkError` for unknown names and options, values out of range, and graphs that do not hang together.
    """
    if isinstance(description, Network):
        return description
    if isinstance(description, str):
        return _parse_text(description)
    return _parse(description)


@lru_cache(maxsize=64)
def _parse_text(text: str) -> Network:
    if not text.lstrip().startswith(("{", '"')):
        return _parse({text.strip(): {}})
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise NetworkError(f"memory network {text!r:.200} is not JSON: {problem}") from None
    return _parse({value: {}} if isinstance(value, str) else value)


def _parse(description: Any) -> Network:
    if isinstance(description, Mapping) and "nodes" in description:
        return _parse_graph(description)
    if not isinstance(description, Mapping) or len(description) != 1:
        raise NetworkError(f"a memory network is a name, one {{name: options}}, or {{nodes: ...}}, not {description!r:.200}")
    name, given = next(iter(description.items()))
    if name not in FAMILIES:
        why = no_form(str(name)) or f"unknown memory network {name!r:.60}; {near(str(name), [*FAMILIES, 'nodes'])}"
        raise NetworkError(why, str(name))
    try:
        return _expand(name, FAMILIES[name], {} if given is None else given)
    except NetworkError as problem:
        raise NetworkError(str(problem), name, *problem.path) from None


def _expand(name: str, family: Family, given: Any) -> Network:
    number = isinstance(given, int) and not isinstance(given, bool)
    if family.short and (number or (isinstance(given, str) and "dim" in given)):
        given = {family.short: given}
    if not isinstance(given, Mapping):
        raise NetworkError(f"options of memory network {name!r} must be a mapping, not {given!r:.200}")
    for key in given:
        if key not in family.defaults:
            why = no_form(str(key)) or near(str(key), family.defaults)
            raise NetworkError(f"memory network {name!r} has no option {key!r:.60}; {why}", str(key))
    options = {**family.defaults, **given}
    family.check(options)
    graph = _parse_graph(family.expand(options))
    if name not in OWN:
        return graph
    shown = {k: v for k, v in options.items() if k not in family.quiet or v != family.defaults[k]}
    return Network(graph.nodes, graph.output, json.dumps({name: shown}, sort_keys=True) if shown else name)


def _parse_graph(description: Mapping[Any, Any]) -> Network:
    for key in description:
        if key not in ("nodes", "output"):
            why = no_form(str(key)) or near(str(key), ["nodes", "output"])
            raise NetworkError(f"a memory network has no key {key!r:.60}; {why}", str(key))
    nodes = description["nodes"]
    if not isinstance(nodes, Mapping) or not nodes:
        raise NetworkError("nodes of a memory network is a mapping of names, such as {w: {use: fast.linear}}", "nodes")
    found: list[Node] = []
    for name, entry in nodes.items():
        found.append(_parse_node(name, entry, found[-1].name if found else INPUT))
    return link(found, description.get("output", found[-1].name))


def _parse_node(name: Any, entry: Any, before: str) -> Node:
    where = ("nodes", str(name))
    if not isinstance(entry, Mapping) or "use" not in entry:
        raise NetworkError(f"node {name!r} must say what it uses: write {{use: silu, in: ...}}", *where)
    given = entry.get("in", before)
    inputs = [given] if isinstance(given, str) else given
    if not isinstance(inputs, list | tuple) or not all(isinstance(item, str) for item in inputs):
        raise NetworkError(f"node {name!r}: in is the name of a node or a list of names, not {given!r:.60}", *where, "in")
    return make_node(name, entry["use"], inputs, {k: v for k, v in entry.items() if k not in ("use", "in")})


def make_node(name: Any, use: Any, inputs: Sequence[str], given: Mapping[Any, Any]) -> Node:
    """A node with complete, canonical options; :class:`NetworkError` for whatever it does not know."""
    where = ("nodes", str(name))
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == INPUT:
        taken = f"; {INPUT!r} is the network's input" if name == INPUT else "; letters, digits and '_', a letter first"
        raise NetworkError(f"{name!r:.60} is no name for a node of a memory network{taken}", *where)
    if not isinstance(use, str) or use not in OPS:
        why = (no_form(use) if isinstance(use, str) else "") or f"unknown operation {use!r:.60}; {near(str(use), OPS)}"
        raise NetworkError(f"node {name!r}: {why}", *where, "use")
    op = OPS[use]
    if len(inputs) < op.least or (op.most is not None and len(inputs) > op.most):
        count = str(op.least) if op.most == op.least else f"at least {op.least}"
        raise NetworkError(f"node {name!r}: {use} takes {count} input{'s' * (count != '1')}, got {len(inputs)}", *where, "in")
    return Node(name, use, tuple(inputs), _options(name, use, op, given))


def _options(name: str, use: str, op: Op, given: Mapping[Any, Any]) -> tuple[tuple[str, Plain], ...]:
    for key in given:
        if key not in op.options:
            why = no_form(str(key)) or (near(str(key), op.options) if op.options else "it takes none")
            raise NetworkError(f"node {name!r}: {use} has no option {key!r:.60}; {why}", "nodes", name, str(key))
    options = {}
    for key, option in op.options.items():
        if option.required and key not in given:
            raise NetworkError(f"node {name!r}: {use} needs the option {key!r}", "nodes", name)
        try:
            options[key] = option.parse(given.get(key, option.default))
        except ValueError as problem:
            raise NetworkError(f"node {name!r}: {key} must be {problem}, not {given[key]!r:.60}", "nodes", name, key) from None
    return tuple(sorted(options.items()))


def link(nodes: Sequence[Node], output: Any) -> Network:
    """The network of these nodes, sorted so that each stands after its inputs; :class:`NetworkError` where they do not fit."""
    if len(nodes) > MOST_NODES:
        raise NetworkError(f"a memory network of {len(nodes)} nodes; at most {MOST_NODES}", "nodes")
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        for name in node.inputs:
            if name != INPUT and name not in by_name:
                message = f"node {node.name!r} reads {name!r:.60}, which does not exist; {near(name, [INPUT, *by_name])}"
                raise NetworkError(message, "nodes", node.name, "in")
    if not isinstance(output, str) or output not in by_name:
        raise NetworkError(f"output {output!r:.60} is no node; {near(str(output), by_name)}", "output")
    _check_used(by_name, output)
    _check_weights(nodes)
    return Network(tuple(_in_order(nodes)), output)


def _check_used(by_name: Mapping[str, Node], output: str) -> None:
    read, waiting = {output}, [output]
    while waiting:
        for name in by_name[waiting.pop()].inputs:
            if name != INPUT and name not in read:
                read.add(name)
                waiting.append(name)
    for name in by_name:
        if name not in read:
            raise NetworkError(f"node {name!r} has no effect: the output {output!r} does not depend on it", "nodes", name)


def _check_weights(nodes: Iterable[Node]) -> None:
    users: dict[str, list[Node]] = {}
    for node in nodes:
        if OPS[node.use].measure:
            users.setdefault(node.weight, []).append(node)
    if not users:
        raise NetworkError("a memory network without fast weights learns nothing: use fast.linear, .bias or .gain", "nodes")
    for name, found in users.items():
        first, last = found[0], found[-1]
        if not _NAME.fullmatch(name):
            message = f"node {first.name!r}: {name!r} is no name for a fast weight; letters, digits and '_', a letter first"
            raise NetworkError(message, "nodes", first.name, "weight")
        if len(found) == 1 and dict(first.options)["weight"] not in (None, first.name):
            others = [other for other in users if other != name]
            message = f"node {first.name!r}: weight {name!r} is used by no other node, which ties nothing; {near(name, others)}"
            raise NetworkError(message, "nodes", first.name, "weight")
        odd = next((node for node in found if node.use != first.use), None)
        if odd is not None:
            message = f"fast weight {name!r} is used by {first.use} in node {first.name!r} and by {odd.use} in {odd.name!r}"
            raise NetworkError(message, "nodes", last.name, "weight")


def _in_order(nodes: Sequence[Node]) -> list[Node]:
    """The nodes, each after its inputs, as declared where that leaves a choice; a loop is reported."""
    placed: dict[str, Node] = {}
    waiting = list(nodes)
    while waiting:
        ready = next((n for n in waiting if all(name == INPUT or name in placed for name in n.inputs)), None)
        if ready is None:
            raise NetworkError("nodes of a memory network form a loop: " + _loop(waiting), "nodes", waiting[0].name, "in")
        placed[ready.name] = ready
        waiting.remove(ready)
    return list(placed.values())


def _loop(waiting: Sequence[Node]) -> str:
    by_name = {node.name: node for node in waiting}
    path = [waiting[0].name]
    while path.count(path[-1]) == 1:
        path.append(next(name for name in by_name[path[-1]].inputs if name in by_name))
    return " -> ".join(reversed(path[path.index(path[-1]) :]))


@dataclass(frozen=True, eq=False)
class Wire:
    """A value in a network under construction: the input, or what a node gives."""

    _owner: NetworkBuilder = field(repr=False)
    name: str


class NetworkBuilder:
    """Builds a memory network call by call; the same network, checks and messages as for a description.

    ``n = NetworkBuilder(); h = n("fast.linear", n.x, size=32); net = n.output(n("fast.linear", n("silu", h)))``
    """

    def __init__(self) -> None:
        self.x = Wire(self, INPUT)
        self._nodes: list[Node] = []

    def __call__(self, use: str, *inputs: Wire, name: str | None = None, **options: Any) -> Wire:
        """Add a node that uses an operation; without inputs it reads the node before, without a name it is called after
        its operation. ``weight`` may be the wire of a node whose fast weight this node shares."""
        word = use if isinstance(cast(Any, use), str) else ""
        chosen = self._fresh(word) if name is None else name
        if any(node.name == chosen for node in self._nodes):
            raise NetworkError(f"{chosen!r} is already the name of a node", "nodes", chosen)
        names = [self._name(item, chosen) for item in inputs]
        if isinstance(options.get("weight"), Wire):
            shared = self._name(options["weight"], chosen)
            options["weight"] = next((node.weight for node in self._nodes if node.name == shared), shared)
        before = self._nodes[-1].name if self._nodes else INPUT
        self._nodes.append(make_node(chosen, use, names or [before], options))
        return Wire(self, chosen)

    def output(self, value: Wire) -> Network:
        """The finished network, whose output is ``value``."""
        return link(self._nodes, self._name(value, "output"))

    def _name(self, value: Any, where: str) -> str:
        if not isinstance(value, Wire) or value._owner is not self:
            raise NetworkError(f"{where!r} reads {value!r:.60}, which is no value of this network: use x or what a call gave")
        return value.name

    def _fresh(self, use: str) -> str:
        """A name after the operation that no other node has: ``linear``, ``linear_2``."""
        stem = re.sub(r"[^A-Za-z0-9_]", "_", use.removeprefix("fast."))
        stem = stem if _NAME.fullmatch(stem) and stem != INPUT else f"n_{stem}"
        taken, number = {node.name for node in self._nodes}, 1
        while (chosen := stem if number == 1 else f"{stem}_{number}") in taken:
            number += 1
        return chosen
