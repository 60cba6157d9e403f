# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
"""Triton kernels that decode one token per row: weights are read once, and written once in many tokens.

What they compute, and when weights are written, stands in :mod:`~titans_graph.kernels.memory_lazy`:

    M_t = a0 M + f S - sum_i w_i u_i^T d_i          S_t = e0 S - sum_i s_i u_i^T d_i

One program takes one row's token: it reads the anchor, M, S and the pairs so far, answers, and writes the ring with the
token's own pair added to a new place (its slots that hold no pair are read by nobody and written as 0). An update of every
token would read and write M and S.

Arrays: ``N`` rows (batch times heads). Fast weights ``[N, in, out]`` of each layer: ``anchor``, ``m`` and ``s`` as last
written, for reading in any type. Rings ``[N, SLOTS, size]`` in the state's type, ``shares`` w and s ``[N, 2, SLOTS]``,
``ends`` a0, f, e0 ``[N, 3]`` and ``norms`` ``[N, layers]`` in fp32; ``slot`` int64 ``[B]``: where the token's pair goes.
``RING``: the power of 2 from SLOTS on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans_graph.kernels.triton_common import COUNTS, activation, activation_slope, dot, surprise
from titans_graph.kernels.triton_mlp import scale_of


@triton.jit
def next_shares(
    shares, ends, new_shares, new_ends, row, slot, theta, eta, keep,
    SLOTS: tl.constexpr, RING: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """Take a token into shares and ends, and give what its query reads with: w without its own pair, w of that, a0, f."""
    i = tl.arange(0, RING)
    here = row * 2 * SLOTS + i
    old = i < slot
    w = tl.load(shares + here, mask=old, other=0.0)
    s = tl.load(shares + here + SLOTS, mask=old, other=0.0)
    decay = tl.load(ends + row * 3)
    push = tl.load(ends + row * 3 + 1)
    first = tl.load(ends + row * 3 + 2) * eta
    s = tl.where(i == slot, theta, eta * s)
    new = keep * w + s
    tl.store(new_shares + here, new, mask=i < SLOTS)
    tl.store(new_shares + here + SLOTS, s, mask=i < SLOTS)
    tl.store(new_ends + row * 3, keep * decay)
    tl.store(new_ends + row * 3 + 1, keep * push + first)
    tl.store(new_ends + row * 3 + 2, first)
    own = 0.0
    if READ == "after":
        own = theta
        w = new
        decay, push = keep * decay, keep * push + first
    return tl.where(old, w, 0.0), own, decay, push


@triton.jit
def next_ring(ring, new, row, slot, columns, value, WIDTH: tl.constexpr, SLOTS: tl.constexpr, RING: tl.constexpr):
    """The pairs' halves so far, ``[RING, columns]`` in fp32 and 0 where there is none; ``new`` gets ``value`` besides."""
    i = tl.arange(0, RING)[:, None]
    place = (row * SLOTS + i) * WIDTH + columns[None, :]
    old = tl.load(ring + place, mask=i < slot, other=0.0)
    tl.store(new + place, tl.where(i == slot, value[None, :].to(old.dtype), old), mask=i < SLOTS)
    return old.to(tl.float32)


