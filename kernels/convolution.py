"""Depthwise causal convolution on the grid of one call; used by ``conv.causal`` and by the neural memory's streams."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titans_graph.kernels.timeline import Clock, extend, last


@torch.library.custom_op("titans_graph::taps", mutates_args=())
def _rows(weight: Tensor) -> Tensor:
    """A row a tap, ``[K, D]``.

    An operator of its own, because Inductor would read through a plain copy: columns, value by value, for every token.
    """
    return weight.t().contiguous()


@_rows.register_fake
def _(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[1], weight.shape[0])


_rows.register_autograd(lambda ctx, grad: grad.t())


def causal_conv(x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None, clock: Clock) -> tuple[Tensor, Tensor]:
    """``y_t = sum_j weight[:, j] * x_(t-j) (+ bias)`` within each document, and the tail for the next call.

    x ``[B, G, D]``; tail ``[B, K - 1, D]``, the last inputs of earlier calls, oldest first; weight ``[D, K]``, K >= 2,
    column j is the tap at distance j; bias ``[D]`` or None -> y ``[B, G, D]``, new tail ``[B, K - 1, D]``.
    A tap that would reach past the start of its document adds nothing.
    """
    kernel, slots = weight.shape[1], x.shape[1]
    joined = extend(tail, x, clock.lead)
    taps = _rows(weight) if torch.compiler.is_compiling() and slots != 1 and x.device.type == "cpu" else weight.t()
    # The token's own tap reads the joined stream as well: then only that has to be kept for backward.
    y = joined[:, kernel - 1 :] * taps[0]
    for j in range(1, kernel):
        start = kernel - 1 - j
        inside = (clock.position >= j)[..., None]
        y = y + torch.where(inside, joined[:, start : start + slots] * taps[j], 0.0)
    if bias is not None:
        y = y + bias
    return y, last(joined, clock.end, kernel - 1)


def near_identity(channels: int, taps: int) -> nn.Parameter:
    """Weights ``[channels, taps]`` to begin with: the token's own tap near 1, the others small noise."""
    weight = 0.02 * torch.randn(channels, taps)
    weight[:, 0] += 1.0
    return nn.Parameter(weight)
