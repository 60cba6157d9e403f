# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
"""Triton kernel of a linear memory, backward: the reverse scan. Formulas and arrays: triton_linear_backward.py."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from titans_graph.kernels.triton_common import COUNTS, add_dot, dot, grid_of, surprise_by_value, surprise_slope
from titans_graph.kernels.triton_config import Config, Kernel, Sizes
from titans_graph.kernels.triton_linear import argument_types, columns_of, constants, holds, scan_tile, supported


@triton.jit
def delta_cotangent(keys, now, moves, gates, d_deltas, C: tl.constexpr, READ: tl.constexpr):
    """The cotangent of a tile's deltas: from the chunk's end, and from reading."""
    d_delta = -tl.load(gates + 2 * C)[:, None] * dot(keys, now) - tl.load(gates + 3 * C)[:, None] * dot(keys, moves)
    if READ != "chunk":
        d_delta += tl.load(d_deltas).to(tl.float32)
    return d_delta


@triton.jit
def read_cotangents(now, moves, queries, d_answer, gates, begins, C: tl.constexpr, READ: tl.constexpr):
    """The cotangents of M and S with what reading adds: where all read the chunk's first weights, if it ``begins`` here."""
    asked = tl.trans(queries)
    if READ == "chunk":
        now = add_dot(now, asked, tl.where(begins, d_answer, 0.0))
    else:
        now = add_dot(now, asked, (tl.load(gates)[:, None] * d_answer).to(d_answer.dtype))
        moves = add_dot(moves, asked, (tl.load(gates + C)[:, None] * d_answer).to(d_answer.dtype))
    return now, moves


@triton.jit
def through_objective(d_delta, deltas, KIND: tl.constexpr, PARAMETER: tl.constexpr):
    """Cotangents of the values and of the predictions from those of the deltas."""
    delta = d_delta
    if KIND == "huber":
        delta = tl.load(deltas).to(tl.float32)
    return surprise_by_value(delta, KIND, PARAMETER) * d_delta, surprise_slope(delta, KIND, PARAMETER) * d_delta


@triton.jit
def give_starts(
    d_m, d_s, d_start_m, d_start_s, d_states, d_moving, now, moves, chunks, base, count, heads, h, restarts, D: tl.constexpr
):  # fmt: skip
    """Write the cotangents of the entry's state and of the initial one, which several chunks may have restarted from."""
    fresh = (tl.load(chunks + base * 4 + 2, mask=count > 0, other=0) & 2) != 0
    tl.store(d_m, tl.where(fresh, 0.0, now))
    tl.store(d_s, tl.where(fresh, 0.0, moves))
    now = tl.where(fresh, now, 0.0)
    moves = tl.where(fresh, moves, 0.0)
    if restarts > 0:
        # Other threads wrote what is read here.
        tl.debug_barrier()
        for c in tl.range(1, count, num_stages=1):
            if (tl.load(chunks + (base + c) * 4 + 2) & 2) != 0:
                before = ((base + c - 1) * heads + h) * D * D
                now += tl.load(d_states + before).to(tl.float32)
                moves += tl.load(d_moving + before).to(tl.float32)
    tl.store(d_start_m, now)
    tl.store(d_start_s, moves)


