# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
"""Triton kernels for the gates of a memory's chunk: the mixing matrix and its adjoint (memory_chunk.py says what they are).

One program per chunk and head. Products of gates are formed by the recurrence itself, row by row,

    E[t] = eta_t E[t-1] + onehot(t)        G[t] = a_t G[t-1] + E[t]        W = G diag(theta)

so nothing is divided, no logarithms are subtracted, a gate of exactly 0 is legal and all values are at most the number of
slots. An invalid slot has gates 1 and adds no E to G.

Arrays, chunk by chunk (``N`` chunks of the plan times ``H`` heads): ``mix`` W ``[N, H, C, C]`` in the operands' type;
``vectors`` a0, f (as read by each slot), w, u (W's last row and the same for S) ``[N, H, 4, C]`` and ``ends`` A(C,0), f_C,
E(C,0) ``[N, H, 4]`` in fp32. The plan's tables are those of triton_plan.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans_graph.kernels.triton_common import COUNTS, sequence_place, valid_slots


@triton.jit
def slot_gates(log_momentum, log_keep, valid, first, where, length, t):
    """Of slot ``t``: whether it holds a token, its keep ``a`` and its momentum; both 1 where it holds none."""
    here = (tl.load(valid + where + t, mask=t < length, other=0) != 0) & (t < length)
    a = tl.exp(tl.load(log_keep + first + t, mask=here, other=0.0))
    m = tl.exp(tl.load(log_momentum + first + t, mask=here, other=0.0))
    return here, a, m


@triton.jit
def after_row(gain, share, here, a, m, own):
    """The rows G and E after a slot from those before it; ``own``: which entry is the slot's."""
    share = share * m + tl.where(own, 1.0, 0.0)
    return gain * a + tl.where(here, share, 0.0), share


@triton.jit
def after_slot(gain, share, decay, push, surprise, here, a, m, own):
    """G, E, a0, f and e0 after a slot from those before it."""
    gain, share = after_row(gain, share, here, a, m, own)
    surprise = surprise * m
    return gain, share, decay * a, push * a + tl.where(here, surprise, 0.0), surprise


