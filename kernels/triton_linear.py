# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
"""Triton kernels of a linear memory (one fast matrix), forward: the scan over chunks, and the reading of all tokens.

Value columns of M and S do not touch each other, so a program of the scan holds ``V`` of them in registers, in fp32, for one
sequence and head, and walks over the chunks; more programs of fewer columns fill the chip at the price of reading the keys
again. Reading has one program per tile of tokens, head and value columns and needs no order. Where sequences, heads and
columns alone fill the chip, the scan reads as well (``FUSED``) and chunk states need not leave it.

Arrays: the state ``[S, H, d, d]`` in fp32; chunk by chunk, in the operands' type, ``states`` and ``moving``
``[N, H, d, d]`` (M and S at the chunk's start) and ``deltas`` ``[N, H, C, d]``. Gates as in triton_gates.py, tables as in
triton_plan.py. No output may overlap an input: the scan's loads are pipelined.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from titans_graph.kernels.triton_common import COUNTS, add_dot, dot, grid_of, sequence_place, surprise
from titans_graph.kernels.triton_config import Config, Kernel, Sizes


@triton.jit
def columns_of(rows: tl.constexpr, D: tl.constexpr, V: tl.constexpr):
    """Offsets ``[rows, V]`` of the program's value columns (the third number of the grid) in a matrix of ``D`` columns."""
    return tl.arange(0, rows)[:, None] * D + (tl.program_id(2) * V + tl.arange(0, V))[None, :]


