# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
"""What the memory's Triton kernels share: places in the plan's tables, activations and objectives with their derivatives."""

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ("stride", "heads", "total")
"""Numbers that a kernel is not built anew for, where they are 1 or multiples of 16: what is built ahead of time is launched."""


@triton.jit
def chunk_place(chunks, n):
    """The sequence (-1: no such chunk), the number in it and the flags of chunk ``n`` of the plan."""
    entry = chunks + n * 4
    return tl.load(entry).to(tl.int64), tl.load(entry + 1).to(tl.int64), tl.load(entry + 2)


@triton.jit
def activation(z, KIND: tl.constexpr):
    """The activation of ``z`` (fp32): silu, gelu (exact) or relu2."""
    if KIND == "silu":
        return z * tl.sigmoid(z)
    if KIND == "gelu":
        return z * 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    positive = tl.maximum(z, 0.0)
    return positive * positive


@triton.jit
def activation_slope(z, KIND: tl.constexpr):
    """The activation's first derivative at ``z``."""
    if KIND == "silu":
        s = tl.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    if KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    return 2.0 * tl.maximum(z, 0.0)


@triton.jit
def activation_bend(z, KIND: tl.constexpr):
    """The activation's second derivative at ``z``."""
    if KIND == "silu":
        s = tl.sigmoid(z)
        return s * (1.0 - s) * (2.0 + z * (1.0 - 2.0 * s))
    if KIND == "gelu":
        return 0.3989422804014327 * tl.exp(-0.5 * z * z) * (2.0 - z * z)
    return tl.where(z > 0.0, 2.0, 0.0)


@triton.jit
def surprise(prediction, value, KIND: tl.constexpr, PARAMETER: tl.constexpr):
    """The objective's derivative by the prediction: l2, dot or huber."""
    if KIND == "l2":
        return 2.0 * (prediction - value)
    if KIND == "dot":
        return -value
    return tl.minimum(tl.maximum(prediction - value, -PARAMETER), PARAMETER)


@triton.jit
def surprise_slope(delta, KIND: tl.constexpr, PARAMETER: tl.constexpr):
    """The objective's second derivative by the prediction, from its first."""
    if KIND == "l2":
        return tl.full(delta.shape, 2.0, tl.float32)
    if KIND == "dot":
        return tl.zeros(delta.shape, tl.float32)
    return tl.where(tl.abs(delta) < PARAMETER, 1.0, 0.0)


@triton.jit
def surprise_by_value(delta, KIND: tl.constexpr, PARAMETER: tl.constexpr):
    """The derivative of :func:`surprise` by the value."""
    if KIND == "dot":
        return tl.full(delta.shape, -1.0, tl.float32)
    return -surprise_slope(delta, KIND, PARAMETER)


@triton.jit
def dot(a, b):
    """``a @ b`` with sums in fp32; fp32 operands are not rounded."""
    return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def add_dot(total, a, b):
    """``total + a @ b``."""
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def sequence_place(sequences, chunks, n, h, stride, C: tl.constexpr):
    """Of chunk ``n``: its sequence (-1: none), flags, head ``h``'s first token, where its ``valid`` begins, slots left."""
    number, c, flags = chunk_place(chunks, n)
    entry = sequences + tl.maximum(number, 0) * 5
    return (
        number,
        flags,
        tl.load(entry) + h * stride + c * C,
        tl.load(entry + 1) + c * C,
        tl.load(entry + 2) - c * C,
    )


@triton.jit
def valid_slots(valid, where, length, C: tl.constexpr):
    """Which of the chunk's slots hold a token, ``[C]``."""
    i = tl.arange(0, C)
    return tl.load(valid + where + i, mask=i < length, other=0) != 0


@triton.jit
def grid_of(rows: tl.constexpr, columns: tl.constexpr):
    """Offsets ``[rows, columns]`` of a contiguous matrix."""
    return tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