@triton.jit
def late_cotangent(
    held, q, k, d_y, d_v, chunks, n, tokens, values,
    C: tl.constexpr, D: tl.constexpr, T: tl.constexpr, OBJECTIVE: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """The cotangent of the entry's anchor with what a chunk that began before adds."""
    # Other threads wrote what is read here.
    tl.debug_barrier()
    span = tl.load(chunks + n * 4 + 3)
    for j in range(C // T):
        ok = holds(span, j * T, T)
        if READ == "chunk":
            queries = tl.load(q + j * T * D + tokens, mask=ok, other=0.0)
            held = add_dot(held, tl.trans(queries), tl.load(d_y + j * T * D + values, mask=ok, other=0.0))
        if OBJECTIVE != "dot":
            # The derivative by the value is minus that by the prediction.
            keys = tl.load(k + j * T * D + tokens, mask=ok, other=0.0)
            held -= dot(tl.trans(keys), tl.load(d_v + j * T * D + values, mask=ok, other=0.0))
    return held


@triton.jit(do_not_specialize=COUNTS)
def linear_reverse_kernel(
    q, k, d_y, vectors, ends, sequences, chunks, deltas, d_deltas, d_m_out, d_s_out, d_anchor_out,
    d_v, d_states, d_moving, d_m, d_s, d_anchor, d_start_m, d_start_s, stride, heads,
    C: tl.constexpr, D: tl.constexpr, V: tl.constexpr, T: tl.constexpr, OBJECTIVE: tl.constexpr, PARAMETER: tl.constexpr,
    READ: tl.constexpr, RESUMED: tl.constexpr, RESTARTS: tl.constexpr,
):  # fmt: skip
    """The cotangents of M and S from right to left, of a sequence, head and ``V`` value columns; and dv."""
    number, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    operand = k.dtype.element_ty
    first = tl.load(sequences + number * 5) + h * stride
    length = tl.load(sequences + number * 5 + 2)
    base = tl.load(sequences + number * 5 + 3)
    last_first = tl.load(sequences + number * 5 + 4)
    tokens = grid_of(T, D)
    values = columns_of(T, D, V)
    cell = columns_of(D, D, V)
    i = tl.arange(0, T)
    row = (number * heads + h) * D * D
    count = (length + C - 1) // C
    now = tl.load(d_m_out + row + cell)
    moves = tl.load(d_s_out + row + cell)
    late = count * 0 - 1
    restarts = 0
    ahead = tl.load(chunks + (base + count) * 4 - 2, mask=count > 0, other=0)
    span_ahead = tl.load(chunks + (base + count) * 4 - 1, mask=count > 0, other=0)
    end = ((base + count - 1) * heads + h) * D * D + cell
    tl.store(d_states + end, now.to(operand), mask=count > 0)
    tl.store(d_moving + end, moves.to(operand), mask=count > 0)
    for back in range(count):
        c = count - 1 - back
        n = base + c
        at = n * heads + h
        flags = ahead
        span = span_ahead
        ahead = tl.load(chunks + n * 4 - 2, mask=c > 0, other=0)
        span_ahead = tl.load(chunks + n * 4 - 1, mask=c > 0, other=0)
        now_in = now.to(operand)
        moves_in = moves.to(operand)
        moves = tl.load(ends + at * 4 + 1) * now + tl.load(ends + at * 4 + 2) * moves
        now = tl.load(ends + at * 4) * now
        # Elsewhere gradients are not taken at the chunk's first weights; what they give is found below. There is one such
        # chunk in a sequence: later ones begin where their first token is, or are empty.
        begins = ((flags & 1) != 0) | (not RESUMED)
        late = tl.where(((flags & 1) == 0) & (span // 65536 > span % 65536), c, late)
        for j in range(C // T):
            start = first + c * C + j * T
            ok = holds(span, j * T, T)
            keys = tl.load(k + start * D + tokens, mask=ok, other=0.0)
            queries = tl.load(q + start * D + tokens, mask=ok, other=0.0)
            d_answer = tl.load(d_y + start * D + values, mask=ok, other=0.0)
            gates = vectors + at * 4 * C + j * T + i
            place = (at * C + j * T) * D + values
            d_delta = delta_cotangent(keys, now_in, moves_in, gates, d_deltas + place, C, READ)
            d_value, d_seen = through_objective(d_delta, deltas + place, OBJECTIVE, PARAMETER)
            d_value = tl.where(ok, d_value, 0.0).to(operand)
            tl.store(d_v + start * D + values, d_value, mask=i[:, None] < length - c * C - j * T)
            now, moves = read_cotangents(now, moves, queries, d_answer, gates, begins, C, READ)
            if OBJECTIVE != "dot":
                now = add_dot(now, tl.trans(keys), tl.where(ok & begins, d_seen, 0.0).to(operand))
        if c == last_first:
            # The address is not known before, so that it is not kept in registers through the loop.
            now += tl.load(d_anchor_out + row + cell + tl.minimum(flags, 0))
        tl.store(d_states + (at - heads) * D * D + cell, now.to(operand), mask=c > 0)
        tl.store(d_moving + (at - heads) * D * D + cell, moves.to(operand), mask=c > 0)
        if RESTARTS:  # noqa: SIM102
            if ((flags & 2) != 0) & (c > 0):
                restarts += 1
                now = tl.zeros([D, V], tl.float32)
                moves = tl.zeros([D, V], tl.float32)
    # Nor are these.
    cell_after = cell + tl.minimum(ahead, 0)
    here = row + cell_after
    if RESTARTS:
        give_starts(
            d_m + here, d_s + here, d_start_m + here, d_start_s + here, d_states + cell_after, d_moving + cell_after,
            now, moves, chunks, base, count, heads, h, restarts, D,
        )  # fmt: skip
    else:
        tl.store(d_m + here, now)
        tl.store(d_s + here, moves)
    held = tl.load(d_anchor_out + here)
    held = tl.where(last_first < 0, held, 0.0)
    if RESUMED:  # noqa: SIM102
        if late >= 0:
            start = (first + late * C) * D
            held = late_cotangent(
                held, q + start, k + start, d_y + start, d_v + start, chunks, base + late, tokens, values,
                C, D, T, OBJECTIVE, READ,
            )  # fmt: skip
    tl.store(d_anchor + here, held)


def _describe(sizes: Sizes, config: Config) -> tuple[dict[str, str], dict[str, Any]]:
    single = "vectors ends d_m_out d_s_out d_anchor_out d_m d_s d_anchor d_start_m d_start_s"
    types = argument_types(linear_reverse_kernel, sizes, single)
    return types, constants(linear_reverse_kernel, sizes, config, T=scan_tile(sizes))


KERNELS = (Kernel("linear_reverse", linear_reverse_kernel, _describe, supported),)
