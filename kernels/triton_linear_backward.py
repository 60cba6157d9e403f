# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
"""Triton kernels of a linear memory, backward: four, of which only the reverse scan needs an order.

With bars for cotangents, P = W * Q K^T, z = K A (A: the weights at which gradients are taken), M' and S' at the chunk's end:

    query:   dW = -(dY D^T) * Q K^T     dQ = a0 (dY M^T) + f (dY S^T) - (W * dY D^T) K      da0, df = rows of Q * dY M^T, ..
    delta:   dD = -P^T dY
    reverse: dD += -w (K dM') - u (K dS')     dz = slope(D) dD     dM = a dM' + Q^T (a0 dY)     dA = K^T dz
             dS = f dM' + e dS' + Q^T (f dY)
    key:     dK = -(W * dY D^T)^T Q + dz A^T - w (D dM'^T) - u (D dS'^T)     dw, du = -rows of K * D dM'^T, ..
             da, df_C, de = <dM', M>, <dM', S>, <dS', S>

The reverse scan keeps what has to be summed over value columns out of its programs, so it is split as the forward one is,
and nothing is summed by atomics: results are the same in every run. It leaves the cotangents at the chunks' ends, in the
operands' type: ``d_states`` and ``d_moving`` ``[N, H, d, d]``. Where a chunk restarts, the chunk before it has none; its
place holds the cotangent of the initial state.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from titans_graph.kernels.triton_common import (
    add_dot,
    dot,
    grid_of,
    sequence_place,
    surprise_by_value,
    surprise_slope,
)
from titans_graph.kernels.triton_config import Config, Kernel, Sizes
from titans_graph.kernels.triton_linear import argument_types, columns_of, constants, holds, supported


@triton.jit
def linear_delta_backward_kernel(
    q, k, d_y, mix, sequences, chunks, d_deltas, stride, heads,
    C: tl.constexpr, D: tl.constexpr, V: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """What reading adds to the cotangents of the deltas of ``T`` tokens, in ``V`` value columns."""
    tile, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n, t = tile // (C // T), tile % (C // T)
    number, _, first, _, length = sequence_place(sequences, chunks, n, h, stride, C)
    if number < 0:
        return
    operand = k.dtype.element_ty
    at = n * heads + h
    tokens = grid_of(T, D)
    values = columns_of(T, D, V)
    i = tl.arange(0, T)
    span = tl.load(chunks + n * 4 + 3)
    ok = holds(span, t * T, T)
    keys = tl.load(k + (first + t * T) * D + tokens, mask=ok, other=0.0)
    total = tl.zeros([T, V], tl.float32)
    for j in range(t, C // T):
        asks = holds(span, j * T, T)
        queries = tl.load(q + (first + j * T) * D + tokens, mask=asks, other=0.0)
        d_answer = tl.load(d_y + (first + j * T) * D + values, mask=asks, other=0.0)
        # W of later tokens' rows, transposed.
        weighting = tl.load(mix + (at * C + j * T) * C + t * T + i[None, :] * C + i[:, None]).to(tl.float32)
        weighting = -weighting * dot(keys, tl.trans(queries))
        total = add_dot(total, weighting.to(operand), d_answer)
    tl.store(d_deltas + (at * C + t * T) * D + values, total.to(operand))


@triton.jit
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
    if count > 0:
        tl.store(d_states + ((base + count - 1) * heads + h) * D * D + cell, now.to(operand))
        tl.store(d_moving + ((base + count - 1) * heads + h) * D * D + cell, moves.to(operand))
    late = count * 0 - 1
    restarts = 0
    ahead = tl.load(chunks + (base + count) * 4 - 2, mask=count > 0, other=0)
    span_ahead = tl.load(chunks + (base + count) * 4 - 1, mask=count > 0, other=0)
    for back in range(0, count):
        c = count - 1 - back
        n = base + c
        at = n * heads + h
        flags = ahead
        span = span_ahead
        ahead = tl.load(chunks + n * 4 - 2, mask=c > 0, other=0)
        span_ahead = tl.load(chunks + n * 4 - 1, mask=c > 0, other=0)
        seldom = row + tl.minimum(flags, 0)
        now_in = now.to(operand)
        moves_in = moves.to(operand)
        moves = tl.load(ends + at * 4 + 1) * now + tl.load(ends + at * 4 + 2) * moves
        now = tl.load(ends + at * 4) * now
        begins = tl.full([1, 1], 1, tl.int1)
        if RESUMED:
            begins = begins & ((flags & 1) != 0)
            # The only such chunk of the sequence: later ones begin where their first token is, or are empty.
            if ((flags & 1) == 0) & (span // 65536 > span % 65536):
                late = c
        for j in tl.static_range(C // T):
            start = first + c * C + j * T
            left = length - c * C - j * T
            ok = holds(span, j * T, T)
            keys = tl.load(k + start * D + tokens, mask=ok, other=0.0)
            queries = tl.load(q + start * D + tokens, mask=ok, other=0.0)
            d_answer = tl.load(d_y + start * D + values, mask=ok, other=0.0)
            gates = vectors + at * 4 * C + j * T + i
            d_delta = -tl.load(gates + 2 * C)[:, None] * dot(keys, now_in)
            d_delta -= tl.load(gates + 3 * C)[:, None] * dot(keys, moves_in)
            place = (at * C + j * T) * D + values
            if READ != "chunk":
                d_delta += tl.load(d_deltas + place).to(tl.float32)
            delta = d_delta
            if OBJECTIVE == "huber":
                delta = tl.load(deltas + place).to(tl.float32)
            d_value = tl.where(ok, surprise_by_value(delta, OBJECTIVE, PARAMETER) * d_delta, 0.0)
            tl.store(d_v + start * D + values, d_value.to(operand), mask=i[:, None] < left)
            if READ != "chunk":
                now = add_dot(now, tl.trans(queries), (tl.load(gates)[:, None] * d_answer).to(operand))
                moves = add_dot(moves, tl.trans(queries), (tl.load(gates + C)[:, None] * d_answer).to(operand))
            # Where gradients are not taken at the chunk's first weights, what they give is found below.
            if READ == "chunk":
                now = add_dot(now, tl.trans(queries), tl.where(begins, d_answer, 0.0))
            if OBJECTIVE != "dot":
                d_seen = tl.where(ok & begins, surprise_slope(delta, OBJECTIVE, PARAMETER) * d_delta, 0.0)
                now = add_dot(now, tl.trans(keys), d_seen.to(operand))
        if c == last_first:
            now += tl.load(d_anchor_out + seldom + cell)
        if c > 0:
            tl.store(d_states + (at - heads) * D * D + cell, now.to(operand))
            tl.store(d_moving + (at - heads) * D * D + cell, moves.to(operand))
        if RESTARTS:
            if (flags & 2) != 0:
                restarts += 1
                if c > 0:
                    now = tl.zeros([D, V], tl.float32)
                    moves = tl.zeros([D, V], tl.float32)
    # Not known before the loop's end, so that no address of what follows is kept in registers through the loop.
    row_after = row + tl.minimum(ahead, 0)
    if RESTARTS:
        fresh = (tl.load(chunks + base * 4 + 2, mask=count > 0, other=0) & 2) != 0
        tl.store(d_m + row_after + cell, tl.where(fresh, 0.0, now))
        tl.store(d_s + row_after + cell, tl.where(fresh, 0.0, moves))
        now = tl.where(fresh, now, 0.0)
        moves = tl.where(fresh, moves, 0.0)
        if restarts > 0:
            # Other threads wrote what is read here.
            tl.debug_barrier()
            for c in tl.range(1, count, num_stages=1):
                if (tl.load(chunks + (base + c) * 4 + 2) & 2) != 0:
                    before = ((base + c - 1) * heads + h) * D * D + cell
                    now += tl.load(d_states + before).to(tl.float32)
                    moves += tl.load(d_moving + before).to(tl.float32)
        tl.store(d_start_m + row_after + cell, now)
        tl.store(d_start_s + row_after + cell, moves)
    else:
        tl.store(d_m + row_after + cell, now)
        tl.store(d_s + row_after + cell, moves)
    held = tl.zeros([D, V], tl.float32)
    if last_first < 0:
        held = tl.load(d_anchor_out + row_after + cell)
    if RESUMED:
        if late >= 0:
            # Other threads wrote what is read here.
            tl.debug_barrier()
            span = tl.load(chunks + (base + late) * 4 + 3)
            for j in tl.static_range(C // T):
                start = first + late * C + j * T
                ok = holds(span, j * T, T)
                if READ == "chunk":
                    queries = tl.load(q + start * D + tokens, mask=ok, other=0.0)
                    held = add_dot(held, tl.trans(queries), tl.load(d_y + start * D + values, mask=ok, other=0.0))
                if OBJECTIVE != "dot":
                    keys = tl.load(k + start * D + tokens, mask=ok, other=0.0)
                    held -= dot(tl.trans(keys), tl.load(d_v + start * D + values, mask=ok, other=0.0))
    tl.store(d_anchor + row_after + cell, held)


@triton.jit
def linear_query_backward_kernel(
    q, k, d_y, mix, vectors, sequences, chunks, states, moving, deltas, anchor, d_q, d_mix, d_vectors, stride, heads,
    C: tl.constexpr, D: tl.constexpr, V: tl.constexpr, T: tl.constexpr, READ: tl.constexpr, RESUMED: tl.constexpr,
):  # fmt: skip
    """dq of ``T`` tokens, and the cotangents of their rows of W, a0 and f."""
    tile, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n, t = tile // (C // T), tile % (C // T)
    number, flags, first, _, length = sequence_place(sequences, chunks, n, h, stride, C)
    if number < 0:
        return
    operand = q.dtype.element_ty
    at = n * heads + h
    tokens = grid_of(T, D)
    values = tl.arange(0, T)[:, None] * D + tl.arange(0, V)[None, :]
    cell = tl.arange(0, D)[:, None] * D + tl.arange(0, V)[None, :]
    i = tl.arange(0, T)
    span = tl.load(chunks + n * 4 + 3)
    ok = holds(span, t * T, T)
    here = d_y + (first + t * T) * D + values
    through = tl.zeros([T, D], tl.float32)
    if READ == "chunk":
        for b in range(0, D, V):
            held = tl.load(states + at * D * D + cell + b)
            if RESUMED:
                if (flags & 1) == 0:
                    held = tl.load(anchor + (number * heads + h) * D * D + cell + b).to(operand)
            through = add_dot(through, tl.load(here + b, mask=ok, other=0.0), tl.trans(held))
        minus = -through
        tl.store(d_vectors + at * 4 * C + t * T + i, tl.zeros([T], tl.float32))
        tl.store(d_vectors + at * 4 * C + C + t * T + i, tl.zeros([T], tl.float32))
    else:
        queries = tl.load(q + (first + t * T) * D + tokens, mask=ok, other=0.0)
        asked = queries.to(tl.float32)
        gates = at * 4 * C + t * T + i
        for b in range(0, D, V):
            through = add_dot(through, tl.load(here + b, mask=ok, other=0.0), tl.trans(tl.load(states + at * D * D + cell + b)))
        tl.store(d_vectors + gates, tl.sum(asked * through, 1))
        minus = -tl.load(vectors + gates)[:, None] * through
        through = tl.zeros([T, D], tl.float32)
        for b in range(0, D, V):
            through = add_dot(through, tl.load(here + b, mask=ok, other=0.0), tl.trans(tl.load(moving + at * D * D + cell + b)))
        tl.store(d_vectors + gates + C, tl.sum(asked * through, 1))
        minus -= tl.load(vectors + gates + C)[:, None] * through
        block = (at * C + t * T) * C + i[:, None] * C + i[None, :]
        for j in range(0, t + 1):
            pull = tl.zeros([T, T], tl.float32)
            for b in range(0, D, V):
                delta = tl.load(deltas + (at * C + j * T) * D + values + b)
                pull = add_dot(pull, tl.load(here + b, mask=ok, other=0.0), tl.trans(delta))
            seen = holds(span, j * T, T)
            keys = tl.load(k + (first + j * T) * D + tokens, mask=seen, other=0.0)
            tl.store(d_mix + block + j * T, (-pull * dot(queries, tl.trans(keys))).to(operand))
            pull = tl.load(mix + block + j * T).to(tl.float32) * pull
            minus = add_dot(minus, pull.to(operand), keys)
        for j in range(t + 1, C // T):
            tl.store(d_mix + block + j * T, tl.zeros([T, T], operand))
    inside = i[:, None] < length - t * T
    tl.store(d_q + (first + t * T) * D + tokens, tl.where(ok, -minus, 0.0).to(operand), mask=inside)


@triton.jit
def ends_backward(states, moving, d_states, d_moving, d_ends, alive, D: tl.constexpr, V: tl.constexpr):
    """Cotangents of the three scalars of a chunk's end."""
    cell = tl.arange(0, D)[:, None] * D + tl.arange(0, V)[None, :]
    keep = 0.0
    push = 0.0
    surprise = 0.0
    for b in range(0, D, V):
        d_now = tl.load(d_states + cell + b, mask=alive, other=0.0).to(tl.float32)
        d_moves = tl.load(d_moving + cell + b, mask=alive, other=0.0).to(tl.float32)
        moves = tl.load(moving + cell + b).to(tl.float32)
        keep += tl.sum(d_now * tl.load(states + cell + b).to(tl.float32))
        push += tl.sum(d_now * moves)
        surprise += tl.sum(d_moves * moves)
    tl.store(d_ends, keep)
    tl.store(d_ends + 1, push)
    tl.store(d_ends + 2, surprise)


