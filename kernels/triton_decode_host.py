"""Launches the Triton kernels that decode: one token per row, with a state that changes in place.

Plain functions on tensors; nothing is read on the host, so a step can be captured in a CUDA graph. A state comes from, and
turns back into, anchor, weights and momenta at any token. Shapes as in triton_decode.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_graph.errors import UsageError
from titans_graph.kernels.triton_config import Config, Description, Kernel, Sizes, config
from titans_graph.kernels.triton_decode import decode_write_kernel, linear_decode_kernel, mlp_decode_kernel
from titans_graph.kernels.triton_host import State, Tokens

OPERANDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Ring(NamedTuple):
    """A memory between two writings of its weights; every tensor is changed in place by :func:`decode`.

    ``inputs`` and ``deltas``: one ring per layer. The rest as in triton_decode.py.
    """

    m: Tensor
    s: Tensor
    near: Tensor
    inputs: list[Tensor]
    deltas: list[Tensor]
    shares: Tensor
    ends: Tensor
    scale: Tensor
    apart: Tensor


def begin(sizes: Sizes, state: State, scale: Tensor | None = None) -> Ring:
    """A ring that goes on from a state ``[B, H, *shape]`` (fp32, layer 2 transposed), at any place in a chunk.

    ``scale`` ``[B, H]``: what the step of the present chunk is multiplied by; needed where ``sizes.bounded``.
    """
    if not supports(sizes):
        raise UsageError(f"no kernel decodes a memory of {sizes}")
    if sizes.bounded and scale is None:
        raise UsageError("a bounded memory needs the scale of the present chunk's steps")
    anchor, m, s = (x.detach().float().flatten(0, 1).contiguous() for x in state)
    rows, c, deep, widths = len(m), sizes.chunk, sizes.hidden > 0, (sizes.dim, sizes.hidden or sizes.dim)
    operand = OPERANDS[sizes.dtype]
    near = torch.stack([m, s, anchor], 1).to(operand)

    def ring(width: int) -> Tensor:
        return near.new_zeros(rows, c, width)

    inputs, deltas = ([ring(width) for width in order[: 1 + deep]] for order in (widths, widths[::-1]))
    ends = m.new_tensor([1.0, 0.0, 1.0]).repeat(rows, 1)
    one = m.new_ones(rows) if scale is None else scale.detach().float().flatten().clone()
    apart = torch.ones(rows, dtype=torch.int32, device=m.device)
    return Ring(m.clone(), s.clone(), near, inputs, deltas, m.new_zeros(rows, 2, c), ends, one, apart)


def settled(sizes: Sizes, ring: Ring, batch: int) -> State:
    """Anchor, M and S of the last token, fp32 ``[B, H, *shape]``; the ring is left as it is.

    The anchor is rounded as the operands are.
    """
    (w, s), (a0, f, e0) = ring.shares.unbind(1), ring.ends.unbind(1)
    updates = [
        tuple((share[..., None] * u.float()).mT @ d.float() for share in (w, s))
        for u, d in zip(ring.inputs, ring.deltas, strict=True)
    ]
    if sizes.hidden:
        (w1, s1), (w2, s2) = updates
        by_m, by_s = torch.stack([w1, w2.mT], 1), torch.stack([s1, s2.mT], 1)
    else:
        by_m, by_s = updates[0]
    one = (-1, *[1] * (ring.m.dim() - 1))
    m = a0.view(one) * ring.m + f.view(one) * ring.s - by_m
    momenta = e0.view(one) * ring.s - by_s
    anchor = torch.where(ring.apart.view(one) != 0, ring.near[:, 2].float(), ring.near[:, 0].float())
    return State(*(x.view(batch, -1, *x.shape[1:]) for x in (anchor, m, momenta)))


def decode(
    sizes: Sizes, parameter: float, ring: Ring, tokens: Tokens, position: Tensor, start_m: Tensor, start_s: Tensor
) -> Tensor:
    """Write and read one token per row: y like q; ``ring`` is changed in place.

    ``tokens``: q, k, v ``[B, H, 1, d]`` in the operands' type and gates ``[B, H, 1]`` fp32. ``position`` int64 ``[B]``: below
    0 where a row has no token (y is 0, the ring stays); at 0 the row restarts from ``start_m``, ``start_s``, fp32
    ``[B, H, *shape]`` or ``[H, *shape]`` for all rows. ``parameter``: the objective's number. One operator inside a compiled
    region.
    """
    run = decode_op if torch.compiler.is_compiling() else _decode
    rest = ring.inputs, ring.deltas, ring.shares, ring.ends, ring.scale, ring.apart
    form = sizes.chunk, sizes.hidden, sizes.dtype, sizes.activation, sizes.objective, sizes.read, sizes.bounded, parameter
    return run(*form, ring.m, ring.s, ring.near, *rest, list(tokens), position, start_m, start_s)


def _decode(
    chunk: int,
    hidden: int,
    dtype: str,
    activation: str,
    objective: str,
    read: str,
    bounded: bool,
    parameter: float,
    m: Tensor,
    s: Tensor,
    near: Tensor,
    inputs: Sequence[Tensor],
    deltas: Sequence[Tensor],
    shares: Tensor,
    ends: Tensor,
    scale: Tensor,
    apart: Tensor,
    tokens: Sequence[Tensor],
    position: Tensor,
    start_m: Tensor,
    start_s: Tensor,
) -> Tensor:
    """:func:`decode` on plain arguments."""
    q, k, v, step, log_momentum, log_keep = (x.contiguous() for x in tokens)
    y, heads, rows = torch.empty_like(q), q.shape[1], len(m)
    if rows == 0:
        return y
    sizes = Sizes(chunk, q.shape[-1], hidden, dtype, activation, objective, read, bounded=bounded)
    ring = Ring(m, s, near, list(inputs), list(deltas), shares, ends, scale, apart)
    write(sizes, ring, position, heads, start_m.contiguous(), start_s.contiguous())
    given = q, k, v, step, log_momentum, log_keep, position, near
    if hidden:
        rings = [x for pair in zip(inputs, deltas, strict=True) for x in pair]
        args = (*given, *rings, shares, ends, scale, apart, y, heads)
        _launch("mlp_decode", mlp_decode_kernel, (rows,), sizes, args, PARAMETER=parameter)
    else:
        args = (*given, *inputs, *deltas, shares, ends, apart, y, heads)
        _launch("linear_decode", linear_decode_kernel, (rows,), sizes, args, PARAMETER=parameter)
    return y


decode_op = torch.library.custom_op(
    "titans_graph::memory_decode",
    _decode,
    mutates_args=("m", "s", "near", "inputs", "deltas", "shares", "ends", "scale", "apart"),
)


@decode_op.register_fake
def _(*args: Any) -> Tensor:
    return torch.empty_like(args[17][0], memory_format=torch.contiguous_format)


def write(sizes: Sizes, ring: Ring, position: Tensor, heads: int, start_m: Tensor, start_s: Tensor) -> None:
    """Write M and S in the rows whose token at ``position`` begins a chunk."""
    size = ring.m[0].numel()
    for layer, (inputs, deltas) in enumerate(zip(ring.inputs, ring.deltas, strict=True)):
        columns = sizes.hidden or sizes.dim
        start = start_m, start_s, start_m.numel() // size
        args = (position, ring.m, ring.s, ring.near, inputs, deltas, ring.shares, ring.ends, *start, heads)
        tiles = columns // tile_of(sizes, config("decode_write", sizes))
        place = layer * sizes.dim * columns, size
        _launch("decode_write", decode_write_kernel, (len(ring.m), tiles), sizes, (*args, *place), SWAPPED=layer == 1)


def _launch(name: str, function: Any, grid: tuple[int, ...], sizes: Sizes, args: tuple[Any, ...], **given: Any) -> None:
    """Never autotuned: a launch changes its arguments."""
    chosen = config(name, sizes)
    values = _constants(function, sizes, chosen) | given
    function[grid](*args, **values, num_warps=chosen.num_warps, num_stages=chosen.num_stages)


def tile_of(sizes: Sizes, chosen: Config) -> int:
    """The tile of the hidden size (of the value columns of a linear memory): a power of 2 that divides it."""
    width = sizes.hidden or sizes.dim
    return min(chosen.tile or 64, width & -width)


def supports(sizes: Sizes) -> bool:
    """Sizes that the kernels know: powers of 2 from 16, a hidden size that is a multiple of 16."""
    powers = all(16 <= x <= 256 and x & (x - 1) == 0 for x in (sizes.dim, sizes.chunk))
    return powers and sizes.hidden % 16 == 0 and not (sizes.hidden and sizes.dim > 128) and not sizes.resumed


def _constants(function: Any, sizes: Sizes, chosen: Config) -> dict[str, Any]:
    values = {
        "C": sizes.chunk,
        "D": sizes.dim,
        "HIDDEN": sizes.hidden,
        "TILE": tile_of(sizes, chosen),
        "ACT": sizes.activation,
        "OBJECTIVE": sizes.objective,
        "PARAMETER": 1.0,
        "BOUNDED": sizes.bounded,
        "READ": sizes.read,
        "ROWS": sizes.dim,
        "COLUMNS": sizes.hidden or sizes.dim,
        "SWAPPED": sizes.hidden > 0,
    }
    return {name: values[name] for name in function.arg_names if name in values}


_FP32 = {"step", "log_momentum", "log_keep", "shares", "ends", "scale", "m", "s", "start_m", "start_s"}
_OTHERS = {"position": "*i64", "apart": "*i32", "heads": "i32", "start_rows": "i32", "offset": "i32:16", "size": "i32:16"}


def _describe(function: Any, sizes: Sizes, chosen: Config) -> Description:
    constants = _constants(function, sizes, chosen)
    operand = f"*{sizes.dtype}"
    names = [name for name in function.arg_names if name not in constants]
    return {name: _OTHERS.get(name, "*fp32" if name in _FP32 else operand) for name in names}, constants


KERNELS = (
    Kernel(
        "linear_decode", linear_decode_kernel, partial(_describe, linear_decode_kernel), lambda s: supports(s) and not s.hidden
    ),
    Kernel("mlp_decode", mlp_decode_kernel, partial(_describe, mlp_decode_kernel), lambda s: supports(s) and s.hidden > 0),
    Kernel("decode_write", decode_write_kernel, partial(_describe, decode_write_kernel), supports),
)
