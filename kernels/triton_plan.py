"""Where the chunks of a call lie: small tables on the device that every Triton kernel of the memory reads.

Two kinds of call have one form. A *grid* has the tokens ``[B, H, G, d]`` of B rows on a grid of whole chunks, some slots
invalid, with restarts inside a row (see ``memory_scan``). *Packed* sequences lie end to end in ``[1, H, T, d]`` and begin at
``offsets`` (``cu_seqlens``); each has a state of its own. Tables are made by tensor operations alone: nothing is read on the
host, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FIRST, RESTART = 1, 2
"""Flags of a chunk: it begins here (its weights become the anchor); its row restarts from the initial state."""

SLOTS = 65536
"""What the end of a chunk's tokens is multiplied by in its entry."""


class Plan(NamedTuple):
    """``sequences`` int64 ``[S, 5]``: where head 0's first token lies, where its ``valid`` begins, number of slots, number of
    its first chunk, and the last chunk (counted in the sequence) that sets the anchor, or -1. ``chunks`` int32 ``[N, 4]``:
    sequence (-1: unused), number in the sequence, flags, and the slots that hold tokens, which lie side by side: the first
    and, times 65536, the one after the last. ``valid`` int8. ``stride``: tokens from one head to the next.
    """

    sequences: Tensor
    chunks: Tensor
    valid: Tensor
    stride: int
    heads: int


def grid_plan(valid: Tensor, position: Tensor, chunk: int, heads: int) -> Plan:
    """The plan of a grid from ``valid`` and ``position`` ``[B, G]``; G is a multiple of ``chunk``."""
    batch, slots = valid.shape
    count = slots // chunk
    row = torch.arange(batch, device=valid.device)
    first = valid[:, ::chunk]
    restart = first & (position[:, ::chunk] == 0)
    number = torch.arange(count, device=valid.device).expand(batch, count)
    last = torch.where(first, number, -1).amax(1)
    length = torch.full_like(row, slots)
    sequences = torch.stack([row * (heads * slots), row * slots, length, row * count, last], 1)
    flags = first * FIRST + restart * RESTART
    slot = valid.view(batch, count, chunk).to(torch.int8)
    lead = slot.argmax(-1)
    chunks = torch.stack([row[:, None].expand_as(number), number, flags, lead + (lead + slot.sum(-1)) * SLOTS], -1)
    return Plan(sequences.contiguous(), chunks.view(-1, 4).int(), valid.contiguous().to(torch.int8), slots, heads)


def packed_chunks(tokens: int, sequences: int, chunk: int) -> int:
    """The most chunks that packed sequences of so many tokens can have."""
    return tokens // chunk + sequences


def packed_plan(offsets: Tensor, tokens: int, chunk: int, heads: int) -> Plan:
    """The plan of packed sequences; ``offsets`` int64 ``[S + 1]`` from 0 to ``tokens``, never falling.

    Chunks beyond the last one's are unused. Offsets that are not so are made so: no kernel leaves the tensors.
    """
    offsets = offsets.long().clamp(0, tokens).cummax(0).values
    start, length = offsets[:-1], offsets.diff()
    counts = (length + chunk - 1) // chunk
    ends = counts.cumsum(0)
    n = torch.arange(packed_chunks(tokens, len(start), chunk), device=offsets.device)
    sequence = torch.searchsorted(ends, n, right=True)
    used = sequence < len(start)
    inside = sequence.clamp(max=len(start) - 1)
    number = n - (ends - counts)[inside]
    flags = torch.full_like(n, FIRST)
    size = torch.where(used, (length[inside] - number * chunk).clamp(max=chunk), 0)
    chunks = torch.stack([torch.where(used, inside, -1), number, flags, size * SLOTS], 1).int()
    sequences = torch.stack([start, start, length, ends - counts, counts - 1], 1)
    valid = torch.ones(tokens, dtype=torch.int8, device=offsets.device)
    return Plan(sequences.contiguous(), chunks, valid, tokens, heads)
