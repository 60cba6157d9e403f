# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
"""Triton kernels of a memory that is an MLP of two layers, forward: the scan over chunks, and the reading of all tokens.

The state of a head, M and S of both layers (256 KB in fp32 for 64 -> 256 -> 64), does not fit a multiprocessor beside its
operands. So the scan walks over tiles of the hidden size: M in fp32 passes through memory that stays in L2, S is kept as
the states that reading needs anyway, in the operands' type (rounding S once a chunk changes outputs by 1e-4 of their size;
M must stay in fp32). Reading has one program per chunk and head and needs no order.

Arrays: states ``[S, H, 2, d, hidden]``: layer 1 as it is, layer 2 transposed, so that the hidden size is never the outer
size of a product; ``m`` and ``s`` in fp32, chunk states ``m_states`` and ``s_states`` ``[N, H, 2, d, hidden]`` and ``deltas``
``[N, H, C, d]`` (of layer 2) in the operands' type, ``scale`` ``[N, H]`` fp32. Gates as in triton_gates.py, tables as in
triton_plan.py. Formulas: docs/kernels.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans_graph.kernels.triton_common import (
    COUNTS,
    activation,
    activation_slope,
    add_dot,
    chunk_place,
    dot,
    grid_of,
    sequence_place,
    surprise,
    valid_slots,
)


@triton.jit
def key_tile(states, anchor, place, begins, RESUMED: tl.constexpr):
    """A tile of the weights at which gradients are taken: the chunk's first ones, or the entry's where it was begun before."""
    if RESUMED:
        if begins:  # noqa: SIM108
            tile = tl.load(states + place)
        else:
            tile = tl.load(anchor + place).to(states.dtype.element_ty)
    else:
        tile = tl.load(states + place)
    return tile


@triton.jit
def spectral(states, anchor, begins, D: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, RESUMED: tl.constexpr):
    """An upper bound of a matrix' spectral norm, (trace G^16)^(1/32) of its Gram matrix G, as in memory_bound.py."""
    gram = tl.zeros([D, D], tl.float32)
    place = tl.arange(0, D)[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
    for j in range(0, HIDDEN, TILE):
        tile = key_tile(states, anchor, place + j, begins, RESUMED)
        gram = add_dot(gram, tile, tl.trans(tile))
    log_scale = 0.0
    power = 1.0
    for _ in tl.static_range(3):
        size = tl.maximum(tl.sqrt(tl.sum(gram * gram)), 1e-36)
        log_scale += tl.log(size) / power
        gram = gram / size
        gram = dot(gram, gram)
        power *= 2.0
    last = tl.maximum(tl.sqrt(tl.sum(gram * gram)), 1e-36)
    return tl.exp((log_scale + tl.log(last) / power) / 2.0)


@triton.jit
def scale_of(one, two, ACT: tl.constexpr):
    """One over the bound of the curvature (Network.curvature), at most 1, from the norms of both layers."""
    if ACT == "silu":
        slope = 1.0999
        length = one
    elif ACT == "gelu":
        slope = 1.1290
        length = one
    else:
        slope = 2.0 * one
        length = one * one
    share = slope * two
    return 1.0 / tl.maximum(share * share + length * length, 1.0)


@triton.jit
def step_scale(states, anchor, begins, D: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, RESUMED: tl.constexpr,
               ACT: tl.constexpr):  # fmt: skip
    """What the chunk's steps are multiplied by."""
    one = spectral(states, anchor, begins, D, HIDDEN, TILE, RESUMED)
    two = spectral(states + D * HIDDEN, anchor + D * HIDDEN, begins, D, HIDDEN, TILE, RESUMED)
    return scale_of(one, two, ACT)


@triton.jit
def begin(m, source_m, source_s, m_states, s_states, D: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr):
    """Copy a state to where a chunk begins: M to ``m`` and, as S, to the chunk's states."""
    place = tl.arange(0, D)[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
    for j in range(0, 2 * HIDDEN, TILE):
        # Layer 2 lies behind layer 1.
        at = place + (j // HIDDEN) * (D * HIDDEN) + j % HIDDEN
        weights = tl.load(source_m + at)
        tl.store(m + at, weights)
        tl.store(m_states + at, weights.to(m_states.dtype.element_ty))
        tl.store(s_states + at, tl.load(source_s + at).to(s_states.dtype.element_ty))


@triton.jit
def keep_anchor(m, anchor, D: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr):
    """Copy the weights of now to the anchor."""
    place = tl.arange(0, D)[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
    for j in range(0, 2 * HIDDEN, TILE):
        at = place + (j // HIDDEN) * (D * HIDDEN) + j % HIDDEN
        tl.store(anchor + at, tl.load(m + at))


@triton.jit
def advance_layer(m, s, m_states, s_states, place, behind, left, right, last, surprised, keep, push, surprise_end, more):
    """One tile of one layer over a chunk: ``M' = A M + f S - left^T (w right)``, ``S' = E S - left^T (u right)``."""
    operand = m_states.dtype.element_ty
    weights = tl.load(m + place)
    momenta = tl.load(s_states + place).to(tl.float32)
    weights = keep * weights + push * momenta - dot(tl.trans(left), (right * last).to(operand))
    momenta = surprise_end * momenta - dot(tl.trans(left), (right * surprised).to(operand))
    tl.store(m + place, weights)
    if more:
        tl.store(m_states + behind + place, weights.to(operand))
        tl.store(s_states + behind + place, momenta.to(operand))
    else:
        tl.store(s + place, momenta)


@triton.jit(do_not_specialize=COUNTS)
def mlp_scan_kernel(
    k,
    v,
    valid,
    sequences,
    chunks,
    vectors,
    ends,
    m,
    s,
    start_m,
    start_s,
    anchor,
    anchor_out,
    m_states,
    s_states,
    deltas,
    scale,
    stride,
    heads,
    C: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    ACT: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    PARAMETER: tl.constexpr,
    BOUNDED: tl.constexpr,
    RESUMED: tl.constexpr,
):
    """The state over all chunks of one sequence and head: chunk states, deltas of layer 2, scale, final M and S.

    ``m``, ``s``: at entry the current state, at the end the final one. ``start_m``, ``start_s``: that of a restart.
    ``anchor``: the entry's; ``anchor_out`` is written where some chunk begins here.
    """
    number, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    operand = k.dtype.element_ty
    size: tl.constexpr = 2 * D * HIDDEN
    row = (number * heads + h) * size
    first = tl.load(sequences + number * 5) + h * stride
    where = tl.load(sequences + number * 5 + 1)
    length = tl.load(sequences + number * 5 + 2)
    base = tl.load(sequences + number * 5 + 3)
    last_first = tl.load(sequences + number * 5 + 4)
    count = (length + C - 1) // C
    tokens = grid_of(C, D)
    tile = tl.arange(0, D)[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
    i = tl.arange(0, C)
    # A chunk reads through memory what the one before wrote: never pipelined.
    for c in tl.range(0, count, num_stages=1):
        at = (base + c) * heads + h
        _, _, flags = chunk_place(chunks, base + c)
        begins = (flags & 1) != 0
        now_m = m_states + at * size
        now_s = s_states + at * size
        if (flags & 2) != 0:
            begin(m + row, start_m + row, start_s + row, now_m, now_s, D, HIDDEN, TILE)
        elif c == 0:
            begin(m + row, m + row, s + row, now_m, now_s, D, HIDDEN, TILE)
        tl.debug_barrier()
        if c == last_first:
            keep_anchor(m + row, anchor_out + row, D, HIDDEN, TILE)
        factor = 1.0
        if BOUNDED:
            factor = step_scale(now_m, anchor + row, begins, D, HIDDEN, TILE, RESUMED, ACT)
        tl.store(scale + at, factor)
        ok = valid_slots(valid, where + c * C, length - c * C, C)
        keys = tl.load(k + (first + c * C) * D + tokens, mask=ok[:, None], other=0.0)
        values = tl.load(v + (first + c * C) * D + tokens, mask=ok[:, None], other=0.0).to(tl.float32)
        prediction = tl.zeros([C, D], tl.float32)
        for j in range(0, HIDDEN, TILE):
            one = key_tile(now_m, anchor + row, tile + j, begins, RESUMED)
            two = key_tile(now_m + D * HIDDEN, anchor + row + D * HIDDEN, tile + j, begins, RESUMED)
            hidden = activation(dot(keys, one), ACT).to(operand)
            prediction = add_dot(prediction, hidden, tl.trans(two))
        delta = surprise(prediction, values, OBJECTIVE, PARAMETER)
        tl.store(deltas + at * C * D + tokens, delta.to(operand))
        last = tl.load(vectors + at * 4 * C + 2 * C + i)[:, None] * factor
        surprised = tl.load(vectors + at * 4 * C + 3 * C + i)[:, None] * factor
        keep = tl.load(ends + at * 4)
        push = tl.load(ends + at * 4 + 1)
        surprise_end = tl.load(ends + at * 4 + 2)
        # Operands that are loaded need no registers: the delta comes back from memory, and w and u scale the tiles.
        tl.debug_barrier()
        delta_in = tl.load(deltas + at * C * D + tokens)
        more = c + 1 < count
        for j in range(0, HIDDEN, TILE):
            one = key_tile(now_m, anchor + row, tile + j, begins, RESUMED)
            two = key_tile(now_m + D * HIDDEN, anchor + row + D * HIDDEN, tile + j, begins, RESUMED)
            z = dot(keys, one)
            delta_one = activation_slope(z, ACT) * dot(delta_in, two)
            hidden = activation(z, ACT)
            advance_layer(
                m + row, s + row, now_m, now_s, tile + j, heads * size, keys, delta_one, last, surprised,
                keep, push, surprise_end, more,
            )  # fmt: skip
            advance_layer(
                m + row, s + row, now_m, now_s, tile + j + D * HIDDEN, heads * size, delta_in, hidden, last, surprised,
                keep, push, surprise_end, more,
            )  # fmt: skip
        tl.debug_barrier()


@triton.jit(do_not_specialize=COUNTS)
def mlp_read_kernel(
    q,
    k,
    y,
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
    """``y`` of one chunk and head. Not ``MIXED``: all tokens read the weights the chunk began with (the anchor)."""
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    number, flags, first, where, length = sequence_place(sequences, chunks, n, h, stride, C)
    if number < 0:
        return
    operand = q.dtype.element_ty
    size: tl.constexpr = 2 * D * HIDDEN
    at = n * heads + h
    begins = (flags & 1) != 0
    now_m = m_states + at * size
    now_s = s_states + at * size
    start = anchor + (number * heads + h) * size
    i = tl.arange(0, C)
    tokens = grid_of(C, D)
    tile = tl.arange(0, D)[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
    ok = valid_slots(valid, where, length, C)
    queries = tl.load(q + first * D + tokens, mask=ok[:, None], other=0.0)
    answer = tl.zeros([C, D], tl.float32)
    if MIXED:
        keys = tl.load(k + first * D + tokens, mask=ok[:, None], other=0.0)
        delta = tl.load(deltas + at * C * D + tokens)
        weighting = tl.load(mix + at * C * C + grid_of(C, C)).to(tl.float32) * tl.load(scale + at)
        decay = tl.load(vectors + at * 4 * C + i)[:, None]
        push = tl.load(vectors + at * 4 * C + C + i)[:, None]
        first_part = (weighting * dot(queries, tl.trans(keys))).to(operand)
        alike = tl.zeros([C, C], tl.float32)
        for j in range(0, HIDDEN, TILE):
            one = key_tile(now_m, start, tile + j, begins, RESUMED)
            two = key_tile(now_m + D * HIDDEN, start + D * HIDDEN, tile + j, begins, RESUMED)
            z = dot(keys, one)
            delta_one = (activation_slope(z, ACT) * dot(delta, two)).to(operand)
            hidden = activation(z, ACT).to(operand)
            # Rows are scaled after the products: scaled queries would be held in registers, plain ones are not.
            z = decay * dot(queries, tl.load(now_m + tile + j)) + push * dot(queries, tl.load(now_s + tile + j))
            x = activation(z - dot(first_part, delta_one), ACT)
            alike = add_dot(alike, x.to(operand), tl.trans(hidden))
            answer = add_dot(answer, (x * decay).to(operand), tl.trans(tl.load(now_m + D * HIDDEN + tile + j)))
            answer = add_dot(answer, (x * push).to(operand), tl.trans(tl.load(now_s + D * HIDDEN + tile + j)))
        answer = answer - dot((weighting * alike).to(operand), delta)
    else:
        for j in range(0, HIDDEN, TILE):
            one = key_tile(now_m, start, tile + j, begins, RESUMED)
            two = key_tile(now_m + D * HIDDEN, start + D * HIDDEN, tile + j, begins, RESUMED)
            answer = add_dot(answer, activation(dot(queries, one), ACT).to(operand), tl.trans(two))
    inside = (i < length)[:, None]
    tl.store(y + first * D + tokens, tl.where(ok[:, None], answer, 0.0).to(operand), mask=inside)