@triton.jit
def linear_key_backward_kernel(
    q, k, d_y, d_v, mix, vectors, sequences, chunks, states, moving, deltas, anchor, d_states, d_moving,
    d_k, d_vectors, d_ends, total, stride, heads,
    C: tl.constexpr, D: tl.constexpr, V: tl.constexpr, T: tl.constexpr, OBJECTIVE: tl.constexpr, READ: tl.constexpr,
    RESUMED: tl.constexpr, RESTARTS: tl.constexpr,
):  # fmt: skip
    """dk of ``T`` tokens, the cotangents of their w and u, and of the end's scalars; ``total``: chunks of the plan."""
    tile, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n, t = tile // (C // T), tile % (C // T)
    number, flags, first, _, length = sequence_place(sequences, chunks, n, h, stride, C)
    if number < 0:
        return
    operand = q.dtype.element_ty
    at = n * heads + h
    tokens = grid_of(T, D)
    values = tl.arange(0, T)[:, None] * D + tl.arange(0, V)[None, :]
    cell = tl.arange(0, D)[:, None] * D + tl.arange(0, V)[None, :]
    i = tl.arange(0, T)
    span = tl.load(chunks + n * 4 + 3)
    ok = holds(span, t * T, T)
    inside = i[:, None] < length - t * T
    alive = number >= 0
    if RESTARTS:
        follows = (n + 1 < total) & (length > C)
        alive = (tl.load(chunks + n * 4 + 6, mask=follows, other=0) & 2) == 0
    state = at * D * D
    own = deltas + (at * C + t * T) * D + values
    gates = at * 4 * C + t * T + i
    keys = tl.load(k + (first + t * T) * D + tokens, mask=ok, other=0.0)
    through = tl.zeros([T, D], tl.float32)
    for b in range(0, D, V):
        through = add_dot(through, tl.load(own + b), tl.trans(tl.load(d_states + state + cell + b, mask=alive, other=0.0)))
    tl.store(d_vectors + gates + 2 * C, -tl.sum(keys.to(tl.float32) * through, 1))
    minus = tl.load(vectors + gates + 2 * C)[:, None] * through
    through = tl.zeros([T, D], tl.float32)
    for b in range(0, D, V):
        through = add_dot(through, tl.load(own + b), tl.trans(tl.load(d_moving + state + cell + b, mask=alive, other=0.0)))
    tl.store(d_vectors + gates + 3 * C, -tl.sum(keys.to(tl.float32) * through, 1))
    minus += tl.load(vectors + gates + 3 * C)[:, None] * through
    if OBJECTIVE != "dot":
        # The derivative by the value is minus that by the prediction.
        for b in range(0, D, V):
            held = tl.load(states + state + cell + b)
            if RESUMED:
                if (flags & 1) == 0:
                    held = tl.load(anchor + (number * heads + h) * D * D + cell + b).to(operand)
            d_value = tl.load(d_v + (first + t * T) * D + values + b, mask=inside, other=0.0)
            minus = add_dot(minus, d_value, tl.trans(held))
    if READ != "chunk":
        for j in range(t, C // T):
            asks = holds(span, j * T, T)
            pull = tl.zeros([T, T], tl.float32)
            for b in range(0, D, V):
                d_answer = tl.load(d_y + (first + j * T) * D + values + b, mask=asks, other=0.0)
                pull = add_dot(pull, tl.load(own + b), tl.trans(d_answer))
            pull *= tl.load(mix + (at * C + j * T) * C + t * T + i[None, :] * C + i[:, None]).to(tl.float32)
            queries = tl.load(q + (first + j * T) * D + tokens, mask=asks, other=0.0)
            minus = add_dot(minus, pull.to(operand), queries)
    tl.store(d_k + (first + t * T) * D + tokens, tl.where(ok, -minus, 0.0).to(operand), mask=inside)
    if t == 0:
        ends_backward(states + state, moving + state, d_states + state, d_moving + state, d_ends + at * 4, alive, D, V)


SINGLE = "vectors ends anchor d_vectors d_ends d_m_out d_s_out d_anchor_out d_m d_s d_anchor d_start_m d_start_s"


def _kernel(name: str, function: Any) -> Kernel:
    def describe(sizes: Sizes, config: Config) -> tuple[dict[str, str], dict[str, Any]]:
        return argument_types(function, sizes, SINGLE), constants(function, sizes, config)

    return Kernel(name, function, describe, supported)


KERNELS = (
    _kernel("linear_delta_backward", linear_delta_backward_kernel),
    _kernel("linear_reverse", linear_reverse_kernel),
    _kernel("linear_query_backward", linear_query_backward_kernel),
    _kernel("linear_key_backward", linear_key_backward_kernel),
)
