"""From a region of the schedule to a ``torch.fx`` graph with readable code.

The function of a region has the signature ``forward(self, <inputs>, state, clock)``: ``self`` holds the components as
submodules under their local names, ``state`` maps local names to states, ``clock`` is a
:class:`titans_graph.shapes.Clock`. It returns ``(outputs, new_state)``.
"""

from __future__ import annotations

import re
from operator import getitem
from typing import Any

from torch import fx

from titans_graph.ir import Ref
from titans_graph.passes import Compilation, Region, Step


def local_name(region: Region, name: str) -> str:
    """A node's path relative to the block instance that holds the region."""
    prefix = f"{region.instance}."
    return name[len(prefix) :] if region.instance and name.startswith(prefix) else name


def input_names(c: Compilation, region: Region) -> tuple[str, ...]:
    """Names of the region's inputs: as the region's own block calls them, made unique."""
    labels: dict[Ref, str] = {}
    for step in region.steps:
        node = c.nodes[step.node]
        for port in step.stage.inputs:
            for ref, label in zip(node.inputs.get(port, ()), node.labels.get(port, ()), strict=True):
                labels.setdefault(ref, _word(label))
    taken = {_word(local_name(region, s.node)) for s in region.steps} | {"state", "clock", "self"}
    names: list[str] = []
    for ref in region.inputs:
        name = labels[ref]
        while name in taken or name in names:
            name += "_in"
        names.append(name)
    return tuple(names)


def _word(text: str) -> str:
    return re.sub(r"\W", "_", text)


def lower(c: Compilation, region: Region) -> fx.Graph:
    """The region as a graph of ``call_module`` nodes, one for each call of the schedule."""
    return _Lowering(c, region).graph


class _Lowering:
    """One region on its way into an ``fx.Graph``."""

    def __init__(self, c: Compilation, region: Region) -> None:
        self.c, self.region = c, region
        self.graph = fx.Graph()
        self.values: dict[Ref, fx.Node] = {}
        names = input_names(c, region)
        for ref, name in zip(region.inputs, names, strict=True):
            self.values[ref] = self.graph.placeholder(name)
        self.state = self.graph.placeholder("state")
        self.clock = self.graph.placeholder("clock")
        self.old: dict[str, fx.Node] = {}
        self.new: dict[str, fx.Node] = {}
        for step in region.steps:
            self._call(step)
        outputs = tuple(self.values[ref] for ref in region.outputs)
        self.graph.output((outputs, {local_name(region, n): self.new[n] for n in region.states}))
        self.graph.lint()

    def _call(self, step: Step) -> None:
        node, stage = self.c.nodes[step.node], step.stage
        component = node.component
        local = local_name(self.region, step.node)
        many = {p.name for p in component.inputs if p.many}
        arguments: dict[str, Any] = {}
        for port in stage.inputs:
            values = tuple(self.values[ref] for ref in node.inputs[port])
            arguments[port] = values if port in many else values[0]
        if component.stateful:
            arguments["state"] = self._old_state(step.node, local)
            arguments["clock"] = self.clock
        if len(self.c.stages(step.node)) > 1:
            arguments["stage"] = stage.name
        call = self._node(
            "call_module", local, (), arguments, _word(f"{local}_{stage.name}" if "stage" in arguments else local)
        )
        result = call
        if stage.updates:
            result = self._node("call_function", getitem, (call, 0), {}, _word(f"{local}_out"))
            self.new[step.node] = self._node("call_function", getitem, (call, 1), {}, _word(f"{local}_new_state"))
        self._name_outputs(step, result)

    def _name_outputs(self, step: Step, result: fx.Node) -> None:
        outputs = step.stage.outputs
        if len(outputs) == 1:
            self.values[Ref(step.node, outputs[0])] = result
            return
        for index, port in enumerate(outputs):
            name = _word(f"{local_name(self.region, step.node)}_{port}")
            self.values[Ref(step.node, port)] = self._node("call_function", getitem, (result, index), {}, name)

    def _old_state(self, name: str, local: str) -> fx.Node:
        if name not in self.old:
            self.old[name] = self._node("call_function", getitem, (self.state, local), {}, _word(f"{local}_state"))
        return self.old[name]

    def _node(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> fx.Node:
        return self.graph.create_node(op, target, args, kwargs, name=name)
