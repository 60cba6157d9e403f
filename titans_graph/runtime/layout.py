"""The layout: where each token of a call stands on the grid. Runs outside the compiled regions, on the CPU.

Every (row, document) run starts at a multiple of the period, and a run that continues one of an earlier call starts at its
phase, so that chunks and segments of all rows begin at the same slots whatever the rows' histories are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_graph.lowering.demand import demand
from titans_graph.shapes import Clock

SMALLEST_ROOM = 16
# A grid of one chunk would be compiled apart (torch specialises on sizes 0 and 1).
LEAST_PERIODS = 2
_SLOT = 5 * 8
"""Bytes of the layout for one slot, at least."""


@dataclass(frozen=True)
class Layout:
    """The grid of one call of ``T`` tokens a row, ``G`` slots a row (a multiple of the period).

    ``index`` ``[B, G]`` the token in each slot (any token where invalid), ``slot`` ``[B, T]`` the slot of each token; both
    None where slots and tokens coincide. ``position`` ``[B]`` and ``document`` ``[B]`` are the state after the call; no row
    has a token at or after slot ``used``.
    """

    clock: Clock
    index: Tensor | None
    slot: Tensor | None
    position: Tensor
    document: Tensor
    used: int

    def spread(self, x: Tensor) -> Tensor:
        """Tokens to slots: ``[B, T, ...] -> [B, G, ...]``."""
        return x if self.index is None else _take(x, self.index)

    def collect(self, x: Tensor) -> Tensor:
        """Slots to tokens: ``[B, G, ...] -> [B, T, ...]``."""
        return x if self.slot is None else _take(x, self.slot)

    def to(self, device: torch.device) -> Layout:
        """The layout with everything a device program reads on that device (state stays on the CPU)."""
        if device.type == "cpu":
            return self
        move = {name: getattr(self.clock, name).to(device, non_blocking=True) for name in Clock._fields}
        index = None if self.index is None else self.index.to(device)
        slot = None if self.slot is None else self.slot.to(device)
        return Layout(Clock(**move), index, slot, self.position, self.document, self.used)


def _take(x: Tensor, index: Tensor) -> Tensor:
    shape = index.shape + x.shape[2:]
    return x.gather(1, index.reshape(index.shape + (1,) * (x.dim() - 2)).expand(shape))


def room_for(position: Tensor) -> int:
    """Capacity of growing caches for documents of these lengths: the next power of two, so that it seldom changes."""
    longest = int(position.max()) if position.numel() else 0
    return max(SMALLEST_ROOM, 1 << max(0, longest - 1).bit_length())


def _room(position: Tensor, grows: bool) -> Tensor:
    """``0..R-1`` for the capacity R of growing caches; nobody reads it where none grows, however long the documents."""
    return torch.arange(room_for(position) if grows else SMALLEST_ROOM)


def token_layout(position: Tensor, document: Tensor, ids: Tensor | None, *, grows: bool = True) -> Layout:
    """The layout of a call of one token a row: position, document ``[B]``, ids ``[B, 1]`` or None.

    grows: whether the model has caches that grow, and ``room`` is as long as the longest document.
    """
    if ids is not None:
        position = torch.where(_seams(ids, position, document)[:, 0], 0, position)
        document = ids[:, -1].clone()
    rows = position.shape[0]
    after = position + 1
    clock = Clock(
        valid=torch.ones(rows, 1, dtype=torch.bool),
        position=position[:, None],
        lead=torch.zeros(rows, dtype=torch.int64),
        end=torch.ones(rows, dtype=torch.int64),
        room=_room(after, grows),
    )
    return Layout(clock, None, None, after, document, 1)


def grid_layout(
    position: Tensor, document: Tensor, ids: Tensor | None, tokens: int, period: int, *, grows: bool = True
) -> Layout:
    """The layout of a call of several tokens a row.

    position, document ``[B]`` int64 (state before the call), ids ``[B, T]`` or None (all tokens continue the row's
    document), tokens ``T``, period in slots, grows as in :func:`token_layout`.
    """
    rows = position.shape[0]
    seams = _seams(ids, position, document) if ids is not None else torch.zeros(rows, tokens, dtype=torch.bool)
    run, first, length, phase, base = _runs(seams, position, period)
    padded = (phase + length + period - 1) // period * period
    start = padded.cumsum(1) - padded
    grid = max([LEAST_PERIODS * period, *padded.sum(1).tolist()])
    demand(
        rows * grid * _SLOT, f"a call of {rows} rows on a grid of {grid} slots", "a smaller segment or chunk, fewer documents"
    )
    t = torch.arange(tokens)
    slot = start.gather(1, run) + phase.gather(1, run) + t - first.gather(1, run)
    g = torch.arange(grid)
    of = torch.searchsorted(start, g.expand(rows, grid).contiguous(), right=True) - 1
    within = g - start.gather(1, of) - phase.gather(1, of)
    valid = (within >= 0) & (within < length.gather(1, of))
    index = (first.gather(1, of) + within).clamp(0, tokens - 1)
    lead = phase[:, 0]
    last = slot[:, -1]
    final = base.gather(1, run)[:, -1] + tokens - first.gather(1, run)[:, -1]
    clock = Clock(valid, within + base.gather(1, of), lead, last + 1, _room(final, grows))
    same = grid == tokens and bool(valid.all())
    after = ids[:, -1].clone() if ids is not None else document
    return Layout(clock, None if same else index, None if same else slot, final, after, max([1, *(last + 1).tolist()]))


def _seams(ids: Tensor, position: Tensor, document: Tensor) -> Tensor:
    """Where a new document begins, ``[B, T]``: the id differs from that of the token before."""
    before = torch.cat([document[:, None], ids[:, :-1]], dim=1)
    seams = ids != before
    seams[:, 0] &= position > 0
    return seams


def _runs(seams: Tensor, position: Tensor, period: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The runs of one document in each row.

    Returns run ``[B, T]`` (number of the run of each token) and, each ``[B, R]`` for R runs (empty ones at the end have
    length 0): first token, length, phase (slots of its first period already filled) and base (position of its first token).
    """
    rows, tokens = seams.shape
    starts_new = seams[:, 0]
    marks = seams.clone()
    marks[:, 0] = False
    run = marks.to(torch.int64).cumsum(1)
    count = int(run.max()) + 1 if rows else 1
    length = torch.zeros(rows, count, dtype=torch.int64).scatter_add_(1, run, torch.ones(rows, tokens, dtype=torch.int64))
    first = length.cumsum(1) - length
    base = torch.zeros(rows, count, dtype=torch.int64)
    base[:, 0] = torch.where(starts_new, 0, position)
    return run, first, length, base % period, base


def pieces(clock: Clock, size: int, used: int) -> list[Clock]:
    """The clocks of successive pieces of ``size`` slots, up to slot ``used``; what calls on the pieces alone would see."""
    rows, grid = clock.valid.shape
    count = grid // size
    valid = clock.valid.view(rows, count, size).transpose(0, 1).contiguous()
    position = clock.position.reshape(rows, count, size).transpose(0, 1).contiguous()
    offsets = torch.arange(count, device=clock.lead.device)[:, None] * size
    lead = (clock.lead - offsets).clamp(0, size)
    slots = torch.arange(1, size + 1, device=clock.lead.device)
    last = (valid * slots).amax(-1)
    end = torch.where(last > 0, last, lead)
    return [Clock(valid[n], position[n], lead[n], end[n], clock.room) for n in range(-(-used // size))]
