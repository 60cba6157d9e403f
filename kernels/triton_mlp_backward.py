# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
"""Triton kernels of a memory that is an MLP of two layers, backward, part one: what needs no order.

First every activation is computed again from the chunk states and kept, tile by tile of the hidden size (``mlp_recall``). Then
the adjoint of reading in three steps, cut where a sum over the hidden size ends: the cotangents of layer 2's mixing
(``mlp_alike``), those of everything that lies in one tile (``mlp_answer_backward``), and those of queries and gates
(``mlp_query_backward``). In one kernel this spills registers; the arrays between, 512 bytes each a head and token at a hidden
size of 256, cost little beside the products. The reverse scan (triton_mlp_reverse.py) does the rest.

Arrays, in the operands' type: ``hidden``, ``slope``, ``delta_one``, ``bend``, ``x``, ``x_slope``, ``d_delta_one``,
``d_hidden`` ``[N, H, C, hidden]``: of the keys, layer 1's activation, its slope, the delta, and the delta's derivative by
the layer's product, times what came from above; of the queries, activation and slope (later the product's cotangent).
``first_part`` and ``pairs`` ``[N, H, C, C]``: W times the likeness of queries and keys, and its counterpart for layer 2's
cotangents. ``d_m``, ``d_s`` ``[N, H, 2, d, hidden]``: what reading adds to the cotangents of the chunk's first M and S. The
others as in triton_mlp.py. Formulas: docs/kernels.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans_graph.kernels.triton_common import (
    COUNTS,
    activation,
    activation_bend,
    activation_slope,
    add_dot,
    dot,
    grid_of,
    sequence_place,
    valid_slots,
)
from titans_graph.kernels.triton_mlp import key_tile


@triton.jit(do_not_specialize=COUNTS)
def mlp_recall_kernel(
    q,
    k,
    valid,
    sequences,
    chunks,
    mix,
    vectors,
    m_states,
    s_states,
    anchor,
    deltas,
    scale,
    hidden,
    slope,
    delta_one,
    bend,
    x,
    x_slope,
    first_part,
    stride,
    heads,
    C: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    ACT: tl.constexpr,
    MIXED: tl.constexpr,
    RESUMED: tl.constexpr,
):
    """The activations of one chunk, head and tile; without ``MIXED`` those of the keys alone."""
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    number, flags, first, where, length = sequence_place(sequences, chunks, n, h, stride, C)
    if number < 0:
        return
    operand = q.dtype.element_ty
    layer: tl.constexpr = D * HIDDEN
    at = n * heads + h
    begins = (flags & 1) != 0
    now_m = m_states + at * 2 * layer
    now_s = s_states + at * 2 * layer
    start = anchor + (number * heads + h) * 2 * layer
    i = tl.arange(0, C)
    tokens = grid_of(C, D)
    columns = tl.program_id(2) * TILE + tl.arange(0, TILE)[None, :]
    tile = tl.arange(0, D)[:, None] * HIDDEN + columns
    wide = at * C * HIDDEN + i[:, None] * HIDDEN + columns
    ok = valid_slots(valid, where, length, C)
    keys = tl.load(k + first * D + tokens, mask=ok[:, None], other=0.0)
    z = dot(keys, key_tile(now_m, start, tile, begins, RESUMED))
    above = dot(tl.load(deltas + at * C * D + tokens), key_tile(now_m + layer, start + layer, tile, begins, RESUMED))
    slopes = activation_slope(z, ACT)
    delta = (slopes * above).to(operand)
    tl.store(hidden + wide, activation(z, ACT).to(operand))
    tl.store(slope + wide, slopes.to(operand))
    tl.store(delta_one + wide, delta)
    tl.store(bend + wide, (activation_bend(z, ACT) * above).to(operand))
    if MIXED:
        queries = tl.load(q + first * D + tokens, mask=ok[:, None], other=0.0)
        weighting = tl.load(mix + at * C * C + grid_of(C, C)).to(tl.float32) * tl.load(scale + at)
        part = (weighting * dot(queries, tl.trans(keys))).to(operand)
        if tl.program_id(2) == 0:
            tl.store(first_part + at * C * C + grid_of(C, C), part)
        queries_m = (queries * tl.load(vectors + at * 4 * C + i)[:, None]).to(operand)
        queries_s = (queries * tl.load(vectors + at * 4 * C + C + i)[:, None]).to(operand)
        z = dot(queries_s, tl.load(now_s + tile)) - dot(part, delta)
        z = add_dot(z, queries_m, tl.load(now_m + tile))
        tl.store(x + wide, activation(z, ACT).to(operand))
        tl.store(x_slope + wide, activation_slope(z, ACT).to(operand))


@triton.jit(do_not_specialize=COUNTS)
def mlp_alike_kernel(
    d_y,
    valid,
    sequences,
    chunks,
    mix,
    deltas,
    scale,
    hidden,
    x,
    pairs,
    d_mix,
    d_delta_two,
    stride,
    heads,
    C: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Through layer 2's mixing ``y = .. - (W * x hidden^T) delta``: of the delta, of W, and ``pairs`` for both its sides."""
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    number, _, first, where, length = sequence_place(sequences, chunks, n, h, stride, C)
    if number < 0:
        return
    operand = d_y.dtype.element_ty
    at = n * heads + h
    tokens = grid_of(C, D)
    square = at * C * C + grid_of(C, C)
    wide = at * C * HIDDEN + tl.arange(0, C)[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
    alike = tl.zeros([C, C], tl.float32)
    for j in range(0, HIDDEN, TILE):
        alike = add_dot(alike, tl.load(x + wide + j), tl.trans(tl.load(hidden + wide + j)))
    ok = valid_slots(valid, where, length, C)
    answer = tl.load(d_y + first * D + tokens, mask=ok[:, None], other=0.0)
    weighting = tl.load(mix + square).to(tl.float32) * tl.load(scale + at)
    d_weighting = -dot(answer, tl.trans(tl.load(deltas + at * C * D + tokens)))
    tl.store(pairs + square, (weighting * d_weighting).to(operand))
    tl.store(d_mix + square, (d_weighting * alike).to(operand))
    tl.store(d_delta_two + at * C * D + tokens, (-dot(tl.trans((weighting * alike).to(operand)), answer)).to(operand))


@triton.jit(do_not_specialize=COUNTS)
def mlp_answer_backward_kernel(
    q,
    d_y,
    valid,
    sequences,
    chunks,
    vectors,
    m_states,
    s_states,
    hidden,
    x,
    x_slope,
    first_part,
    pairs,
    d_delta_one,
    d_hidden,
    d_m,
    d_s,
    shares,
    stride,
    heads,
    C: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
):
    """What lies in one tile: through layer 2 to ``x``, its activation, and layer 1's mixing.

    ``x_slope`` is replaced by the cotangent of the product it belongs to. ``shares`` fp32 ``[N, H, tiles, 2, C]``: this tile's
    part of the cotangents of a0 and f.
    """
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    number, _, first, where, length = sequence_place(sequences, chunks, n, h, stride, C)
    if number < 0:
        return
    operand = q.dtype.element_ty
    layer: tl.constexpr = D * HIDDEN
    at = n * heads + h
    now_m = m_states + at * 2 * layer
    now_s = s_states + at * 2 * layer
    into_m = d_m + at * 2 * layer
    into_s = d_s + at * 2 * layer
    i = tl.arange(0, C)
    tokens = grid_of(C, D)
    square = at * C * C + grid_of(C, C)
    columns = tl.program_id(2) * TILE + tl.arange(0, TILE)[None, :]
    tile = tl.arange(0, D)[:, None] * HIDDEN + columns
    wide = at * C * HIDDEN + i[:, None] * HIDDEN + columns
    ok = valid_slots(valid, where, length, C)
    answer = tl.load(d_y + first * D + tokens, mask=ok[:, None], other=0.0)
    decay = tl.load(vectors + at * 4 * C + i)[:, None]
    push = tl.load(vectors + at * 4 * C + C + i)[:, None]
    active = tl.load(x + wide)
    by_m = dot(answer, tl.load(now_m + layer + tile))
    by_s = dot(answer, tl.load(now_s + layer + tile))
    share = shares + (at * tl.num_programs(2) + tl.program_id(2)) * 2 * C + i
    tl.store(share, tl.sum(active * by_m, 1))
    tl.store(share + C, tl.sum(active * by_s, 1))
    tl.store(into_m + layer + tile, dot(tl.trans((answer * decay).to(operand)), active).to(operand))
    tl.store(into_s + layer + tile, dot(tl.trans((answer * push).to(operand)), active).to(operand))
    pair = tl.load(pairs + square)
    d_x = add_dot(decay * by_m + push * by_s, pair, tl.load(hidden + wide))
    tl.store(d_hidden + wide, dot(tl.trans(pair), active).to(operand))
    d_z = (d_x * tl.load(x_slope + wide).to(tl.float32)).to(operand)
    # Every element is read before it is replaced by the thread that read it.
    tl.store(x_slope + wide, d_z)
    tl.store(d_delta_one + wide, (-dot(tl.trans(tl.load(first_part + square)), d_z)).to(operand))
    queries = tl.load(q + first * D + tokens, mask=ok[:, None], other=0.0)
    tl.store(into_m + tile, dot(tl.trans((queries * decay).to(operand)), d_z).to(operand))
    tl.store(into_s + tile, dot(tl.trans((queries * push).to(operand)), d_z).to(operand))


@triton.jit(do_not_specialize=COUNTS)
def mlp_query_backward_kernel(
    q,
    k,
    valid,
    sequences,
    chunks,
    mix,
    vectors,
    m_states,
    s_states,
    scale,
    delta_one,
    d_z,
    shares,
    d_q,
    d_k,
    d_mix,
    d_vectors,
    stride,
    heads,
    total,
    C: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Through layer 1: of queries, of keys by way of reading, and of W (added to layer 2's), a0 and f.

    ``d_z``: what ``mlp_answer_backward_kernel`` left in ``x_slope``; ``shares`` has ``total`` parts.
    """
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    number, _, first, where, length = sequence_place(sequences, chunks, n, h, stride, C)
    if number < 0:
        return
    operand = q.dtype.element_ty
    layer: tl.constexpr = D * HIDDEN
    at = n * heads + h
    i = tl.arange(0, C)
    tokens = grid_of(C, D)
    square = at * C * C + grid_of(C, C)
    tile = tl.arange(0, D)[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
    wide = at * C * HIDDEN + i[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
    from_m = tl.zeros([C, D], tl.float32)
    from_s = tl.zeros([C, D], tl.float32)
    d_alike = tl.zeros([C, C], tl.float32)
    for j in range(0, HIDDEN, TILE):
        d = tl.load(d_z + wide + j)
        d_alike = add_dot(d_alike, d, tl.trans(tl.load(delta_one + wide + j)))
        from_m = add_dot(from_m, d, tl.trans(tl.load(m_states + at * 2 * layer + tile + j)))
        from_s = add_dot(from_s, d, tl.trans(tl.load(s_states + at * 2 * layer + tile + j)))
    ok = valid_slots(valid, where, length, C)
    queries = tl.load(q + first * D + tokens, mask=ok[:, None], other=0.0)
    keys = tl.load(k + first * D + tokens, mask=ok[:, None], other=0.0)
    d_decay = tl.sum(queries * from_m, 1)
    d_push = tl.sum(queries * from_s, 1)
    for part in range(total):
        share = shares + (at * total + part) * 2 * C + i
        d_decay += tl.load(share)
        d_push += tl.load(share + C)
    tl.store(d_vectors + at * 4 * C + i, d_decay)
    tl.store(d_vectors + at * 4 * C + C + i, d_push)
    two = tl.load(d_mix + square).to(tl.float32)
    tl.store(d_mix + square, (two - d_alike * dot(queries, tl.trans(keys))).to(operand))
    weighting = tl.load(mix + square).to(tl.float32) * tl.load(scale + at)
    pair = (-weighting * d_alike).to(operand)
    inside = (i < length)[:, None]
    decay = tl.load(vectors + at * 4 * C + i)[:, None]
    push = tl.load(vectors + at * 4 * C + C + i)[:, None]
    d_queries = add_dot(decay * from_m + push * from_s, pair, keys)
    tl.store(d_q + first * D + tokens, tl.where(ok[:, None], d_queries, 0.0).to(operand), mask=inside)
    tl.store(d_k + first * D + tokens, dot(tl.trans(pair), queries).to(operand), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def mlp_read_plain_backward_kernel(
    q,
    d_y,
    valid,
    sequences,
    chunks,
    m_states,
    anchor,
    d_q,
    d_m,
    stride,
    heads,
    C: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    ACT: tl.constexpr,
    RESUMED: tl.constexpr,
):
    """The adjoint of reading with the weights the chunk began with; ``d_m`` are the anchor's cotangents of this chunk."""
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    number, flags, first, where, length = sequence_place(sequences, chunks, n, h, stride, C)
    if number < 0:
        return
    operand = q.dtype.element_ty
    layer: tl.constexpr = D * HIDDEN
    at = n * heads + h
    begins = (flags & 1) != 0
    now_m = m_states + at * 2 * layer
    into_m = d_m + at * 2 * layer
    start = anchor + (number * heads + h) * 2 * layer
    tokens = grid_of(C, D)
    tile = tl.arange(0, D)[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
    ok = valid_slots(valid, where, length, C)
    queries = tl.load(q + first * D + tokens, mask=ok[:, None], other=0.0)
    answer = tl.load(d_y + first * D + tokens, mask=ok[:, None], other=0.0)
    total = tl.zeros([C, D], tl.float32)
    for j in range(0, HIDDEN, TILE):
        one = key_tile(now_m, start, tile + j, begins, RESUMED)
        two = key_tile(now_m + layer, start + layer, tile + j, begins, RESUMED)
        z = dot(queries, one)
        d_z = (activation_slope(z, ACT) * dot(answer, two)).to(operand)
        tl.store(into_m + layer + tile + j, dot(tl.trans(answer), activation(z, ACT).to(operand)).to(operand))
        tl.store(into_m + tile + j, dot(tl.trans(queries), d_z).to(operand))
        total = add_dot(total, d_z, tl.trans(one))
    inside = (tl.arange(0, C) < length)[:, None]
    tl.store(d_q + first * D + tokens, tl.where(ok[:, None], total, 0.0).to(operand), mask=inside)
