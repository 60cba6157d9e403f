"""What a declared graph means, computed one token and one node at a time: the truth that compiled programs are held to.

Independent of passes, schedule, regions, grid, clock, state, kernels and the components' own code. Only the declaration
is shared: the graph, the names and defaults of a component's parameters, and the tensors of the model under test. One
document of one row is evaluated; documents and rows do not see each other, so there is nothing more to say about them.

Values are asked for, not scheduled: an output at token t asks its node, which asks for its inputs at the tokens it
needs. Feedback through state needs no care, because what a memory recalls asks for its weights before the segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.properties import naive_parts
from titans_graph.ir import Block, Graph, Node, Ref
from titans_graph.registry import known, lookup, parse_parameters


class Piece(NamedTuple):
    """A stretch of a sequence at one token: ``[dim]`` if it has one element per token, else ``[n, dim]``; ids are ``[]``."""

    name: str
    timed: bool
    value: Tensor


Value = tuple[Piece, ...]
Read = Callable[[str, int], list[Value]]


@dataclass(frozen=True)
class Place:
    """Everything a component is told: its parameters, its tensors by name, the block's segment and dim, what it reads.

    ``read(port, t)``: the values of all references of an input at token t, each single piece under the name it is read by.
    ``tokens``: how many there are, which only an attention that is not causal may look at.
    """

    parameters: Any
    weights: Mapping[str, Tensor]
    read: Read
    ports: frozenset[str]
    segment: int | None
    tokens: int

    def stream(self, port: str, t: int) -> Tensor:
        """The single piece of the single value of an input."""
        ((piece,),) = self.read(port, t)
        return piece.value


class Instance:
    """One block with its inputs connected: a value inside it is asked for by reference and token."""

    def __init__(self, world: Evaluation, block: Block, path: str, inputs: Callable[[str, int], Value]) -> None:
        self.world, self.block, self.path, self.inputs = world, block, path, inputs
        self.parts: dict[tuple[str, int], Instance | naive_parts.Part] = {}
        self.memo: dict[tuple[str, int, str, int], Value] = {}

    def value(self, ref: Ref, t: int) -> Value:
        """A value by reference: an input of the block, or an output of the last copy of a node."""
        if ref.node in self.block.inputs:
            return self.inputs(ref.node, t)
        node = next(n for n in self.block.nodes if n.name == ref.node)
        return self.copy_value(node, node.repeat - 1, ref.port, t)

    def copy_value(self, node: Node, copy: int, port: str, t: int) -> Value:
        """The output ``port`` (the first one if empty) of one copy of a node; computed once for each token."""
        key = (node.name, copy, port, t)
        if key not in self.memo:
            part = self.part(node, copy)
            if isinstance(part, Instance):
                self.memo[key] = part.value(part.block.outputs[port or next(iter(part.block.outputs))], t)
            else:
                self.memo[key] = part.out(port or lookup(node.use).outputs[0].name, t)
        return self.memo[key]

    def part(self, node: Node, copy: int) -> Instance | naive_parts.Part:
        """What stands behind one copy of a node."""
        if (node.name, copy) not in self.parts:
            block = None if known(node.use) else self.world.graph.blocks[node.use]
            counted = node.repeat > 1 or block is not None
            path = ".".join([*([self.path] if self.path else []), node.name, *([str(copy)] if counted else [])])
            ports = list(block.inputs) if block else [p.name for p in lookup(node.use).inputs]

            def read(port: str, t: int) -> list[Value]:
                if copy and port == ports[0]:
                    return [named(self.copy_value(node, copy - 1, "", t), f"{node.name}.{copy - 1}")]
                return [named(self.value(ref, t), ref.text()) for ref in node.inputs[port]]

            if block is not None:
                self.parts[node.name, copy] = Instance(self.world, block, path, lambda port, t: read(port, t)[0])
            else:
                self.parts[node.name, copy] = self.component(node, path, read)
        return self.parts[node.name, copy]

    def component(self, node: Node, path: str, read: Read) -> naive_parts.Part:
        """A component, with its tensors from the model under test."""
        parameters, problems = parse_parameters(lookup(node.use).Parameters, node.parameters)
        assert not problems, problems
        module = self.world.body.get_submodule(path)
        weights = dict(module.named_parameters())
        place = Place(parameters, weights, read, frozenset(node.inputs), self.block.segment, self.world.tokens)
        return naive_parts.PARTS[node.use](place)


class Evaluation:
    """A graph on one document ``x`` ``[T]`` (ids) or ``[T, dim]``, with the tensors of ``body`` by the paths of its nodes."""

    def __init__(self, graph: Graph, body: nn.Module, x: Tensor) -> None:
        self.graph, self.body, self.x, self.tokens = graph, body, x, x.shape[0]
        self.main = Instance(self, graph.main, "", lambda port, t: (Piece(port, True, x[t]),))

    def outputs(self) -> dict[str, Tensor]:
        """Every output of the graph, ``[T, dim]``."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.graph.main.outputs}
        for t in range(self.tokens):  # in order, so that what asks for earlier tokens finds them
            for name, ref in self.graph.main.outputs.items():
                ((_, timed, value),) = self.main.value(ref, t)
                assert timed
                found[name].append(value)
        return {name: torch.stack(values) for name, values in found.items()}


def named(value: Value, name: str) -> Value:
    """A value as its reader calls it: a single piece takes the name of the reference, several keep their own."""
    return (value[0]._replace(name=name),) if len(value) == 1 else value