@triton.jit(do_not_specialize=COUNTS)
def linear_decode_kernel(
    q, k, v, step, log_momentum, log_keep, slots, anchor, m, s, inputs, deltas, shares, ends,
    y, new_inputs, new_deltas, new_shares, new_ends, heads,
    SLOTS: tl.constexpr, RING: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, OBJECTIVE: tl.constexpr,
    PARAMETER: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """One token of one row of a linear memory."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row // heads)
    i = tl.arange(0, D)
    theta = tl.load(step + row)
    eta, keep = tl.exp(tl.load(log_momentum + row)), tl.exp(tl.load(log_keep + row))
    w, own, decay, push = next_shares(shares, ends, new_shares, new_ends, row, slot, theta, eta, keep, SLOTS, RING, READ)
    query = tl.load(q + row * D + i).to(tl.float32)
    key = tl.load(k + row * D + i).to(tl.float32)
    before = next_ring(inputs, new_inputs, row, slot, i, key, D, SLOTS, RING)
    alike = w * tl.sum(before * query[None, :], 1)
    own = own * tl.sum(query * key)
    for j in range(0, D, TILE):
        columns = j + tl.arange(0, TILE)
        tile = row * D * D + i[:, None] * D + columns[None, :]
        at = tl.load(anchor + tile).to(tl.float32)
        delta = surprise(tl.sum(at * key[:, None], 0), tl.load(v + row * D + columns).to(tl.float32), OBJECTIVE, PARAMETER)
        pairs = next_ring(deltas, new_deltas, row, slot, columns, delta, D, SLOTS, RING)
        if READ == "chunk":
            answer = tl.sum(at * query[:, None], 0)
        else:
            weights = decay * tl.load(m + tile).to(tl.float32) + push * tl.load(s + tile).to(tl.float32)
            answer = tl.sum(weights * query[:, None], 0) - tl.sum(pairs * alike[:, None], 0) - own * delta
        tl.store(y + row * D + columns, answer.to(y.dtype.element_ty))


@triton.jit(do_not_specialize=COUNTS)
def mlp_decode_kernel(
    q, k, v, step, log_momentum, log_keep, slots, anchor_one, anchor_two, m_one, m_two, s_one, s_two,
    inputs_one, inputs_two, deltas_one, deltas_two, shares, ends, norms,
    y, new_inputs_one, new_inputs_two, new_deltas_one, new_deltas_two, new_shares, new_ends, heads,
    SLOTS: tl.constexpr, RING: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, ACT: tl.constexpr,
    OBJECTIVE: tl.constexpr, PARAMETER: tl.constexpr, BOUNDED: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """One token of one row of a memory that is an MLP of two layers."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row // heads)
    i = tl.arange(0, D)
    theta = tl.load(step + row)
    if BOUNDED:
        theta = theta * scale_of(tl.load(norms + row * 2), tl.load(norms + row * 2 + 1), ACT)
    eta, keep = tl.exp(tl.load(log_momentum + row)), tl.exp(tl.load(log_keep + row))
    w, own, decay, push = next_shares(shares, ends, new_shares, new_ends, row, slot, theta, eta, keep, SLOTS, RING, READ)
    query = tl.load(q + row * D + i).to(tl.float32)
    key = tl.load(k + row * D + i).to(tl.float32)
    base = row * D * HIDDEN
    prediction = tl.zeros([D], tl.float32)
    for j in range(0, HIDDEN, TILE):
        columns = j + tl.arange(0, TILE)
        one = tl.load(anchor_one + base + i[:, None] * HIDDEN + columns[None, :]).to(tl.float32)
        hidden = activation(tl.sum(one * key[:, None], 0), ACT)
        two = tl.load(anchor_two + base + columns[:, None] * D + i[None, :]).to(tl.float32)
        prediction += tl.sum(two * hidden[:, None], 0)
    delta = surprise(prediction, tl.load(v + row * D + i).to(tl.float32), OBJECTIVE, PARAMETER)
    before = next_ring(inputs_one, new_inputs_one, row, slot, i, key, D, SLOTS, RING)
    alike = w * tl.sum(before * query[None, :], 1)
    own_one = own * tl.sum(query * key)
    alike_two = tl.zeros([RING], tl.float32)
    own_two = 0.0
    answer = tl.zeros([D], tl.float32)
    for j in range(0, HIDDEN, TILE):
        columns = j + tl.arange(0, TILE)
        tile = base + i[:, None] * HIDDEN + columns[None, :]
        turned = base + columns[:, None] * D + i[None, :]
        one = tl.load(anchor_one + tile).to(tl.float32)
        two = tl.load(anchor_two + turned).to(tl.float32)
        z = tl.sum(one * key[:, None], 0)
        hidden = activation(z, ACT)
        delta_one = activation_slope(z, ACT) * tl.sum(two * delta[None, :], 1)
        pairs = next_ring(deltas_one, new_deltas_one, row, slot, columns, delta_one, HIDDEN, SLOTS, RING)
        inner = next_ring(inputs_two, new_inputs_two, row, slot, columns, hidden, HIDDEN, SLOTS, RING)
        if READ == "chunk":
            answer += tl.sum(two * activation(tl.sum(one * query[:, None], 0), ACT)[:, None], 0)
        else:
            weights = decay * tl.load(m_one + tile).to(tl.float32) + push * tl.load(s_one + tile).to(tl.float32)
            z = tl.sum(weights * query[:, None], 0) - tl.sum(pairs * alike[:, None], 0) - own_one * delta_one
            x = activation(z, ACT)
            weights = decay * tl.load(m_two + turned).to(tl.float32) + push * tl.load(s_two + turned).to(tl.float32)
            answer += tl.sum(weights * x[:, None], 0)
            alike_two += tl.sum(inner * x[None, :], 1)
            own_two += tl.sum(x * hidden)
    pairs = next_ring(deltas_two, new_deltas_two, row, slot, i, delta, D, SLOTS, RING)
    if READ != "chunk":
        answer -= tl.sum(pairs * (w * alike_two)[:, None], 0) + own * own_two * delta
    tl.store(y + row * D + i, answer.to(y.dtype.element_ty))


@triton.jit(do_not_specialize=COUNTS)
def decode_write_kernel(
    m, s, inputs, deltas, shares, ends, new_m, new_s, copy_m, copy_s,
    SLOTS: tl.constexpr, RING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE_ROWS: tl.constexpr,
    TILE: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    """M and S of the last token: one tile of one fast weight ``[ROWS, COLUMNS]`` of one row; ``COPIED``: twice, once to
    read from."""
    row = tl.program_id(0).to(tl.int64)
    part: tl.constexpr = COLUMNS // TILE
    down = tl.program_id(1) // part * TILE_ROWS + tl.arange(0, TILE_ROWS)
    across = tl.program_id(1) % part * TILE + tl.arange(0, TILE)
    i = tl.arange(0, RING)
    w = tl.load(shares + row * 2 * SLOTS + i, mask=i < SLOTS, other=0.0)
    surprised = tl.load(shares + row * 2 * SLOTS + SLOTS + i, mask=i < SLOTS, other=0.0)
    # What counts nothing is not read: a slot without a pair may hold anything.
    there = ((w != 0.0) | (surprised != 0.0))[:, None]
    pair = row * SLOTS + i[:, None]
    left = tl.load(inputs + pair * ROWS + down[None, :], mask=there, other=0.0)
    right = tl.load(deltas + pair * COLUMNS + across[None, :], mask=there, other=0.0)
    left_m = tl.trans((left.to(tl.float32) * w[:, None]).to(left.dtype))
    left_s = tl.trans((left.to(tl.float32) * surprised[:, None]).to(left.dtype))
    here = row * ROWS * COLUMNS + down[:, None] * COLUMNS + across[None, :]
    weights = tl.load(m + here).to(tl.float32)
    momenta = tl.load(s + here).to(tl.float32)
    weights = tl.load(ends + row * 3) * weights + tl.load(ends + row * 3 + 1) * momenta - dot(left_m, right)
    momenta = tl.load(ends + row * 3 + 2) * momenta - dot(left_s, right)
    tl.store(new_m + here, weights.to(new_m.dtype.element_ty))
    tl.store(new_s + here, momenta.to(new_s.dtype.element_ty))
    if COPIED:
        tl.store(copy_m + here, weights.to(copy_m.dtype.element_ty))
        tl.store(copy_s + here, momenta.to(copy_s.dtype.element_ty))
