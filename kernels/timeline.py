"""Moving along the grid of one call: joining the end of an earlier call's stream to the left of this one's.

Used by every component with a look-back (convolution, attention over a window). See :class:`titans_graph.shapes.Clock`
for the grid; ``lead`` and ``end`` below are its fields.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Clock(Protocol):
    """What kernels read of :class:`titans_graph.shapes.Clock`, which see (kernels stand apart from the compiler)."""

    @property
    def valid(self) -> Tensor:
        """``[B, G]`` bool."""

    @property
    def position(self) -> Tensor:
        """``[B, G]`` int64."""

    @property
    def lead(self) -> Tensor:
        """``[B]`` int64."""

    @property
    def end(self) -> Tensor:
        """``[B]`` int64."""

    @property
    def room(self) -> Tensor:
        """``[R]`` int64."""


def extend(tail: Tensor, x: Tensor, lead: Tensor) -> Tensor:
    """Put the last ``K`` elements of earlier calls in front of a stream.

    tail ``[B, K, ...]`` (oldest first), x ``[B, G, ...]``, lead ``[B]`` -> ``[B, K + G, ...]`` whose element ``K + s``
    is slot ``s`` and whose elements to the left of slot ``lead`` are the tail, last one at slot ``lead - 1``.
    """
    k = tail.shape[1]
    joined = torch.cat([tail, x], dim=1)
    i = torch.arange(joined.shape[1], device=x.device)
    shifted = (i - lead[:, None]).clamp(min=0)
    index = torch.where(i < k + lead[:, None], shifted, i)
    return take(joined, index)


def last(extended: Tensor, end: Tensor, k: int) -> Tensor:
    """The ``k`` elements that stand before slot ``end`` in a stream extended by ``k``: the tail for the next call.

    extended ``[B, k + G, ...]``, end ``[B]`` -> ``[B, k, ...]``.
    """
    return take(extended, end[:, None] + torch.arange(k, device=end.device))


def take(x: Tensor, index: Tensor) -> Tensor:
    """Pick along time: x ``[B, N, ...]``, index ``[B, M]`` int64 -> ``[B, M, ...]``."""
    shape = index.shape + x.shape[2:]
    return x.gather(1, index.reshape(index.shape + (1,) * (x.dim() - 2)).expand(shape))
