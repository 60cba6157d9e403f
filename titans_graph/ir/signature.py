"""What a node can be connected to: the ports and parameters of whatever it uses, component or block."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from titans_graph import registry
from titans_graph.errors import Diagnostic, UnknownParameter, UnknownPort
from titans_graph.ir.hints import nearest
from titans_graph.ir.model import Block
from titans_graph.registry import Port

SUGAR = "in"
"""The key that means the first input port."""


@dataclass(frozen=True)
class Signature:
    """Ports and parameters of a component (``component`` set) or a block; ``inputs`` and ``outputs`` are in order."""

    label: str
    inputs: Mapping[str, Port]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]
    component: type[registry.Component] | None = None

    @property
    def first(self) -> str:
        """The input port that ``in:`` means; an empty string where there is none."""
        return next(iter(self.inputs), "")

    def is_port(self, key: str, names: bool) -> bool:
        """Whether a key is a port; unknown ones by the nearest known word, or if their value ``names`` nodes."""
        if key in self.inputs or key in self.parameters:
            return key in self.inputs
        return names or self.nearest(key) in self.inputs

    def nearest(self, key: str) -> str:
        """The port or parameter a misspelt key probably means, or an empty string."""
        return nearest(key, (*self.inputs, *self.parameters))

    def unknown(self, key: str, port: bool) -> tuple[type[Diagnostic], str, str]:
        """Class, message and help for a key that is neither port nor parameter."""
        near = self.nearest(key)
        if near:
            help = f"did you mean {near!r}?"
        else:
            words = tuple(self.inputs) if port else self.parameters
            help = f"it has: {', '.join(words[:24])}" if words else f"it takes no {'inputs' if port else 'parameters'}"
        kind = "input" if port else "parameter"
        return (UnknownPort if port else UnknownParameter), f"{self.label} has no {kind} {key!r}", help


def of_component(name: str) -> Signature:
    """The signature of a registered component; imports its file."""
    found: Any = registry.lookup(name)
    return _of_class(name, found)


@functools.cache
def _of_class(name: str, found: Any) -> Signature:
    fields = tuple(f.name for f in dataclasses.fields(found.Parameters))
    return Signature(name, {p.name: p for p in found.inputs}, tuple(p.name for p in found.outputs), fields, found)


def of_block(block: Block) -> Signature:
    """The signature of a block: every input is required and takes one value of any type."""
    ports = {name: Port(name, "input of the block", accepts="sequence") for name in block.inputs}
    return Signature(f"block {block.name!r}", ports, tuple(block.outputs), ())


def of(use: str, blocks: Mapping[str, Block]) -> Signature | None:
    """The signature behind ``use``; a graph's own blocks come before components. None where the name is unknown."""
    if use in blocks:
        return of_block(blocks[use])
    return of_component(use) if registry.known(use) else None
