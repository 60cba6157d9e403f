"""Depthwise causal convolution on the grid of one call; used by ``conv.causal`` and by the neural memory's streams."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_graph.kernels import native_convolution
from titans_graph.kernels.precision import running
from titans_graph.kernels.timeline import Clock, extend, last
from titans_graph.kernels.undisturbed import undisturbed


def short_convolution(
    x: Tensor,
    tail: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    clock: Clock,
    *,
    heads: int = 1,
    activated: bool = False,
    unit: bool = False,
) -> tuple[Tensor, Tensor]:
    """``z_t = sum_j weight[:, j] * x_(t-j) (+ bias)`` within each document, by heads, and the tail for the next call.

    x ``[B, G, D]``; tail ``[B, K - 1, D]``, the last inputs of earlier calls, oldest first; weight ``[D, K]``, K >= 2,
    column j is the tap at distance j; bias ``[D]`` or None -> y ``[B, heads, G, D / heads]``, new tail ``[B, K - 1, D]``.
    A tap that would reach past the start of its document adds nothing. ``activated``: y is SiLU(z); ``unit``: a head's vector
    is divided by its norm (arXiv 2501.00663, section 4.4, has both). In a compiled region on a processor a weight that is not
    finite spoils the first tokens of a document as well, which it does not reach.
    """
    arguments = x, tail, weight, bias, clock.position, clock.lead, clock.end
    if not torch.compiler.is_compiling() or x.shape[1] == 1 or x.device.type != "cpu":
        return _plain(*arguments, heads, activated, unit)
    # In a compiled region on a processor an operator of its own: see native_convolution.
    kind = torch.promote_types(torch.promote_types(x.dtype, tail.dtype), weight.dtype)
    inside = running(x.new_empty(0, dtype=kind)).dtype
    streams = (v if v is None else v.to(inside) for v in arguments[:4])
    y, after = convolution_op(*streams, *arguments[4:], heads, activated, unit)
    return y.to(kind), after.to(torch.promote_types(x.dtype, tail.dtype))


def by_heads(x: Tensor, heads: int, *, activated: bool, unit: bool) -> Tensor:
    """What follows a convolution: z ``[B, G, D]`` -> y ``[B, heads, G, D / heads]``."""
    y = (F.silu(x) if activated else x).reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)
    return F.normalize(y, dim=-1) if unit else y


def _plain(
    x: Tensor,
    tail: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    lead: Tensor,
    end: Tensor,
    heads: int,
    activated: bool,
    unit: bool,
) -> tuple[Tensor, Tensor]:
    """As tensor operations."""
    kernel, slots = weight.shape[1], x.shape[1]
    joined, taps = extend(tail, x, lead), weight.t()
    # The token's own tap reads the joined stream as well: then only that has to be kept for backward.
    y = joined[:, kernel - 1 :] * taps[0]
    for j in range(1, kernel):
        start = kernel - 1 - j
        inside = (position >= j)[..., None]
        y = y + torch.where(inside, joined[:, start : start + slots] * taps[j], 0.0)
    if bias is not None:
        y = y + bias
    return by_heads(y, heads, activated=activated, unit=unit), last(joined, end, kernel - 1)


@torch.library.custom_op("titans_graph::short_convolution", mutates_args=())
def convolution_op(
    x: Tensor,
    tail: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    lead: Tensor,
    end: Tensor,
    heads: int,
    activated: bool,
    unit: bool,
) -> list[Tensor]:
    """``[y, new tail]`` of :func:`short_convolution`, in float32 or float64."""
    library = native_convolution.library(weight.shape[1])
    if library is None:
        y, after = _plain(x, tail, weight, bias, position, lead, end, heads, activated, unit)
        return [y.contiguous(), after.contiguous()]
    y, after = _results(x, tail, heads)
    given = _named(x, tail, weight, bias, position, lead, end)
    native_convolution.run(library.forward, given | {"y": y, "tail_out": after}, heads, activated=activated, unit=unit)
    return [y, after]


@convolution_op.register_fake
def _(
    x: Tensor,
    tail: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    lead: Tensor,
    end: Tensor,
    heads: int,
    activated: bool,
    unit: bool,
) -> list[Tensor]:
    return list(_results(x, tail, heads))


@torch.library.custom_op("titans_graph::short_convolution_backward", mutates_args=())
def convolution_backward_op(
    x: Tensor,
    tail: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    lead: Tensor,
    end: Tensor,
    heads: int,
    activated: bool,
    unit: bool,
    y: Tensor,
    after: Tensor,
) -> list[Tensor]:
    """Cotangents of x, tail, weight and bias (empty without one) from those of ``y`` and the new tail."""
    library = native_convolution.library(weight.shape[1])
    if library is None:
        rest = position, lead, end, heads, activated, unit
        return undisturbed(lambda: _pullback(x, tail, weight, bias, rest, (y, after)))
    given = _named(x, tail, weight, bias, position, lead, end) | {"gy": y.contiguous(), "gtail_out": after.contiguous()}
    gx, gtail = (v.new_empty(v.shape) for v in (x, tail))
    parts = x.new_empty(x.shape[0], weight.shape[1] + 1, x.shape[2])
    made = {"gx": gx, "gtail": gtail, "gtaps": parts}
    native_convolution.run(library.backward, given | made, heads, activated=activated, unit=unit)
    sums = parts.sum(0)
    return [gx, gtail, sums[:-1].t().contiguous(), x.new_empty(0) if bias is None else sums[-1].clone()]


@convolution_backward_op.register_fake
def _(
    x: Tensor,
    tail: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    lead: Tensor,
    end: Tensor,
    heads: int,
    activated: bool,
    unit: bool,
    y: Tensor,
    after: Tensor,
) -> list[Tensor]:
    return [*(v.new_empty(v.shape) for v in (x, tail, weight)), x.new_empty(0 if bias is None else bias.shape)]


def _results(x: Tensor, tail: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, slots, dim = x.shape
    return x.new_empty(batch, heads, slots, dim // heads), tail.new_empty(tail.shape)


def _named(
    x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor, lead: Tensor, end: Tensor
) -> dict[str, Tensor]:
    """The arguments as the native code has them."""
    tensors = {"x": x, "tail": tail, "taps": weight.t(), "position": position, "lead": lead, "end": end}
    return {n: v.contiguous() for n, v in (tensors if bias is None else tensors | {"bias": bias}).items()}


def _pullback(
    x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None, rest: tuple[Any, ...], ends: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """The cotangents by tensor operations."""
    given = [x, tail, weight, *([] if bias is None else [bias])]
    none = [None] * (4 - len(given))
    back = torch.func.vjp(lambda *v: _plain(*v, *none, *rest), *given)[1]
    return [*(v.contiguous() for v in back(ends)), *(x.new_empty(0) for _ in none)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.options = inputs[7:]
    ctx.save_for_backward(*inputs[:7])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    gx, gtail, gweight, gbias = convolution_backward_op(*saved, *ctx.options, *grads)
    return gx, gtail, gweight, None if saved[3] is None else gbias, *[None] * 6


convolution_op.register_autograd(_backward, setup_context=_setup_context)


def near_identity(channels: int, taps: int) -> nn.Parameter:
    """Weights ``[channels, taps]`` to begin with: the token's own tap near 1, the others small noise."""
    weight = 0.02 * torch.randn(channels, taps)
    weight[:, 0] += 1.0
    return nn.Parameter(weight)
