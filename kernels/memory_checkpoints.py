"""Which chunks of a scan leave their first weights and momenta for the backward pass, and which are computed again.

A checkpoint costs the size of all weights and momenta; a chunk without one costs its update once more. The backward pass goes
from checkpoint to checkpoint, on a processor row by row (a row is a head of a sequence), so that a state is still in a core's
second cache when the next is made of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EVERY = 8
"""Chunks from one checkpoint to the next: 0.5 KB a head and token in float32 for 64 -> 256 -> 64 and chunks of 64."""


def storage(steps: int, every: int, state: Sequence[Tensor]) -> list[Tensor]:
    """Room for the checkpoints of ``steps`` chunks, for every weight and momentum ``[N, *shape]``: flat, one value longer.

    A compiled region would be specialised on a size of 1, which the number of checkpoints may be.
    """
    return [x.new_empty((steps + every - 1) // every * x.numel() + 1) for x in state]


def slots(flat: Sequence[Tensor], steps: int, every: int, state: Sequence[Tensor]) -> list[Tensor]:
    """What :func:`storage` made, as ``[checkpoints, N, *shape]``."""
    return [x[:-1].view((steps + every - 1) // every, *like.shape) for x, like in zip(flat, state, strict=True)]


def owned(values: Sequence[Tensor]) -> list[Tensor]:
    """The values, each in a contiguous tensor with a storage of its own."""
    taken: set[int] = set()
    result = []
    for x in values:
        storage = x.untyped_storage()
        if not x.is_contiguous() or storage.nbytes() != x.numel() * x.element_size() or storage.data_ptr() in taken:
            x = x.clone(memory_format=torch.contiguous_format)
        taken.add(x.data_ptr())
        result.append(x)
    return result
