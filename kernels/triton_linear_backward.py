# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
"""Triton kernels of a linear memory, backward: those that need no order; triton_linear_reverse.py has the fourth.

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
    COUNTS,
    add_dot,
    dot,
    grid_of,
    sequence_place,
)
from titans_graph.kernels.triton_config import Config, Kernel, Sizes
from titans_graph.kernels.triton_linear import (
    argument_types,
    columns_of,
    constants,
    holds,
    supported,
    weights_held,
)


@triton.jit(do_not_specialize=COUNTS)
def linear_delta_backward_kernel(
    q, k, d_y, mix, sequences, chunks, d_deltas, stride, heads,
    C: tl.constexpr, D: tl.constexpr, V: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """What reading adds to the cotangents of the deltas of ``T`` tokens, in ``V`` value columns."""
    tile, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n, t = tile // (C // T), tile % (C // T)
    number, _, first, _, _ = sequence_place(sequences, chunks, n, h, stride, C)
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


@triton.jit(do_not_specialize=COUNTS)
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
    start = anchor + (number * heads + h) * D * D
    through = tl.zeros([T, D], tl.float32)
    if READ == "chunk":
        for b in range(0, D, V):
            held = tl.load(states + at * D * D + cell + b)
            held = weights_held(held, start + cell + b, flags, RESUMED)
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
        for j in range(t + 1):
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


@triton.jit(do_not_specialize=COUNTS)
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
    # Where the next chunk restarts, nothing comes back from it.
    follows = (n + 1 < total) & (length > C) & RESTARTS
    alive = (tl.load(chunks + n * 4 + 6, mask=follows, other=0) & 2) == 0
    state = at * D * D
    start = anchor + (number * heads + h) * D * D
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
            held = weights_held(held, start + cell + b, flags, RESUMED)
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


def _kernel(name: str, function: Any) -> Kernel:
    def describe(sizes: Sizes, config: Config) -> tuple[dict[str, str], dict[str, Any]]:
        return argument_types(function, sizes, "vectors ends anchor d_vectors d_ends"), constants(function, sizes, config)

    return Kernel(name, function, describe, supported)


KERNELS = (
    _kernel("linear_delta_backward", linear_delta_backward_kernel),
    _kernel("linear_query_backward", linear_query_backward_kernel),
    _kernel("linear_key_backward", linear_key_backward_kernel),
)