@triton.jit(do_not_specialize=COUNTS)
def gates_kernel(
    step,
    log_momentum,
    log_keep,
    valid,
    sequences,
    chunks,
    mix,
    vectors,
    ends,
    stride,
    heads,
    C: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """W, a0, f, w, u and the end's scalars; ``SHIFT``: slots read the weights before their own update."""
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    number, _, first, where, length = sequence_place(sequences, chunks, n, h, stride, C)
    if number < 0:
        return
    i = tl.arange(0, C)
    ok = valid_slots(valid, where, length, C)
    theta = tl.load(step + first + i, mask=ok, other=0.0)
    at = n * heads + h
    gain = tl.zeros([C], tl.float32)
    share = tl.zeros([C], tl.float32)
    decays = tl.zeros([C], tl.float32)
    pushes = tl.zeros([C], tl.float32)
    decay = 1.0
    push = 0.0
    surprise = 1.0
    for t in range(C):
        here, a, m = slot_gates(log_momentum, log_keep, valid, first, where, length, t)
        row = mix + (at * C + t) * C + i
        if SHIFT:
            tl.store(row, (gain * theta).to(mix.dtype.element_ty))
            decays = tl.where(i == t, decay, decays)
            pushes = tl.where(i == t, push, pushes)
        gain, share, decay, push, surprise = after_slot(gain, share, decay, push, surprise, here, a, m, i == t)
        if not SHIFT:
            tl.store(row, (gain * theta).to(mix.dtype.element_ty))
            decays = tl.where(i == t, decay, decays)
            pushes = tl.where(i == t, push, pushes)
    out = vectors + at * 4 * C + i
    tl.store(out, decays)
    tl.store(out + C, pushes)
    tl.store(out + 2 * C, gain * theta)
    tl.store(out + 3 * C, share * theta)
    tl.store(ends + at * 4, decay)
    tl.store(ends + at * 4 + 1, push)
    tl.store(ends + at * 4 + 2, surprise)


@triton.jit(do_not_specialize=COUNTS)
def gates_backward_kernel(
    step,
    log_momentum,
    log_keep,
    valid,
    sequences,
    chunks,
    scale,
    d_mix,
    d_vectors,
    d_ends,
    rows,
    d_step,
    d_log_momentum,
    d_log_keep,
    stride,
    heads,
    C: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Cotangents of the three gates from those of W, the vectors and the ends, all of them taken times ``scale``.

    ``scale`` ``[N, H]`` multiplies the step of a whole chunk (its bound; a constant). ``rows`` ``[N, H, 2, C, C]`` fp32 is
    room for G and E.
    """
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    number, _, first, where, length = sequence_place(sequences, chunks, n, h, stride, C)
    if number < 0:
        return
    i = tl.arange(0, C)
    ok = valid_slots(valid, where, length, C)
    at = n * heads + h
    factor = tl.load(scale + at)
    theta = tl.load(step + first + i, mask=ok, other=0.0) * factor
    g_rows = rows + at * 2 * C * C + i
    e_rows = g_rows + C * C
    gain = tl.zeros([C], tl.float32)
    share = tl.zeros([C], tl.float32)
    decays = tl.zeros([C], tl.float32)
    pushes = tl.zeros([C], tl.float32)
    surprises = tl.zeros([C], tl.float32)
    decay = 1.0
    push = 0.0
    surprise = 1.0
    for t in range(C):
        here, a, m = slot_gates(log_momentum, log_keep, valid, first, where, length, t)
        # What stood before slot t: the factors of its gates' cotangents.
        tl.store(g_rows + t * C, gain)
        tl.store(e_rows + t * C, share)
        decays = tl.where(i == t, decay, decays)
        pushes = tl.where(i == t, push, pushes)
        surprises = tl.where(i == t, surprise, surprises)
        gain, share, decay, push, surprise = after_slot(gain, share, decay, push, surprise, here, a, m, i == t)
    tl.debug_barrier()
    given = d_vectors + at * 4 * C
    d_last = tl.load(given + 2 * C + i)
    d_surprise = tl.load(given + 3 * C + i)
    d_theta = d_last * gain + d_surprise * share
    d_gain = d_last * theta
    d_share = d_surprise * theta
    d_decay = tl.load(d_ends + at * 4)
    d_push = tl.load(d_ends + at * 4 + 1)
    d_first = tl.load(d_ends + at * 4 + 2)
    d_keeps = tl.zeros([C], tl.float32)
    d_momenta = tl.zeros([C], tl.float32)
    for back in range(C):
        t = C - 1 - back
        here, a, m = slot_gates(log_momentum, log_keep, valid, first, where, length, t)
        # The slot whose row of W holds G[t]: t itself, or the one after it.
        read = t + 1 if SHIFT else t
        seen = read < C
        cotangent = tl.load(d_mix + (at * C + read) * C + i, mask=(i < C) & seen, other=0.0).to(tl.float32)
        d_gain += cotangent * theta
        d_decay += tl.load(given + read, mask=seen, other=0.0)
        d_push += tl.load(given + C + read, mask=seen, other=0.0)
        d_share += tl.where(here, d_gain, 0.0)
        d_first += tl.where(here, d_push, 0.0)
        before = tl.load(g_rows + t * C)
        shared = tl.load(e_rows + t * C)
        after, _shared = after_row(before, shared, here, a, m, i == t)
        d_theta += cotangent * after
        d_a = tl.sum(d_gain * before) + d_decay * tl.sum(tl.where(i == t, decays, 0.0))
        d_a += d_push * tl.sum(tl.where(i == t, pushes, 0.0))
        d_m = tl.sum(d_share * shared) + d_first * tl.sum(tl.where(i == t, surprises, 0.0))
        d_keeps = tl.where((i == t) & here, d_a * a, d_keeps)
        d_momenta = tl.where((i == t) & here, d_m * m, d_momenta)
        d_gain = d_gain * a
        d_share = d_share * m
        d_decay = d_decay * a
        d_push = d_push * a
        d_first = d_first * m
    inside = i < length
    tl.store(d_step + first + i, tl.where(ok, d_theta * factor, 0.0), mask=inside)
    tl.store(d_log_momentum + first + i, d_momenta, mask=inside)
    tl.store(d_log_keep + first + i, d_keeps, mask=inside)
