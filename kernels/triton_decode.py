# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
"""Triton kernels that decode one token per row: weights are read once, and written once a chunk.

Inside a chunk a token changes M and S by outer products of an input u and a delta d per fast weight, so the last tokens are
kept as such pairs in a ring of one chunk's slots, and the weights of any token are

    M_t = a0 M + f S - sum_i w_i u_i^T d_i          S_t = e0 S - sum_i s_i u_i^T d_i

with M and S as written when the chunk began. A token multiplies s and e0 by its momentum, puts its step where its pair stands
in s, and then w <- keep w + s, f <- keep f + e0, a0 <- keep a0. An eager update would read and write M and S in fp32 at every
token; here M, S are read in the operands' type. The pairs, ``shares`` and ``ends`` change in place, so a step can be captured
in a CUDA graph and replayed.

Arrays: ``N`` rows (batch times heads); ``shape`` is ``[d, d]`` of a linear memory, of an MLP ``[2, d, hidden]`` with layer 2
transposed. ``m``, ``s`` fp32 ``[N, *shape]`` as last written; ``near`` ``[N, 3, *shape]`` in the operands' type: M, S, and the
weights gradients are taken at, which count only where ``apart`` ``[N]`` is not 0 (a state that was cut inside a chunk); else
those are M. Rings ``[N, C, size]`` in the operands' type, ``shares`` w and s ``[N, 2, C]``, ``ends`` a0, f, e0 ``[N, 3]`` and
``scale`` of the step ``[N]`` in fp32. ``position`` int64 ``[B]``: the token's place in its document, below 0: no token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans_graph.kernels.triton_common import activation, activation_slope, dot, surprise
from titans_graph.kernels.triton_mlp import step_scale


@triton.jit
def shares_of(shares, ends, row, fresh, slot, theta, eta, keep, C: tl.constexpr, READ: tl.constexpr):
    """Take a token into shares and ends, and give what its query reads with: w without its own pair, w of that, a0, f."""
    i = tl.arange(0, C)
    here = shares + row * 2 * C + i
    w = tl.where(fresh, 0.0, tl.load(here))
    s = tl.where(fresh, 0.0, tl.load(here + C))
    decay = tl.where(fresh, 1.0, tl.load(ends + row * 3))
    push = tl.where(fresh, 0.0, tl.load(ends + row * 3 + 1))
    first = tl.where(fresh, 1.0, tl.load(ends + row * 3 + 2)) * eta
    # All threads have read what is written below.
    tl.debug_barrier()
    s = tl.where(i == slot, theta, eta * s)
    new = keep * w + s
    tl.store(here, new)
    tl.store(here + C, s)
    tl.store(ends + row * 3, keep * decay)
    tl.store(ends + row * 3 + 1, keep * push + first)
    tl.store(ends + row * 3 + 2, first)
    own = 0.0
    if READ == "after":
        own = theta
        w = new
        decay, push = keep * decay, keep * push + first
    return tl.where(i == slot, 0.0, w), own, decay, push


@triton.jit
def linear_decode_kernel(
    q, k, v, step, log_momentum, log_keep, position, near, inputs, deltas, shares, ends, apart, y, heads,
    C: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, OBJECTIVE: tl.constexpr, PARAMETER: tl.constexpr,
    READ: tl.constexpr,
):  # fmt: skip
    """One token of one row of a linear memory."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(position + row // heads)
    i = tl.arange(0, D)
    if place < 0:
        tl.store(y + row * D + i, tl.zeros([D], tl.float32).to(y.dtype.element_ty))
        return
    size: tl.constexpr = D * D
    slot = place % C
    fresh = slot == 0
    base = near + row * 3 * size
    at = base + tl.where((tl.load(apart + row) != 0) & (slot != 0), 2 * size, 0)
    theta = tl.load(step + row)
    eta, keep = tl.exp(tl.load(log_momentum + row)), tl.exp(tl.load(log_keep + row))
    w, own, decay, push = shares_of(shares, ends, row, fresh, slot, theta, eta, keep, C, READ)
    query = tl.load(q + row * D + i).to(tl.float32)
    key = tl.load(k + row * D + i).to(tl.float32)
    # Pairs of this chunk alone: what lies behind may be of another document.
    old = tl.arange(0, C) < slot
    pair = tl.arange(0, C)[:, None] * D
    if READ != "chunk":
        before = tl.load(inputs + row * C * D + pair + i[None, :], mask=old[:, None], other=0.0).to(tl.float32)
        alike = w * tl.sum(before * query[None, :], 1)
        own = own * tl.sum(query * key)
    tl.store(inputs + (row * C + slot) * D + i, key.to(inputs.dtype.element_ty))
    for j in range(0, D, TILE):
        columns = j + tl.arange(0, TILE)
        tile = i[:, None] * D + columns[None, :]
        anchor = tl.load(at + tile).to(tl.float32)
        delta = surprise(tl.sum(anchor * key[:, None], 0), tl.load(v + row * D + columns).to(tl.float32), OBJECTIVE, PARAMETER)
        if READ == "chunk":
            answer = tl.sum(anchor * query[:, None], 0)
        else:
            weights = decay * tl.load(base + tile).to(tl.float32) + push * tl.load(base + size + tile).to(tl.float32)
            pairs = tl.load(deltas + row * C * D + pair + columns[None, :], mask=old[:, None], other=0.0).to(tl.float32)
            answer = tl.sum(weights * query[:, None], 0) - tl.sum(pairs * alike[:, None], 0) - own * delta
        tl.store(deltas + (row * C + slot) * D + columns, delta.to(deltas.dtype.element_ty))
        tl.store(y + row * D + columns, answer.to(y.dtype.element_ty))
    if fresh:
        tl.store(apart + row, 0)


