"""A naive layout, and the properties every stateful component must have, written once.

A *story* is what one row of a batch reads: the lengths of its documents, one after another. :func:`calls` cuts the
stories of all rows at the same or at different places and lays each call's tokens on a grid, as plainly as the
docstring of :class:`titans_graph.shapes.Clock` says it. :func:`stream` then runs a component call by call
and puts its outputs back into token order.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titans_graph.registry import Site, lookup, parse_parameters
from titans_graph.shapes import Clock, Value

POISON = 1e6
Story = Sequence[int]
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """One call's grid. ``token [B, G]`` is each slot's token in its row's story, -1 for an invalid slot."""

    token: Tensor
    clock: Clock


def site(
    name: str,
    inputs: Mapping[str, Sequence[Value]],
    *,
    block_segment: int | None = None,
    block_dim: int | None = None,
    **values: Any,
) -> Site:
    """A component's site with parameters from plain values."""
    parameters, problems = parse_parameters(lookup(name).Parameters, values)
    assert not problems, problems
    typed = {port: tuple(given) for port, given in inputs.items()}
    outputs = frozenset(port.name for port in lookup(name).outputs)
    return Site("node", parameters, typed, segment=block_segment, dim=block_dim, used=outputs)


def build(
    name: str,
    inputs: Mapping[str, Sequence[Value]],
    *,
    block_segment: int | None = None,
    block_dim: int | None = None,
    **values: Any,
) -> Any:
    """A component in float64, all of whose parameters are random (a gain of 1 or a bias of 0 hides mistakes)."""
    cls: Any = lookup(name)
    component = cls(site(name, inputs, block_segment=block_segment, block_dim=block_dim, **values))
    component.double()
    with torch.no_grad():
        for tensor in component.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.3)
    return component


def document_starts(story: Story) -> list[int]:
    """For every token of a row, the index of its document's first token."""
    starts: list[int] = []
    for length in story:
        starts += [len(starts)] * length
    return starts


def calls(stories: Sequence[Story], cuts: Sequence[int | Sequence[int]] = (), period: int = 1, slack: int = 0) -> list[Call]:
    """Grids of the calls that read all stories, cut after ``cuts`` tokens (one number, or one per row).

    ``slack`` adds that many periods of empty slots before each run, which the contract allows.
    """
    totals = [sum(story) for story in stories]
    bounds = [[0] * len(stories), *([c] * len(stories) if isinstance(c, int) else list(c) for c in cuts), totals]
    return [_call(stories, first, final, period, slack) for first, final in itertools.pairwise(bounds)]


def _call(stories: Sequence[Story], first: Sequence[int], final: Sequence[int], period: int, slack: int) -> Call:
    one = max(b - a for a, b in zip(first, final, strict=True)) <= 1
    rows = [_row(s, a, b, 1 if one else period, 0 if one else slack) for s, a, b in zip(stories, first, final, strict=True)]
    slots = max(len(tokens) for tokens, _, _ in rows)
    slots = 1 if one else max(-(-slots // period) * period, 2)
    token = torch.full((len(rows), slots), -1)
    position = torch.zeros(len(rows), slots, dtype=torch.int64)
    lead = torch.tensor([min(row[2], slots) for row in rows])
    for b, (tokens, positions, _) in enumerate(rows):
        token[b, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        position[b, : len(tokens)] = torch.tensor(positions, dtype=torch.int64)
        for s in range(len(tokens), slots):
            position[b, s] = position[b, s - 1] + 1 if s else 0
    valid = token >= 0
    ends = (valid * torch.arange(1, slots + 1)).amax(1)
    end = torch.where(valid.any(1), ends, lead)
    room = torch.arange(max(16, -(-(int(position[valid].max()) + 1 if valid.any() else 1) // 8) * 8))
    return Call(token, Clock(valid, position, lead, end, room))


def _row(story: Story, first: int, final: int, period: int, slack: int) -> tuple[list[int], list[int], int]:
    """One row's tokens (-1: none), positions and lead."""
    starts = document_starts(story)
    tokens: list[int] = []
    positions: list[int] = []
    lead = 0
    for t in range(first, final):
        position = t - starts[t]
        if t == first or position == 0:
            gap = slack * period + (-len(tokens)) % period + (position % period if t == first else 0)
            before = position - gap if t == first else (positions[-1] + 1 if positions else 0)
            tokens += [-1] * gap
            positions += [before + i for i in range(gap)]
            lead = len(tokens) if t == first and position > 0 else lead
        tokens.append(t)
        positions.append(position)
    if first == final and first < len(starts):
        lead = (first - starts[first]) % period
        tokens, positions = [-1] * lead, list(range(first - starts[first] - lead, first - starts[first]))
    return tokens, positions, lead


def on_grid(value: Any, token: Tensor, poison: float = 0.0) -> Any:
    """Timed tensors ``[B, T, ...]`` -> ``[B, G, ...]`` with ``poison`` in invalid slots; fixed ones as they are."""
    if isinstance(value, tuple):
        return tuple(on_grid(piece, token, poison) for piece in value)
    if value.dim() < 3:
        return value
    rows = torch.arange(token.shape[0])[:, None]
    return torch.where((token >= 0)[..., None], value[rows, token.clamp(min=0)], poison)


def stream(component: Any, inputs: Inputs, grids: Sequence[Call], poison: float = 0.0, state: Any = None) -> tuple[Tensor, Any]:
    """Run the calls one after another; outputs ``[B, T, ...]`` in token order (0 where a row has none) and state."""
    batch, total = grids[0].token.shape[0], 1 + max(int(call.token.max()) for call in grids)
    state = component.initial_state(batch) if state is None else state
    out: Tensor | None = None
    for call in grids:
        given = {port: on_grid(value, call.token, poison) for port, value in inputs.items()}
        result, state = component(**given, state=state, clock=call.clock)
        assert torch.isfinite(result).all()
        if out is None:
            out = result.new_zeros(batch, total, *result.shape[2:])
        row, slot = call.clock.valid.nonzero(as_tuple=True)
        out = out.index_put((row, call.token[row, slot]), result[row, slot])
    assert out is not None
    return out, state


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to float64 rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def rowwise(value: Any, row: int, first: int = 0, final: int | None = None) -> Any:
    """One row's tokens ``first .. final`` of timed tensors, as a batch of one."""
    if isinstance(value, tuple):
        return tuple(rowwise(piece, row, first, final) for piece in value)
    return value if value.dim() < 3 else value[row : row + 1, first:final]
