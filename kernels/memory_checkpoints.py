"""Which chunks of a scan leave their first weights and momenta for the backward pass, and which are computed again.

A checkpoint costs the size of all weights and momenta; a chunk without one costs the update of that chunk once more. So every
chunk has one while all of them together stay within :data:`ROOM`, which long sequences and wide batches do not: then every
second has, and at last every fourth, whatever that takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

AUTOMATIC = -1
"""The spacing is chosen by the rule above."""

ROOM = 16 << 20
"""Bytes of checkpoints up to which they are closer than every :data:`WIDEST` chunks. Within it they save 7 % of a training step
(1,024 tokens of the usual memory with 4 heads); beyond, writing them costs more than computing chunks again."""

WIDEST = 4

SPARE = 1
"""Slots for checkpoints that are never used: a compiled region would be specialised on a size of 1."""


def size_of(state: Sequence[Tensor]) -> int:
    """Bytes of all tensors of a checkpoint."""
    return sum(x.numel() * x.element_size() for x in state)


def spacing(steps: int, every: int, size: int) -> int:
    """Chunks from one checkpoint to the next, for ``steps`` chunks and checkpoints of ``size`` bytes; ``every`` where given."""
    if every != AUTOMATIC:
        return every
    return next((n for n in (1, 2) if -(-steps // n) * size <= ROOM), WIDEST)


def slots(steps: int, every: int, size: int) -> int:
    """Slots that are enough for the checkpoints; one formula for all numbers of chunks, which may be symbols."""
    if every != AUTOMATIC:
        return (steps + every - 1) // every + SPARE
    symbols: Any = torch
    most: int = symbols.sym_max(symbols.sym_min(steps, ROOM // max(size, 1)), (steps + WIDEST - 1) // WIDEST)
    return most + SPARE