@triton.jit
def mlp_decode_kernel(
    q, k, v, step, log_momentum, log_keep, position, near, inputs_one, deltas_one, inputs_two, deltas_two, shares, ends,
    scale, apart, y, heads,
    C: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr, ACT: tl.constexpr, OBJECTIVE: tl.constexpr,
    PARAMETER: tl.constexpr, BOUNDED: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """One token of one row of a memory that is an MLP of two layers."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(position + row // heads)
    i = tl.arange(0, D)
    if place < 0:
        tl.store(y + row * D + i, tl.zeros([D], tl.float32).to(y.dtype.element_ty))
        return
    layer: tl.constexpr = D * HIDDEN
    size: tl.constexpr = 2 * layer
    slot = place % C
    fresh = slot == 0
    base = near + row * 3 * size
    at = base + tl.where((tl.load(apart + row) != 0) & (slot != 0), 2 * size, 0)
    theta = tl.load(step + row)
    if BOUNDED:
        factor = 1.0
        if fresh:
            factor = step_scale(base, base, fresh, D, HIDDEN, TILE, False, ACT)
            tl.store(scale + row, factor)
        else:
            factor = tl.load(scale + row)
        theta = theta * factor
    eta, keep = tl.exp(tl.load(log_momentum + row)), tl.exp(tl.load(log_keep + row))
    w, own, decay, push = shares_of(shares, ends, row, fresh, slot, theta, eta, keep, C, READ)
    query = tl.load(q + row * D + i).to(tl.float32)
    key = tl.load(k + row * D + i).to(tl.float32)
    # Pairs of this chunk alone: what lies behind may be of another document.
    old = (tl.arange(0, C) < slot)[:, None]
    narrow = row * C * D + tl.arange(0, C)[:, None] * D + i[None, :]
    prediction = tl.zeros([D], tl.float32)
    for j in range(0, HIDDEN, TILE):
        tile = i[:, None] * HIDDEN + j + tl.arange(0, TILE)[None, :]
        hidden = activation(tl.sum(tl.load(at + tile).to(tl.float32) * key[:, None], 0), ACT)
        prediction += tl.sum(tl.load(at + layer + tile).to(tl.float32) * hidden[None, :], 1)
    delta = surprise(prediction, tl.load(v + row * D + i).to(tl.float32), OBJECTIVE, PARAMETER)
    alike = tl.zeros([C], tl.float32)
    own_one = 0.0
    own_two = 0.0
    if READ != "chunk":
        alike = w * tl.sum(tl.load(inputs_one + narrow, mask=old, other=0.0).to(tl.float32) * query[None, :], 1)
        own_one = own * tl.sum(query * key)
    alike_two = tl.zeros([C], tl.float32)
    answer = tl.zeros([D], tl.float32)
    for j in range(0, HIDDEN, TILE):
        columns = j + tl.arange(0, TILE)
        tile = i[:, None] * HIDDEN + columns[None, :]
        wide = row * C * HIDDEN + tl.arange(0, C)[:, None] * HIDDEN + columns[None, :]
        here = (row * C + slot) * HIDDEN + columns
        one = tl.load(at + tile).to(tl.float32)
        two = tl.load(at + layer + tile).to(tl.float32)
        z = tl.sum(one * key[:, None], 0)
        hidden = activation(z, ACT)
        delta_one = activation_slope(z, ACT) * tl.sum(two * delta[:, None], 0)
        if READ == "chunk":
            answer += tl.sum(two * activation(tl.sum(one * query[:, None], 0), ACT)[None, :], 1)
        else:
            weights = decay * tl.load(base + tile).to(tl.float32) + push * tl.load(base + size + tile).to(tl.float32)
            pairs = tl.load(deltas_one + wide, mask=old, other=0.0).to(tl.float32)
            z = tl.sum(weights * query[:, None], 0) - tl.sum(pairs * alike[:, None], 0) - own_one * delta_one
            x = activation(z, ACT)
            weights = decay * tl.load(base + layer + tile).to(tl.float32)
            weights += push * tl.load(base + size + layer + tile).to(tl.float32)
            answer += tl.sum(weights * x[None, :], 1)
            alike_two += tl.sum(tl.load(inputs_two + wide, mask=old, other=0.0).to(tl.float32) * x[None, :], 1)
            own_two += tl.sum(x * hidden)
        tl.store(deltas_one + here, delta_one.to(deltas_one.dtype.element_ty))
        tl.store(inputs_two + here, hidden.to(inputs_two.dtype.element_ty))
    if READ != "chunk":
        pairs = tl.load(deltas_two + narrow, mask=old, other=0.0).to(tl.float32)
        answer -= tl.sum(pairs * (w * alike_two)[:, None], 0) + own * own_two * delta
    tl.store(inputs_one + (row * C + slot) * D + i, key.to(inputs_one.dtype.element_ty))
    tl.store(deltas_two + (row * C + slot) * D + i, delta.to(deltas_two.dtype.element_ty))
    tl.store(y + row * D + i, answer.to(y.dtype.element_ty))
    if fresh:
        tl.store(apart + row, 0)


@triton.jit
def decode_write_kernel(
    position, m, s, near, inputs, deltas, shares, ends, start_m, start_s, start_rows, heads, offset, size,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """Before a token that begins a chunk: M and S with the ring's pairs, or those of a restart where it begins a document.

    One fast weight: ``offset`` into a row's ``size`` numbers, ``ROWS`` times ``COLUMNS``; its rows are the inputs, or
    where ``SWAPPED`` the deltas (layer 2 is kept transposed). The ring is empty afterwards for the step that follows, which
    clears ``shares`` and ``ends``.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(position + row // heads)
    if (place < 0) | (place % C != 0):
        return
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    tile = offset + tl.arange(0, ROWS)[:, None] * COLUMNS + columns[None, :]
    here = row * size + tile
    if place == 0:
        start = row % start_rows * size + tile
        weights = tl.load(start_m + start)
        momenta = tl.load(start_s + start)
    else:
        i = tl.arange(0, C)
        w = tl.load(shares + row * 2 * C + i)[:, None]
        surprised = tl.load(shares + row * 2 * C + C + i)[:, None]
        at = row * C + i[:, None]
        if SWAPPED:
            left = tl.load(deltas + at * ROWS + tl.arange(0, ROWS)[None, :])
            right = tl.load(inputs + at * COLUMNS + columns[None, :])
        else:
            left = tl.load(inputs + at * ROWS + tl.arange(0, ROWS)[None, :])
            right = tl.load(deltas + at * COLUMNS + columns[None, :])
        operand = left.dtype
        left_m = tl.trans((left.to(tl.float32) * w).to(operand))
        left_s = tl.trans((left.to(tl.float32) * surprised).to(operand))
        weights = tl.load(m + here)
        momenta = tl.load(s + here)
        weights = tl.load(ends + row * 3) * weights + tl.load(ends + row * 3 + 1) * momenta - dot(left_m, right)
        momenta = tl.load(ends + row * 3 + 2) * momenta - dot(left_s, right)
    tl.store(m + here, weights)
    tl.store(s + here, momenta)
    close = near + row * 3 * size + tile
    tl.store(close, weights.to(near.dtype.element_ty))
    tl.store(close + size, momenta.to(near.dtype.element_ty))
