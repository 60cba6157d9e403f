"""What a component says of time, measured: the Jacobian of a component on one document, against its declaration.

``measured`` runs a component with random parameters over some tokens and differentiates every timed output by every timed
input. Gradients do not see what is detached (the memory's bound on its step), so every input token is also moved by
itself, and what moves with it counts as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.components.harness import Call, calls, on_grid
from titans_graph.registry import Component, Site
from titans_graph.shapes import Dependence, Value

SMALL = 1e-12
Lags = dict[tuple[str, str], Tensor]


def example(kind: Value, tokens: int, seed: int) -> list[Tensor]:
    """Random tensors for the pieces of a value; ids below 2."""
    g = torch.Generator().manual_seed(seed)
    if kind.dim is None:
        return [torch.randint(0, 2, (1, tokens), generator=g)]
    shapes = [(1, tokens, kind.dim) if piece.timed else (piece.length or 0, kind.dim) for piece in kind.pieces]
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


class Subject:
    """A component in its place, with random parameters, on a document of ``tokens`` tokens."""

    def __init__(self, component: type[Component], site: Site, tokens: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.component, self.site, self.tokens = component, site, tokens
        make: Any = component
        self.module: Any = make(site).double()
        with torch.no_grad():
            for p in self.module.parameters():
                p.add_(0.5 * torch.randn_like(p))
        self.many = {port.name for port in component.inputs if port.many}
        self.inputs = {
            port: [example(kind, tokens, 97 * i + j + seed) for j, kind in enumerate(kinds)]
            for i, (port, kinds) in enumerate(site.inputs.items())
        }

    def calls(self) -> list[Call]:
        """The document in one call, or segment by segment where something is delayed by the segment."""
        delayed = any(d.delayed for d in self.component.dependences(self.site))
        segment = (self.site.segment or 1) if delayed else 1
        period = math.lcm(segment, *self.component.periods(self.site))
        return calls([(self.tokens,)], list(range(segment, self.tokens, segment)) if delayed else [], period)

    def outputs(self, inputs: dict[str, list[list[Tensor]]]) -> dict[str, list[Tensor]]:
        """The tensors of every output port that the site makes, timed ones ``[1, T, ...]``."""
        given = {port: [p[0] if len(p) == 1 else tuple(p) for p in values] for port, values in inputs.items()}
        if not self.component.stateful:
            return self.call({port: tuple(values) for port, values in given.items()}, {})[0]
        state = self.module.initial_state(1)
        parts: list[dict[str, list[Tensor]]] = []
        for call in self.calls():
            laid = {port: tuple(on_grid(value, call.token) for value in values) for port, values in given.items()}
            made, state = self.call(laid, {"state": state, "clock": call.clock})
            valid = call.clock.valid[0]
            parts.append({port: [piece[:, valid] for piece in pieces] for port, pieces in made.items()})
        return {port: [torch.cat([part[port][0] for part in parts], 1)] for port in parts[0]}

    def call(self, given: dict[str, tuple[Any, ...]], extra: dict[str, Any]) -> tuple[dict[str, list[Tensor]], Any]:
        """All stages once."""
        arguments = {port: values if port in self.many else values[0] for port, values in given.items()}
        stages = self.component.stages(self.site)
        found: dict[str, list[Tensor]] = {}
        state = None
        for stage in stages:
            named = {port: arguments[port] for port in stage.inputs} | extra
            result = self.module(**named, **({"stage": stage.name} if len(stages) > 1 else {}))
            result, state = result if stage.updates else (result, state)
            for port, value in zip(stage.outputs, (result,) if len(stage.outputs) == 1 else result, strict=True):
                found[port] = [value] if isinstance(value, Tensor) else list(value)
        return found, state

    def timed(self, port: str, kinds: dict[str, tuple[Value, ...]]) -> list[tuple[int, int]]:
        """Which value and piece of a port have time."""
        return [(i, j) for i, kind in enumerate(kinds[port]) for j, piece in enumerate(kind.pieces) if piece.timed]


def measured(subject: Subject) -> Lags:
    """For each input and output port: ``[T, T]`` bool, whether output token t depends on input token s."""
    site, tokens = subject.site, subject.tokens
    kinds = subject.component.infer(site)
    found: Lags = {}
    for source in site.inputs:
        places = subject.timed(source, dict(site.inputs))
        for target in subject.outputs(subject.inputs):
            pieces = [j for j, piece in enumerate(kinds[target].pieces) if piece.timed]
            found[source, target] = torch.zeros(tokens, tokens, dtype=torch.bool)
            for place in places:
                found[source, target] |= _moved(subject, source, target, place, pieces)
                if kinds[target].dim is not None and subject.inputs[source][place[0]][place[1]].is_floating_point():
                    found[source, target] |= _jacobian(subject, source, target, place, pieces)
    return found


def _with(subject: Subject, source: str, place: tuple[int, int], value: Tensor) -> dict[str, list[list[Tensor]]]:
    inputs = {port: [list(pieces) for pieces in values] for port, values in subject.inputs.items()}
    inputs[source][place[0]][place[1]] = value
    return inputs


def _jacobian(subject: Subject, source: str, target: str, place: tuple[int, int], pieces: list[int]) -> Tensor:
    x = subject.inputs[source][place[0]][place[1]].clone().requires_grad_()
    outputs = subject.outputs(_with(subject, source, place, x))[target]
    found = torch.zeros(subject.tokens, subject.tokens, dtype=torch.bool)
    for piece in pieces:
        y = outputs[piece]
        weight = torch.randn(y.shape[2:], generator=torch.Generator().manual_seed(5), dtype=y.dtype)
        for t in range(subject.tokens if y.requires_grad else 0):
            (slope,) = torch.autograd.grad((y[0, t] * weight).sum(), [x], retain_graph=True, materialize_grads=True)
            found[t] |= slope[0].abs().amax(-1) > SMALL
    return found


def _moved(subject: Subject, source: str, target: str, place: tuple[int, int], pieces: list[int]) -> Tensor:
    x = subject.inputs[source][place[0]][place[1]]
    found = torch.zeros(subject.tokens, subject.tokens, dtype=torch.bool)
    with torch.no_grad():
        before = subject.outputs(subject.inputs)[target]
        for s in range(subject.tokens):
            moved = x.clone()
            moved[:, s] = (
                1 - x[:, s] if not x.is_floating_point() else x[:, s] + torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype) + 0.3
            )
            after = subject.outputs(_with(subject, source, place, moved))[target]
            for piece in pieces:
                found[:, s] |= (after[piece][0] - before[piece][0]).abs().amax(-1) > SMALL
    return found


def allowed(declared: list[Dependence], tokens: int, segment: int) -> Tensor:
    """``[T, T]`` bool: which input tokens s an output token t may depend on, by what is declared of a pair of ports."""
    t, s = torch.arange(tokens)[:, None], torch.arange(tokens)
    lag = t - s
    found = torch.zeros(tokens, tokens, dtype=torch.bool)
    for d in declared:
        found |= {
            "pointwise": lag == 0,
            "causal": lag >= d.reach,
            "window": (lag >= 0) & (lag < d.reach),
            "segment": t // segment == s // segment,
            "everything": lag == lag,
            "fixed": lag != lag,
            "state": lag >= d.reach if d.reach else s < t - t % segment,
        }[d.kind]
    return found
