"""The products of a chunk that forward keeps for backward: small ones that are dear to make again.

A product of ``[N, C, k]`` and ``[N, k, n]`` takes 2 k operations for every value. Where k is at least twice n the result is
kept (the wide hidden layer on its way back to the narrow output, its products with the chunk's other tokens); everything
else in a chunk is computed again from the weights at its start. For 64 -> 256 -> 64 and chunks of 64 that is 1 KB a head
and token in float32, for a tenth of backward's operations.

Shapes: ``N`` rows (batch times heads), ``C`` slots of the chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titans_graph.kernels.network_graph import Network


def narrows(inner: int, width: int) -> bool:
    """Whether a product with that inner dimension and width of the result is kept."""
    return inner >= 2 * width


def kept_width(network: Network, dim: int, chunk: int, read: str) -> int:
    """Values a slot of all products that :class:`Products` keeps of a chunk, for keys of size ``dim``."""
    shapes = network.weights(dim)
    uses = [name for name in network.uses(dim) if len(shapes[name]) == 2]
    total = 0
    for name in uses:
        inner, width = shapes[name]
        # The key pass; and for the queries, with read: chunk plain uses, the products with M, with S, and with all inputs.
        total += width * narrows(inner, width) * (1 if read == "chunk" else 3)
        total += chunk * narrows(inner, chunk) * (0 if read == "chunk" else uses.count(name))
    return total


class Products:
    """Products of a chunk in the order in which they are made: kept in a first run, ``given`` in all later ones.

    ``given``: what :meth:`made` was in the first run, ``[N, C, K]``. A given product is not computed, and differentiates
    as if it had been.
    """

    def __init__(self, given: Tensor | None = None) -> None:
        self._given, self._taken = given, 0
        self._made: list[Tensor] = []

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b``: ``[N, C, k]`` and ``[N, k, n]`` to ``[N, C, n]``."""
        if not narrows(a.shape[-1], b.shape[-1]):
            return torch.bmm(a, b)
        if self._given is None:
            self._made.append(torch.bmm(a, b))
            return self._made[-1]
        start = self._taken
        self._taken += b.shape[-1]
        known: Tensor = _Known.apply(a, b, self._given[..., start : self._taken])  # type: ignore[no-untyped-call]
        return known

    def made(self) -> list[Tensor]:
        """All that was kept, in one tensor ``[N, C, K]``; nothing where nothing was."""
        return [torch.cat(self._made, -1)] if self._made else []


class _Known(torch.autograd.Function):
    """A product whose value is known."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        return torch.bmm(grad, b.mT), torch.bmm(a.mT, grad), None