@triton.jit
def holds(span, start, T: tl.constexpr):
    """Which of ``T`` slots from ``start`` of a chunk hold a token, ``[T, 1]``; ``span``: its entry in the plan.

    No load stands before the tokens', as one of the plan's ``valid`` would: those of the next chunk can be asked for early.
    """
    i = start + tl.arange(0, T)[:, None]
    return (i >= span % 65536) & (i < span // 65536)


@triton.jit
def weights_held(tile, anchor, flags, RESUMED: tl.constexpr):
    """The weights at which gradients are taken: the chunk's first ones, or the entry's where it was begun before."""
    if RESUMED:  # noqa: SIM102
        if (flags & 1) == 0:
            tile = tl.load(anchor).to(tile.dtype)
    return tile


@triton.jit
def entry_state(m, s, start_m, start_s, flags, RESTARTS: tl.constexpr):
    """The state before the first chunk: the given one, or that of a restart."""
    now = tl.load(m)
    moves = tl.load(s)
    if RESTARTS:  # noqa: SIM102
        if (flags & 2) != 0:
            now = tl.load(start_m)
            moves = tl.load(start_s)
    return now, moves


@triton.jit
def restarted(now, moves, start_m, start_s, flags):
    """The state before a later chunk. In two steps: one that a branch replaces would be carried in several layouts."""
    if (flags & 2) != 0:
        now = tl.zeros(now.shape, tl.float32)
        moves = tl.zeros(moves.shape, tl.float32)
    if (flags & 2) > 1:
        now += tl.load(start_m)
        moves += tl.load(start_s)
    return now, moves


@triton.jit
def chunk_answer(queries, keys, delta, mix, gates, now, moves, held, C: tl.constexpr, READ: tl.constexpr):
    """What all tokens of a chunk read, in the program's columns."""
    if READ == "chunk":
        answer = dot(queries, held)
    else:
        answer = tl.load(gates)[:, None] * dot(queries, now) + tl.load(gates + C)[:, None] * dot(queries, moves)
        weighting = tl.load(mix + grid_of(C, C)).to(tl.float32) * dot(queries, tl.trans(keys))
        answer = add_dot(answer, (-weighting).to(delta.dtype), delta)
    return answer


@triton.jit(do_not_specialize=COUNTS)
def linear_scan_kernel(
    q, k, v, mix, vectors, ends, sequences, chunks, m, s, start_m, start_s, anchor,
    y, states, moving, deltas, m_out, s_out, anchor_out, stride, heads,
    C: tl.constexpr, D: tl.constexpr, V: tl.constexpr, T: tl.constexpr, OBJECTIVE: tl.constexpr, PARAMETER: tl.constexpr,
    READ: tl.constexpr, RESUMED: tl.constexpr, RESTARTS: tl.constexpr, FUSED: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """The state over all chunks of a sequence and head, ``T`` tokens at a time; ``FUSED`` (``T`` is ``C``): and ``y``.

    ``start_m``, ``start_s``: the state of a restart, without ``RESTARTS`` never read. Without ``SAVE`` (only with
    ``FUSED``) chunk states and deltas are not written. Not ``RESUMED``: every chunk with tokens begins at its first slot.
    """
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
    ahead = tl.load(chunks + base * 4 + 2, mask=count > 0, other=0)
    span_ahead = tl.load(chunks + base * 4 + 3, mask=count > 0, other=0)
    here = row + cell
    now, moves = entry_state(m + here, s + here, start_m + here, start_s + here, ahead, RESTARTS)
    if last_first < 0:
        tl.store(anchor_out + here, tl.load(anchor + here))
    for c in range(count):
        n = base + c
        at = n * heads + h
        flags = ahead
        span = span_ahead
        ahead = tl.load(chunks + n * 4 + 6, mask=c + 1 < count, other=0)
        span_ahead = tl.load(chunks + n * 4 + 7, mask=c + 1 < count, other=0)
        # Not known before, so that the addresses of what seldom happens are not kept in registers through the loop.
        seldom = cell + tl.minimum(flags, 0)
        if c == last_first:
            tl.store(anchor_out + row + seldom, now)
        now_in = now.to(operand)
        moves_in = moves.to(operand)
        if SAVE:
            tl.store(states + at * D * D + cell, now_in)
            tl.store(moving + at * D * D + cell, moves_in)
        held = weights_held(now_in, anchor + row + seldom, flags, RESUMED)
        now = tl.load(ends + at * 4) * now + tl.load(ends + at * 4 + 1) * moves
        moves = tl.load(ends + at * 4 + 2) * moves
        for j in range(C // T):
            start = first + c * C + j * T
            ok = holds(span, j * T, T)
            keys = tl.load(k + start * D + tokens, mask=ok, other=0.0)
            targets = tl.load(v + start * D + values, mask=ok, other=0.0).to(tl.float32)
            delta = tl.where(ok, surprise(dot(keys, held), targets, OBJECTIVE, PARAMETER), 0.0)
            gates = vectors + at * 4 * C + j * T + i
            delta_m = (delta * -tl.load(gates + 2 * C)[:, None]).to(operand)
            delta_s = (delta * -tl.load(gates + 3 * C)[:, None]).to(operand)
            if SAVE:
                tl.store(deltas + (at * C + j * T) * D + values, delta.to(operand))
            if FUSED:
                queries = tl.load(q + start * D + tokens, mask=ok, other=0.0)
                answer = chunk_answer(
                    queries, keys, delta.to(operand), mix + at * C * C, gates, now_in, moves_in, held, C, READ
                )
                inside = i[:, None] < length - c * C
                tl.store(y + start * D + values, tl.where(ok, answer, 0.0).to(operand), mask=inside)
            now = add_dot(now, tl.trans(keys), delta_m)
            moves = add_dot(moves, tl.trans(keys), delta_s)
        if RESTARTS:
            now, moves = restarted(now, moves, start_m + row + seldom, start_s + row + seldom, ahead)
    after = row + cell + tl.minimum(ahead, 0)
    tl.store(m_out + after, now)
    tl.store(s_out + after, moves)


@triton.jit(do_not_specialize=COUNTS)
def linear_read_kernel(
    q, k, mix, vectors, sequences, chunks, states, moving, deltas, anchor, y, stride, heads,
    C: tl.constexpr, D: tl.constexpr, V: tl.constexpr, T: tl.constexpr, READ: tl.constexpr, RESUMED: tl.constexpr,
):  # fmt: skip
    """``y`` of ``T`` tokens of a chunk and head, in ``V`` value columns."""
    tile, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n, t = tile // (C // T), tile % (C // T)
    number, flags, first, _, length = sequence_place(sequences, chunks, n, h, stride, C)
    if number < 0:
        return
    operand = q.dtype.element_ty
    at = n * heads + h
    tokens = grid_of(T, D)
    values = columns_of(T, D, V)
    cell = columns_of(D, D, V)
    i = tl.arange(0, T)
    span = tl.load(chunks + n * 4 + 3)
    ok = holds(span, t * T, T)
    queries = tl.load(q + (first + t * T) * D + tokens, mask=ok, other=0.0)
    if READ == "chunk":
        held = tl.load(states + at * D * D + cell)
        held = weights_held(held, anchor + (number * heads + h) * D * D + cell, flags, RESUMED)
        answer = dot(queries, held)
    else:
        gates = vectors + at * 4 * C + t * T + i
        answer = tl.load(gates)[:, None] * dot(queries, tl.load(states + at * D * D + cell))
        answer += tl.load(gates + C)[:, None] * dot(queries, tl.load(moving + at * D * D + cell))
        # Later tokens have no weight.
        for j in range(t + 1):
            seen = holds(span, j * T, T)
            keys = tl.load(k + (first + j * T) * D + tokens, mask=seen, other=0.0)
            weighting = tl.load(mix + (at * C + t * T) * C + j * T + i[:, None] * C + i[None, :]).to(tl.float32)
            weighting = -weighting * dot(queries, tl.trans(keys))
            answer = add_dot(answer, weighting.to(operand), tl.load(deltas + (at * C + j * T) * D + values))
    inside = i[:, None] < length - t * T
    tl.store(y + (first + t * T) * D + values, tl.where(ok, answer, 0.0).to(operand), mask=inside)


TABLES = {"sequences": "*i64", "chunks": "*i32"}
"""Types of the plan's tables."""


def supported(sizes: Sizes) -> bool:
    """For which sizes the kernels of a linear memory exist: chunk a power of 2 from 16 to 256, d one of 16 to 256; fp32
    operands, which no matrix unit takes, up to chunk and d 32."""
    powers = (16, 32, 64, 128, 256)
    fits = max(sizes.chunk, sizes.dim) <= 32 or sizes.dtype != "fp32"
    return sizes.hidden == 0 and sizes.chunk in powers and sizes.dim in powers and fits


def can_fuse(sizes: Sizes) -> bool:
    """For which sizes the scan can read as well."""
    return supported(sizes) and sizes.chunk <= 64 and sizes.dim <= 64


def token_tile(sizes: Sizes) -> int:
    """How many tokens a program of a kernel without order works on."""
    return min(sizes.chunk, 32 if sizes.dim > 128 else 64)


def scan_tile(sizes: Sizes) -> int:
    """How many tokens a step of the scan and of the reverse scan works on."""
    return min(sizes.chunk, 32 if sizes.dim > 128 or sizes.dtype == "fp32" else 128)


def value_tile(sizes: Sizes, config: Config) -> int:
    """How many value columns a program, or a step of its loop, works on."""
    return min(config.tile or sizes.dim, sizes.dim)


def argument_types(function: Any, sizes: Sizes, single: str) -> dict[str, str]:
    """Types of a kernel's run-time arguments: tables, two scalars, the named ones in fp32, all others in the operands'."""
    names = [name for name in function.arg_names if not name.isupper()]
    fixed = {**TABLES, "stride": "i32", "heads": "i32", "total": "i32", **dict.fromkeys(single.split(), "*fp32")}
    return {name: fixed.get(name, f"*{sizes.dtype}") for name in names}


def constants(function: Any, sizes: Sizes, config: Config, **given: Any) -> dict[str, Any]:
    """Values of a kernel's constexpr arguments, which are those in capitals, of those it has."""
    known = {
        "C": sizes.chunk, "D": sizes.dim, "V": value_tile(sizes, config), "T": token_tile(sizes), "READ": sizes.read,
        "OBJECTIVE": sizes.objective, "PARAMETER": 1.0, "RESUMED": sizes.resumed, "RESTARTS": True, **given,
    }  # fmt: skip
    return {name: known[name] for name in function.arg_names if name.isupper()}


STATE = "vectors ends m s start_m start_s anchor m_out s_out anchor_out"


def _scan(sizes: Sizes, config: Config) -> tuple[dict[str, str], dict[str, Any]]:
    types = argument_types(linear_scan_kernel, sizes, STATE)
    return types, constants(linear_scan_kernel, sizes, config, T=scan_tile(sizes), FUSED=False, SAVE=True)


def _fused(sizes: Sizes, config: Config) -> tuple[dict[str, str], dict[str, Any]]:
    types = argument_types(linear_scan_kernel, sizes, STATE)
    return types, constants(linear_scan_kernel, sizes, config, T=scan_tile(sizes), FUSED=True, SAVE=True)


def _read(sizes: Sizes, config: Config) -> tuple[dict[str, str], dict[str, Any]]:
    types = argument_types(linear_read_kernel, sizes, STATE)
    return types, constants(linear_read_kernel, sizes, config)


KERNELS = (
    Kernel("linear_scan", linear_scan_kernel, _scan, supported),
    Kernel("linear_fused", linear_scan_kernel, _fused, can_fuse),
    Kernel("linear_read", linear_read_kernel, _read, supported),
)
