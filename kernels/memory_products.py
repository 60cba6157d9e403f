"""The products of a chunk that forward keeps for backward: small ones that are dear to make again.

A product of ``[N, C, k]`` and ``[N, k, n]`` takes 2 k operations for every value. Where k is at least twice n, that of the keys
is kept: the wide hidden layer on its way back to the narrow output, which every recomputation of a state needs as well.
Everything else in a chunk is computed again from the weights at its start. For 64 -> 256 -> 64 and chunks of 64 that is 0.25 KB
a head and token in float32. (The queries' product with the keys' hidden layer would take as much for 2 % of the time.) What the
queries' hidden layer gives with M and S is not needed for its own gradients, see :func:`scaled`, and is made again only where
something nonlinear follows.

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


def kept_width(network: Network, dim: int) -> int:
    """Values a slot of all products that :class:`Products` keeps of a chunk, for keys of size ``dim``."""
    shapes = network.weights(dim)
    matrices = [shapes[name] for name in network.uses(dim) if len(shapes[name]) == 2]
    return sum(width * narrows(inner, width) for inner, width in matrices)


def scaled(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``rows * (a @ b)``, whose gradients do without ``a @ b``: rows ``[N, C, 1]``, a ``[N, C, k]`` and b ``[N, k, n]``."""
    result: Tensor = _Scaled.apply(rows, a, b)  # type: ignore[no-untyped-call]
    return result


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


class _Scaled(torch.autograd.Function):
    """The cotangent of a row's factor is ``a . (b grad)``, and that of ``a`` needs the product ``b grad`` anyway."""

    @staticmethod
    def forward(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return rows * torch.bmm(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, a, b = ctx.saved_tensors
        back = torch.bmm(grad, b.mT)
        return (a * back).sum(-1, keepdim=True), rows * back, torch.bmm(a.mT, rows * grad)
