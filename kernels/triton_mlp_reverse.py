# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
"""Triton kernels of a memory that is an MLP of two layers, backward, part two: the reverse scan over chunks.

One program per sequence and head carries the cotangents of M and S through the chunks from the right (fp32, through memory
that stays in L2, tile by tile as forward): the update's adjoint, the second-order part (deltas depend on the weights), and
the adjoint of the key pass. It leaves what it carried into every chunk, from which the keys' cotangents follow in any order
(``mlp_key_backward``). Both come after triton_mlp_backward.py, whose outputs they read; arrays as there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans_graph.kernels.triton_common import (
    COUNTS,
    add_dot,
    chunk_place,
    dot,
    grid_of,
    sequence_place,
    surprise_by_value,
    surprise_slope,
    valid_slots,
)
from titans_graph.kernels.triton_mlp import key_tile


@triton.jit
def retreat_layer(
    d_m, d_s, d_anchor, late_anchor, start_d_m, start_d_s, into_m, into_s, place, by_keys, keep, push, surprise_end,
    begins, restarts, anchored, MIXED: tl.constexpr, RESUMED: tl.constexpr,
):  # fmt: skip
    """Cotangents of one tile of one layer from a chunk's end to its start.

    ``by_keys``: what the key pass and the second-order part add, which belongs to the anchor. ``into_m``, ``into_s``: what
    reading adds, replaced by what was carried to the chunk's end.
    """
    carried_m = tl.load(d_m + place)
    carried_s = tl.load(d_s + place)
    operand = into_m.dtype.element_ty
    read = tl.load(into_m + place).to(tl.float32)
    tl.store(into_m + place, carried_m.to(operand))
    new_m = keep * carried_m
    new_s = push * carried_m + surprise_end * carried_s
    if MIXED:
        new_m += read
        new_s += tl.load(into_s + place).to(tl.float32)
    else:
        by_keys += read
    tl.store(into_s + place, carried_s.to(operand))
    if RESUMED:
        if begins:
            new_m += by_keys
        else:
            tl.store(d_anchor + place, tl.load(d_anchor + place) + by_keys)
    else:
        new_m += by_keys
    if anchored:
        new_m += tl.load(late_anchor + place)
    if restarts:
        tl.store(start_d_m + place, tl.load(start_d_m + place) + new_m)
        tl.store(start_d_s + place, tl.load(start_d_s + place) + new_s)
        new_m = tl.zeros(new_m.shape, tl.float32)
        new_s = tl.zeros(new_m.shape, tl.float32)
    tl.store(d_m + place, new_m)
    tl.store(d_s + place, new_s)


@triton.jit(do_not_specialize=COUNTS)
def mlp_reverse_kernel(
    k,
    valid,
    sequences,
    chunks,
    vectors,
    ends,
    m_states,
    anchor,
    deltas,
    scale,
    hidden,
    slope,
    bend,
    d_delta_one,
    d_delta_two,
    d_hidden,
    into_m,
    into_s,
    d_m,
    d_s,
    d_anchor,
    late_anchor,
    start_d_m,
    start_d_s,
    d_v,
    stride,
    heads,
    C: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    PARAMETER: tl.constexpr,
    MIXED: tl.constexpr,
    RESUMED: tl.constexpr,
):
    """The reverse scan of one sequence and head.

    ``d_m``, ``d_s`` fp32 ``[S, H, 2, d, hidden]``: at entry the cotangents of the final state, at the end those of the
    entry's. So is ``d_anchor`` where no chunk begins; where one does, it is zero at entry, and the final anchor's cotangent
    is read from ``late_anchor``: a value that is cleared once it was read would need a barrier. ``start_d_m``,
    ``start_d_s`` gather those of restarts. ``bend`` is replaced by the cotangent of layer 1's product, ``d_delta_two`` by
    that of layer 2, ``d_delta_one`` is used up. Not ``MIXED``: reading gave ``into_m`` alone.
    """
    number, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    operand = k.dtype.element_ty
    size: tl.constexpr = 2 * D * HIDDEN
    layer: tl.constexpr = D * HIDDEN
    row = (number * heads + h) * size
    first = tl.load(sequences + number * 5) + h * stride
    where = tl.load(sequences + number * 5 + 1)
    # Registers are scarce: what counts slots and chunks takes 32 bits.
    length = tl.load(sequences + number * 5 + 2).to(tl.int32)
    base = tl.load(sequences + number * 5 + 3).to(tl.int32)
    last_first = tl.load(sequences + number * 5 + 4).to(tl.int32)
    count = (length + C - 1) // C
    i = tl.arange(0, C)
    tokens = grid_of(C, D)
    tile = tl.arange(0, D)[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
    columns = i[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
    # The states' cotangents in parts of at most 64 rows: more would not fit the registers.
    ROWS: tl.constexpr = D if D < 64 else 64
    STEPS: tl.constexpr = (D // ROWS) * (HIDDEN // TILE)
    half = tl.arange(0, ROWS)[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
    part = i[:, None] * D + tl.arange(0, ROWS)[None, :]
    for back in tl.range(0, count, num_stages=1):
        c = count - 1 - back
        at = (base + c).to(tl.int64) * heads + h
        _, _, flags = chunk_place(chunks, base + c)
        begins = (flags & 1) != 0
        now_m = m_states + at * size
        # Scalars join the pointers, so that offsets stay 32 bits wide and few registers hold them.
        wide = at * C * HIDDEN
        slots = (first + c * C) * D
        ok = valid_slots(valid, where + c * C, length - c * C, C)
        keys = tl.load(k + slots + tokens, mask=ok[:, None], other=0.0)
        minus = -tl.load(scale + at)
        last = tl.load(vectors + at * 4 * C + 2 * C + i)[:, None] * minus
        surprised = tl.load(vectors + at * 4 * C + 3 * C + i)[:, None] * minus
        keys_m = (keys * last).to(operand)
        keys_s = (keys * surprised).to(operand)
        d_delta = tl.zeros([C, D], tl.float32)
        if MIXED:
            d_delta += tl.load(d_delta_two + at * C * D + tokens).to(tl.float32)
        for j in range(0, HIDDEN, TILE):
            d_one = dot(keys_m, tl.load(d_m + row + (tile + j)).to(operand))
            d_one = add_dot(d_one, keys_s, tl.load(d_s + row + (tile + j)).to(operand))
            if MIXED:
                d_one += tl.load(d_delta_one + (wide + j) + columns).to(tl.float32)
            # From here on, bend and d_delta_one hold what the loops below need of d_one.
            bent = d_one * tl.load(bend + (wide + j) + columns).to(tl.float32)
            tl.store(bend + (wide + j) + columns, bent.to(operand))
            turn = (d_one * tl.load(slope + (wide + j) + columns).to(tl.float32)).to(operand)
            tl.store(d_delta_one + (wide + j) + columns, turn)
        tl.debug_barrier()
        for j in range(0, HIDDEN, TILE):
            active = tl.load(hidden + (wide + j) + columns)
            two = key_tile(now_m + layer, anchor + row + layer, tile + j, begins, RESUMED)
            d_delta = add_dot(d_delta, tl.load(d_delta_one + (wide + j) + columns), tl.trans(two))
            two = tl.load(d_m + row + layer + (tile + j)).to(operand)
            d_delta = add_dot(d_delta, (active * last).to(operand), tl.trans(two))
            two = tl.load(d_s + row + layer + (tile + j)).to(operand)
            d_delta = add_dot(d_delta, (active * surprised).to(operand), tl.trans(two))
        delta = tl.load(deltas + at * C * D + tokens)
        inside = (i < length - c * C)[:, None]
        by_value = d_delta * surprise_by_value(delta.to(tl.float32), OBJECTIVE, PARAMETER)
        tl.store(d_v + slots + tokens, tl.where(ok[:, None], by_value, 0.0).to(operand), mask=inside)
        d_prediction = (d_delta * surprise_slope(delta.to(tl.float32), OBJECTIVE, PARAMETER)).to(operand)
        tl.store(d_delta_two + at * C * D + tokens, d_prediction)
        delta_m = (delta * last).to(operand)
        delta_s = (delta * surprised).to(operand)
        keep = tl.load(ends + at * 4)
        push = tl.load(ends + at * 4 + 1)
        surprise_end = tl.load(ends + at * 4 + 2)
        restarts = (flags & 2) != 0
        anchored = c == last_first
        tl.debug_barrier()
        for j in range(0, HIDDEN, TILE):
            two = key_tile(now_m + layer, anchor + row + layer, tile + j, begins, RESUMED)
            d_x = dot(d_prediction, two)
            d_x = add_dot(d_x, delta_m, tl.load(d_m + row + layer + (tile + j)).to(operand))
            d_x = add_dot(d_x, delta_s, tl.load(d_s + row + layer + (tile + j)).to(operand))
            if MIXED:
                d_x += tl.load(d_hidden + (wide + j) + columns).to(tl.float32)
            d_z = d_x * tl.load(slope + (wide + j) + columns).to(tl.float32)
            d_z = (d_z + tl.load(bend + (wide + j) + columns).to(tl.float32)).to(operand)
            tl.store(bend + (wide + j) + columns, d_z)
        tl.debug_barrier()
        for n in range(STEPS):
            j = n % (HIDDEN // TILE) * TILE
            e = n // (HIDDEN // TILE) * ROWS
            some_keys = tl.load(k + slots + (part + e), mask=ok[:, None], other=0.0)
            d_z = tl.load(bend + (wide + j) + columns)
            retreat_layer(
                d_m + row, d_s + row, d_anchor + row, late_anchor + row, start_d_m + row, start_d_s + row,
                into_m + at * size, into_s + at * size, half + (e * HIDDEN + j), dot(tl.trans(some_keys), d_z), keep, push,
                surprise_end, begins, restarts, anchored, MIXED, RESUMED,
            )  # fmt: skip
        # Layer 2 in a loop of its own: d_x above needs its old cotangents, and together the two spill registers.
        tl.debug_barrier()
        for n in range(STEPS):
            j = n % (HIDDEN // TILE) * TILE
            e = n // (HIDDEN // TILE) * ROWS
            some_delta = tl.load(deltas + at * C * D + (part + e))
            turned = tl.load(d_delta_two + at * C * D + (part + e))
            by_keys = dot(tl.trans(turned), tl.load(hidden + (wide + j) + columns))
            by_keys = add_dot(by_keys, tl.trans(some_delta), tl.load(d_delta_one + (wide + j) + columns))
            retreat_layer(
                d_m + row, d_s + row, d_anchor + row, late_anchor + row, start_d_m + row, start_d_s + row,
                into_m + at * size, into_s + at * size, half + (e * HIDDEN + j) + layer, by_keys, keep, push, surprise_end,
                begins, restarts, anchored, MIXED, RESUMED,
            )  # fmt: skip
        tl.debug_barrier()


@triton.jit(do_not_specialize=COUNTS)
def mlp_key_backward_kernel(
    k,
    valid,
    sequences,
    chunks,
    vectors,
    m_states,
    s_states,
    anchor,
    deltas,
    scale,
    hidden,
    delta_one,
    d_z,
    carried_m,
    carried_s,
    d_k,
    d_vectors,
    d_ends,
    stride,
    heads,
    C: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    MIXED: tl.constexpr,
    RESUMED: tl.constexpr,
):
    """The keys' cotangents (added, where ``MIXED``, to reading's part in ``d_k``), and those of w, u and the end's scalars.

    ``d_z``: of layer 1's product; ``carried_m``, ``carried_s``: of M and S at the chunk's end.
    """
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    number, flags, first, where, length = sequence_place(sequences, chunks, n, h, stride, C)
    if number < 0:
        return
    operand = k.dtype.element_ty
    at = n * heads + h
    begins = (flags & 1) != 0
    now = at * 2 * D * HIDDEN
    start = anchor + (number * heads + h) * 2 * D * HIDDEN
    i = tl.arange(0, C)
    tokens = grid_of(C, D)
    tile = tl.arange(0, D)[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
    wide = at * C * HIDDEN + i[:, None] * HIDDEN + tl.arange(0, TILE)[None, :]
    factor = tl.load(scale + at)
    last = tl.load(vectors + at * 4 * C + 2 * C + i)[:, None] * factor
    surprised = tl.load(vectors + at * 4 * C + 3 * C + i)[:, None] * factor
    delta = tl.load(deltas + at * C * D + tokens)
    d_keys = tl.zeros([C, D], tl.float32)
    by_m = tl.zeros([C, D], tl.float32)
    by_s = tl.zeros([C, D], tl.float32)
    d_last = tl.zeros([C], tl.float32)
    d_surprised = tl.zeros([C], tl.float32)
    for j in range(0, HIDDEN, TILE):
        one = tl.load(delta_one + wide + j)
        weights = key_tile(m_states + now, start, tile + j, begins, RESUMED)
        d_keys = add_dot(d_keys, tl.load(d_z + wide + j), tl.trans(weights))
        by_m = add_dot(by_m, one, tl.trans(tl.load(carried_m + now + tile + j)))
        by_s = add_dot(by_s, one, tl.trans(tl.load(carried_s + now + tile + j)))
        active = tl.load(hidden + wide + j)
        d_last += tl.sum(active * dot(delta, tl.load(carried_m + now + D * HIDDEN + tile + j)), 1)
        d_surprised += tl.sum(active * dot(delta, tl.load(carried_s + now + D * HIDDEN + tile + j)), 1)
    ok = valid_slots(valid, where, length, C)
    keys = tl.load(k + first * D + tokens, mask=ok[:, None], other=0.0)
    tl.store(d_vectors + at * 4 * C + 2 * C + i, -d_last - tl.sum(keys * by_m, 1))
    tl.store(d_vectors + at * 4 * C + 3 * C + i, -d_surprised - tl.sum(keys * by_s, 1))
    d_keys -= last * by_m + surprised * by_s
    slots = first * D + tokens
    if MIXED:
        d_keys += tl.load(d_k + slots, mask=ok[:, None], other=0.0).to(tl.float32)
    tl.store(d_k + slots, tl.where(ok[:, None], d_keys, 0.0).to(operand), mask=(i < length)[:, None])
    kept = tl.zeros([D, TILE], tl.float32)
    pushed = tl.zeros([D, TILE], tl.float32)
    ended = tl.zeros([D, TILE], tl.float32)
    for layer in tl.static_range(2):
        for j in range(0, HIDDEN, TILE):
            place = now + tile + layer * D * HIDDEN + j
            into = tl.load(carried_m + place).to(tl.float32)
            momenta = tl.load(s_states + place).to(tl.float32)
            kept += into * tl.load(m_states + place)
            pushed += into * momenta
            ended += tl.load(carried_s + place) * momenta
    tl.store(d_ends + at * 4, tl.sum(kept))
    tl.store(d_ends + at * 4 + 1, tl.sum(pushed))
    tl.store(d_ends + at * 4 + 2, tl.sum(ended))
