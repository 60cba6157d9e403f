"""Specs with one planted mistake, and what must be said of it: its class and its line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hypothesis import assume, note
from hypothesis import strategies as st

from titans_graph import errors
from titans_graph.errors import Diagnostic, UsageError, suggest
from titans_graph.ir import Graph, Node, Ref
from titans_graph.ir.limits import MAIN
from titans_graph.registry import lookup
from titans_graph.testing.strategies.drawing import graphs
from titans_graph.testing.strategies.sheet import Address, Sheet, plain_nodes

T = TypeVar("T")
Found = tuple[type[Diagnostic], Address] | None


@dataclass(frozen=True)
class Planted:
    """A spec with one mistake: the text, the mistake's name, the class of the one diagnostic it must give, and its line.

    ``overrides``: the parameters with which it is read.
    """

    text: str
    mistake: str
    error: type[Diagnostic]
    line: int
    overrides: Mapping[str, Any] = field(default_factory=dict)


class _Field:
    """Where a mistake is planted: the sheet of a graph, and what mistakes need to know of it."""

    def __init__(self, draw: st.DrawFn, graph: Graph) -> None:
        self.draw, self.graph, self.sheet = draw, graph, Sheet(graph)
        self.overrides: dict[str, Any] = {}
        self.base = next(iter(graph.main.outputs.values()))
        self.nodes = plain_nodes(graph)
        (kind,) = graph.main.inputs.values()
        self.single = [name for name, block in graph.blocks.items() if len(block.inputs) == 1]
        self.dim = kind.dim or next(int(n.parameters["dim"]) for n in graph.main.nodes if n.use == "embedding")

    def choose(self, options: list[T]) -> T:
        return self.draw(st.sampled_from(options))

    def plant(self, name: str, use: str, output: bool = True, **keys: Any) -> Ref:
        """A node of the main block at any place among the others, and an output that reads it."""
        inputs = {k: v if isinstance(v, tuple) else (v,) for k, v in keys.items() if isinstance(v, Ref | tuple)}
        parameters = {k: v for k, v in keys.items() if k not in inputs}
        before = self.choose([node.name for node in self.graph.main.nodes])
        self.sheet.add_node(before, Node(name, use, parameters, inputs))
        if output:
            self.sheet.add_output(name, Ref(name))
        return Ref(name)

    def wide(self) -> Ref:
        """A stream with another number of features."""
        return self.plant("wide", "linear", output=False, x=self.base, dim=self.dim + 1)


MISTAKES: dict[str, Callable[[_Field], Found]] = {}
"""The mistakes by name: each changes a sheet and tells class and place, or gives None where the graph has no room for it."""


def _mistake(plant: Callable[[_Field], Found]) -> Callable[[_Field], Found]:
    MISTAKES[plant.__name__.strip("_").replace("_", " ")] = plant
    return plant


def near_valid_specs(mistake: str | None = None) -> st.SearchStrategy[Planted]:
    """Specs that are sound but for one planted mistake (``mistake``: the one of that name in ``MISTAKES``).

    ``titans_graph.check`` of the text, with its overrides, must give one diagnostic, of that class, on that line. UsageError
    for unknown names.
    """
    if mistake is not None and mistake not in MISTAKES:
        raise UsageError(f"unknown mistake {mistake!r}; {suggest(mistake, MISTAKES)}")
    return _planted([mistake] if mistake is not None else list(MISTAKES))


@st.composite
def _planted(draw: st.DrawFn, names: list[str]) -> Planted:
    name = draw(st.sampled_from(names))
    place = _Field(draw, draw(graphs(max_nodes=3)))
    found = MISTAKES[name](place)
    assume(found is not None)
    assert found is not None
    kind, address = found
    planted = Planted(place.sheet.text, name, kind, place.sheet.line(address), place.overrides)
    note(f"--- {name}: {kind.__name__} on line {planted.line} ---\n{planted.text}")
    return planted


@_mistake
def _unknown_component(f: _Field) -> Found:
    block, node = f.choose(f.nodes)
    return errors.UnknownComponent, f.sheet.set(block, node.name, "use", Ref(f.choose(["nothing.known", node.use + "q"])))


@_mistake
def _unknown_name(f: _Field) -> Found:
    block, node = f.choose([(b, n) for b, n in f.nodes if n.inputs])
    port = f.choose(sorted(node.inputs))
    refs = list(node.inputs[port])
    refs[f.choose(list(range(len(refs))))] = Ref("nobody")
    return errors.UnknownName, f.sheet.set(block, node.name, port, tuple(refs))


@_mistake
def _unknown_output_port(f: _Field) -> Found:
    readers = [(b, n, p) for b, n in f.nodes for p, refs in n.inputs.items() if refs[0].node not in ("x", "y", "tokens")]
    assume(readers)
    block, node, port = f.choose(readers)
    refs = (Ref(node.inputs[port][0].node, "nowhere"), *node.inputs[port][1:])
    return errors.UnknownPort, f.sheet.set(block, node.name, port, refs)


@_mistake
def _unknown_parameter(f: _Field) -> Found:
    block, node = f.choose(f.nodes)
    return errors.UnknownParameter, f.sheet.set(block, node.name, "nonsense", f.choose([1, "word", None]))


@_mistake
def _parameter_of_the_wrong_type(f: _Field) -> Found:
    places = [(b, n, key) for b, n in f.nodes for key in n.parameters]
    assume(places)
    block, node, key = f.choose(places)
    return errors.WrongType, f.sheet.set(block, node.name, key, [1])


@_mistake
def _parameter_below_its_minimum(f: _Field) -> Found:
    least = [
        (b, n, item.name, item.metadata["minimum"])
        for b, n in f.nodes
        for item in dataclasses.fields(lookup(n.use).Parameters)
        if item.metadata.get("minimum") is not None
    ]
    assume(least)
    block, node, key, minimum = f.choose(least)
    return errors.WrongType, f.sheet.set(block, node.name, key, minimum - 1)


@_mistake
def _missing_parameter(f: _Field) -> Found:
    needed = [
        (b, n, item.name)
        for b, n in f.nodes
        for item in dataclasses.fields(lookup(n.use).Parameters)
        if item.default is dataclasses.MISSING
    ]
    assume(needed)
    block, node, key = f.choose(needed)
    f.sheet.remove(Address(block, node.name, key))
    return errors.WrongType, Address(block, node.name)


@_mistake
def _setting_without_effect(f: _Field) -> Found:
    f.plant("idle", "memory.neural", write=f.base, heads=1, chunk=1, momentum=False, max_momentum=0.5)
    return errors.WrongType, Address(MAIN, "idle", "max_momentum")


@_mistake
def _missing_input(f: _Field) -> Found:
    block, node = f.choose([(b, n) for b, n in f.nodes if n.inputs])
    f.sheet.remove(Address(block, node.name, lookup(node.use).inputs[0].name))
    return errors.MissingInput, Address(block, node.name)


@_mistake
def _unused_node(f: _Field) -> Found:
    f.plant("lonely", "norm.rms", output=False, x=f.base)
    return errors.UnusedNode, Address(MAIN, "lonely")


@_mistake
def _unused_block(f: _Field) -> Found:
    inside = {"input": f"{{x: [B, T, {f.dim}]}}", "nodes": "{y: {use: norm.rms, in: x}}"}
    return errors.UnusedNode, f.sheet.add_block("spare", **inside, output="y")


@_mistake
def _unused_input_of_a_block(f: _Field) -> Found:
    inside = {"input": f"{{x: [B, T, {f.dim}], spare: [B, T, {f.dim}]}}", "nodes": "{y: {use: norm.rms, in: x}}"}
    f.sheet.add_block("half", **inside, output="y")
    f.plant("other", "half", x=f.base, spare=f.base)
    return errors.UnusedNode, Address("half", key="input")


@_mistake
def _missing_input_of_a_block(f: _Field) -> Found:
    if not f.single:
        return None
    f.plant("nothing", f.choose(f.single))
    return errors.MissingInput, Address(MAIN, "nothing")


@_mistake
def _unknown_parameter_of_a_block(f: _Field) -> Found:
    if not f.single:
        return None
    f.plant("strange", f.choose(f.single), x=f.base, nonsense=f.choose([1, "word"]))
    return errors.UnknownParameter, Address(MAIN, "strange", "nonsense")


@_mistake
def _block_inside_itself(f: _Field) -> Found:
    f.plant("circle", "endless", x=f.base)
    inside = {"input": f"{{x: [B, T, {f.dim}]}}", "nodes": "{again: {use: endless, in: x}}"}
    f.sheet.add_block("endless", **inside, output="again")
    return errors.LimitExceeded, Address("endless", key="nodes")


@_mistake
def _loop_of_one_token(f: _Field) -> Found:
    f.plant("slow", "single", x=f.base)
    memory = "m: {use: memory.neural, opening: x, write: y, heads: 1, chunk: 1, network: linear}"
    inside = {"segment": "1", "nodes": f"{{{memory}, y: {{use: add, in: [x, m.recalled]}}}}"}
    f.sheet.add_block("single", input=f"{{x: [B, T, {f.dim}]}}", **inside, output="y")
    return errors.SlowLoop, Address("single", key="nodes")


@_mistake
def _port_of_an_input(f: _Field) -> Found:
    f.plant("side", f.choose(["norm.rms", "linear"]), x=Ref(next(iter(f.graph.main.inputs)), "out"))
    return errors.UnknownPort, Address(MAIN, "side", "x")


@_mistake
def _node_named_like_an_input(f: _Field) -> Found:
    name = next(iter(f.graph.main.inputs))
    f.plant(name, "norm.rms", output=False, x=f.base)
    return errors.DuplicateKey, Address(MAIN, name)


@_mistake
def _unused_parameter(f: _Field) -> Found:
    address = Address(MAIN, key="spare")
    f.sheet.insert(1, [(Address(MAIN, key="parameters"), "parameters:"), (address, "  spare: 3")])
    return errors.UnusedParameter, address


@_mistake
def _override_behind_an_override(f: _Field) -> Found:
    f.plant("formula", "linear", x=f.base, dim="$outer")
    address = Address(MAIN, key="inner")
    table = [(Address(MAIN, key="parameters"), "parameters:"), (address, "  inner: 3"), (Address(MAIN), "  outer: $inner * 2")]
    f.sheet.insert(1, table)
    f.overrides = {"outer": 5, "inner": f.choose([3, 4])}
    return errors.IdleOverride, address


@_mistake
def _unknown_parameter_in_a_formula(f: _Field) -> Found:
    f.plant("formula", "linear", x=f.base, dim="$nobody")
    return errors.UnknownName, Address(MAIN, "formula", "dim")


@_mistake
def _features_that_do_not_fit(f: _Field) -> Found:
    f.plant("clash", f.choose(["add", "gate.product", "gate.sigmoid", "gate.residual"]), x=(f.base, f.wide()))
    return errors.ShapeMismatch, Address(MAIN, "clash", "x")


@_mistake
def _heads_that_do_not_divide(f: _Field) -> Found:
    use = f.choose(["attention.full", "attention.window"])
    f.plant("uneven", use, x=f.base, heads=f.dim + 1, rotary=None)
    return errors.ShapeMismatch, Address(MAIN, "uneven", "heads")


@_mistake
def _ids_instead_of_features(f: _Field) -> Found:
    if "tokens" not in f.graph.main.inputs:
        return None
    f.plant("raw", f.choose(["norm.rms", "conv.causal", "linear"]), x=Ref("tokens"))
    return errors.ShapeMismatch, Address(MAIN, "raw", "x")


@_mistake
def _output_without_time(f: _Field) -> Found:
    ref = f.plant("still", "tokens.persistent", output=False, count=2, dim=f.dim)
    return errors.ShapeMismatch, f.sheet.add_output("still", ref)


@_mistake
def _features_at_a_block_border(f: _Field) -> Found:
    if not f.single:
        return None
    f.plant("border", f.choose(f.single), x=f.wide())
    return errors.ShapeMismatch, Address(MAIN, "border", "x")


@_mistake
def _unknown_piece(f: _Field) -> Found:
    f.plant("piece", f.choose(["sequence.slice"]), x=f.base, keep="nobody")
    return errors.UnknownName, Address(MAIN, "piece", "keep")


@_mistake
def _feedback_without_delay(f: _Field) -> Found:
    f.plant("ping", "add", x=(f.base, Ref("pong")))
    f.plant("pong", f.choose(["linear", "norm.rms", "conv.causal"]), output=False, x=Ref("ping"))
    lines = [Address(MAIN, name) for name in ("ping", "pong")]
    return errors.AlgebraicLoop, min(lines, key=f.sheet.line)


@_mistake
def _leak(f: _Field) -> Found:
    f.plant("peek", "attention.segment", x=f.base, heads=1, rotary=None, segment=4, causal=False)
    return errors.CausalityLeak, Address(MAIN, "peek")


@_mistake
def _chunk_that_does_not_divide(f: _Field) -> Found:
    if f.graph.main.segment is None:
        return None
    f.plant("odd", "memory.neural", write=f.base, heads=1, chunk=f.graph.main.segment + 1)
    return errors.SegmentProblem, Address(MAIN, "odd", "chunk")


@_mistake
def _opening_without_a_segment(f: _Field) -> Found:
    if f.graph.main.segment is not None:
        return None
    f.plant("early", "memory.neural", write=f.base, opening=f.base, heads=1, chunk=2)
    return errors.SegmentProblem, Address(MAIN, "early", "opening")


@_mistake
def _repeat_past_the_limit(f: _Field) -> Found:
    f.plant("long", "norm.rms", x=f.base)
    return errors.LimitExceeded, f.sheet.set(MAIN, "long", "repeat", 10_001)


@_mistake
def _repeat_that_is_no_number(f: _Field) -> Found:
    f.plant("never", "norm.rms", x=f.base)
    return errors.WrongType, f.sheet.set(MAIN, "never", "repeat", f.choose([0, "twice", 1.5]))


@_mistake
def _node_declared_twice(f: _Field) -> Found:
    block, node = f.choose(f.nodes)
    at = f.sheet.index(Address(block, node.name))
    rows = [row for row in f.sheet.rows if row[0][:2] == (block, node.name)]
    f.sheet.insert(at, rows)
    return errors.DuplicateKey, Address(block, node.name)


@_mistake
def _unknown_key(f: _Field) -> Found:
    address = Address(MAIN, key="colour")
    f.sheet.insert(f.choose([1, len(f.sheet.rows)]), [(address, "colour: red")])
    return errors.UnknownKey, address


@_mistake
def _missing_key(f: _Field) -> Found:
    gone = [Address(MAIN, key="output"), *(Address(MAIN, key=f"-> {name}") for name in f.graph.main.outputs)]
    f.sheet.remove(*gone)
    return errors.MissingKey, Address(MAIN, key="titans_graph")


@_mistake
def _missing_component(f: _Field) -> Found:
    block, node = f.choose(f.nodes)
    f.sheet.remove(Address(block, node.name, "use"))
    return errors.MissingKey, Address(block, node.name)


@_mistake
def _missing_version(f: _Field) -> Found:
    f.sheet.remove(Address(MAIN, key="titans_graph"))
    return errors.UnsupportedVersion, f.sheet.rows[0][0]


@_mistake
def _another_version(f: _Field) -> Found:
    address = Address(MAIN, key="titans_graph")
    f.sheet.change(address, f.choose([2, "one", 1.5]))
    return errors.UnsupportedVersion, address


@_mistake
def _broken_syntax(f: _Field) -> Found:
    block, node = f.choose(f.nodes)
    return errors.SyntaxProblem, f.sheet.set(block, node.name, "use", Ref(f.choose(["@", "`", "a: b: c"])))
