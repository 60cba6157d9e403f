"""Launches the Triton kernels of a memory that is an MLP of two layers: forward, and backward from what forward kept.

Plain functions on tensors; triton_memory.py makes operators of them. Nothing is read on the host, so both can be captured
in a CUDA graph. Shapes as in triton_mlp.py; gates fp32, tokens contiguous in the operands' type.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_graph.kernels.triton_config import Config, Description, Kernel, Sizes, config
from titans_graph.kernels.triton_gates import gates_backward_kernel, gates_kernel
from titans_graph.kernels.triton_host import Cotangents, State, Tokens, gates, gates_backward, kept_limit
from titans_graph.kernels.triton_mlp import mlp_read_kernel, mlp_scan_kernel
from titans_graph.kernels.triton_mlp_backward import (
    mlp_alike_kernel,
    mlp_answer_backward_kernel,
    mlp_query_backward_kernel,
    mlp_read_plain_backward_kernel,
    mlp_recall_kernel,
)
from titans_graph.kernels.triton_mlp_reverse import mlp_key_backward_kernel, mlp_reverse_kernel
from titans_graph.kernels.triton_plan import Plan


class Saved(NamedTuple):
    """What forward leaves for backward, chunk by chunk; ``mix``, ``vectors`` and ``ends`` are made again from the gates."""

    m_states: Tensor
    s_states: Tensor
    deltas: Tensor
    scale: Tensor


BY_TILE = ("mlp_recall", "mlp_answer_backward")
"""Kernels with one program per tile of the hidden size."""


def launch(name: str, kernel: Any, grid: tuple[int, ...], sizes: Sizes, *args: Any, **constants: Any) -> None:
    """Launch a kernel with its configuration; where configurations are measured, on copies: some kernels change arguments."""
    if 0 in grid:
        return

    def start(chosen: Config, given: tuple[Any, ...]) -> None:
        extra = {"TILE": tile_of(sizes, chosen)} if "TILE" in kernel.arg_names else {}
        programs = (*grid, sizes.hidden // extra["TILE"]) if name in BY_TILE else grid
        kernel[programs](*given, **constants, **extra, num_warps=chosen.num_warps, num_stages=chosen.num_stages)

    def run(chosen: Config) -> None:
        start(chosen, tuple(x.clone() if isinstance(x, Tensor) else x for x in args))

    # The tile of mlp_answer_backward is also the caller's, who makes room for a part from each.
    start(config(name, sizes, run=None if name == "mlp_answer_backward" else run), args)


def tile_of(sizes: Sizes, chosen: Config) -> int:
    """The tile of the hidden size: a power of 2 that divides it."""
    return min(chosen.tile or 32, sizes.hidden & -sizes.hidden)


def forward(
    plan: Plan,
    sizes: Sizes,
    parameter: float,
    tokens: Tokens,
    state: State,
    start_m: Tensor,
    start_s: Tensor,
    *,
    save: bool = True,
) -> tuple[Tensor, State, Saved | None]:
    """``y`` like q, the state after all tokens, and what backward needs (None without ``save``).

    ``parameter``: the objective's number. ``start_m``, ``start_s``: the state of a restart.
    """
    q, k, v = tokens[:3]
    count, heads, c = len(plan.chunks), plan.heads, sizes.chunk
    g = gates(plan, sizes, tokens)
    m, s, anchor = state.weights.clone(), state.momenta.clone(), state.anchor.clone()
    m_states, s_states = (q.new_empty(count, *m.shape[1:]) for _ in range(2))
    deltas, scale = q.new_empty(count, heads, c, sizes.dim), m.new_empty(count, heads)
    common = {"C": c, "D": sizes.dim, "HIDDEN": sizes.hidden, "ACT": sizes.activation, "RESUMED": sizes.resumed}
    tables = plan.valid, plan.sequences, plan.chunks
    launch(
        "mlp_scan", mlp_scan_kernel, (len(plan.sequences), heads), sizes, k, v, *tables, g.vectors, g.ends, m, s,
        start_m, start_s, state.anchor, anchor, m_states, s_states, deltas, scale, plan.stride, heads,
        **common, OBJECTIVE=sizes.objective, PARAMETER=parameter, BOUNDED=sizes.bounded,
    )  # fmt: skip
    y = torch.empty_like(q)
    launch(
        "mlp_read", mlp_read_kernel, (count, heads), sizes, q, k, y, *tables, g.mix, g.vectors, m_states, s_states,
        state.anchor, deltas, scale, plan.stride, heads, **common, MIXED=sizes.read != "chunk",
    )  # fmt: skip
    return y, State(anchor, m, s), Saved(m_states, s_states, deltas, scale) if save else None


def backward(
    plan: Plan, sizes: Sizes, parameter: float, tokens: Tokens, entry: Tensor, saved: Saved, d_y: Tensor, ends: State
) -> Cotangents:
    """Cotangents from those of y and of the final state (``ends``). ``entry``: the anchor forward was given."""
    q, k = tokens.q, tokens.k
    count, heads, c = len(plan.chunks), plan.heads, sizes.chunk
    g = gates(plan, sizes, tokens)
    mixed = sizes.read != "chunk"
    common = {"C": c, "D": sizes.dim, "HIDDEN": sizes.hidden}
    way, resumed = {"MIXED": mixed}, {"RESUMED": sizes.resumed}
    tables = plan.valid, plan.sequences, plan.chunks
    d_q, d_k, d_v = (torch.empty_like(x) for x in tokens[:3])
    d_mix, d_vectors = torch.zeros_like(g.mix), torch.zeros_like(g.vectors)
    d_ends = torch.empty_like(g.ends)
    into_m, into_s = torch.empty_like(saved.m_states), torch.empty_like(saved.s_states)
    hidden, slope, one, bend, d_one = (q.new_empty(count, heads, c, sizes.hidden) for _ in range(5))
    x, x_slope, d_hidden = (torch.empty_like(hidden) if mixed else hidden for _ in range(3))
    d_two = torch.empty_like(saved.deltas)
    first_part, pairs = (torch.empty_like(g.mix) if mixed else g.mix for _ in range(2))
    grid = count, heads
    states = saved.m_states, saved.s_states
    launch(
        "mlp_recall", mlp_recall_kernel, grid, sizes, q, k, *tables, g.mix, g.vectors, *states, entry, saved.deltas,
        saved.scale, hidden, slope, one, bend, x, x_slope, first_part, plan.stride, heads, **common, **way, **resumed,
        ACT=sizes.activation,
    )  # fmt: skip
    if mixed:
        launch(
            "mlp_alike", mlp_alike_kernel, grid, sizes, d_y, *tables, g.mix, saved.deltas, saved.scale, hidden, x, pairs,
            d_mix, d_two, plan.stride, heads, **common,
        )  # fmt: skip
        tiles = sizes.hidden // tile_of(sizes, config("mlp_answer_backward", sizes))
        shares = g.ends.new_empty(count, heads, tiles, 2, c)
        launch(
            "mlp_answer_backward", mlp_answer_backward_kernel, grid, sizes, q, d_y, *tables, g.vectors, *states, hidden,
            x, x_slope, first_part, pairs, d_one, d_hidden, into_m, into_s, shares, plan.stride, heads, **common,
        )  # fmt: skip
        launch(
            "mlp_query_backward", mlp_query_backward_kernel, grid, sizes, q, k, *tables, g.mix, g.vectors, *states,
            saved.scale, one, x_slope, shares, d_q, d_k, d_mix, d_vectors, plan.stride, heads, tiles, **common,
        )  # fmt: skip
    else:
        launch(
            "mlp_read_plain_backward", mlp_read_plain_backward_kernel, grid, sizes, q, d_y, *tables, saved.m_states,
            entry, d_q, into_m, plan.stride, heads, **common, **resumed, ACT=sizes.activation,
        )  # fmt: skip
    d_m, d_s = ends.weights.clone(), ends.momenta.clone()
    # Where a chunk begins here, the entry's anchor is not the final one.
    d_anchor = ends.anchor.masked_fill(plan.sequences[:, 4].view(-1, *[1] * (d_m.dim() - 1)) >= 0, 0.0)
    start_m, start_s = torch.zeros_like(d_m), torch.zeros_like(d_s)
    launch(
        "mlp_reverse", mlp_reverse_kernel, (len(plan.sequences), heads), sizes, k, *tables, g.vectors, g.ends,
        saved.m_states, entry, saved.deltas, saved.scale, hidden, slope, bend, d_one, d_two, d_hidden, into_m, into_s, d_m,
        d_s, d_anchor, ends.anchor, start_m, start_s, d_v, plan.stride, heads, **common, **way, **resumed,
        OBJECTIVE=sizes.objective, PARAMETER=kept_limit(parameter, q.dtype),
    )  # fmt: skip
    launch(
        "mlp_key_backward", mlp_key_backward_kernel, grid, sizes, k, *tables, g.vectors, *states, entry, saved.deltas,
        saved.scale, hidden, one, bend, into_m, into_s, d_k, d_vectors, d_ends, plan.stride, heads, **common, **way,
        **resumed,
    )  # fmt: skip
    d_gates = gates_backward(plan, sizes, tokens, saved.scale, d_mix, d_vectors, d_ends)
    return Cotangents(State(d_anchor, d_m, d_s), start_m, start_s, Tokens(d_q, d_k, d_v, *d_gates))


def supports(sizes: Sizes) -> bool:
    """Whether the kernels exist for these sizes: dim and chunk powers of 2 from 16 (to 128, 256), hidden a multiple of 16."""
    powers = all(16 <= x <= most and x & (x - 1) == 0 for x, most in ((sizes.dim, 128), (sizes.chunk, 256)))
    return powers and sizes.hidden >= 16 and sizes.hidden % 16 == 0


_OPERANDS = {
    *("q", "k", "v", "y", "mix", "m_states", "s_states", "deltas", "into_m", "into_s"),
    *("d_q", "d_k", "d_v", "d_y", "d_mix", "d_delta_one", "d_delta_two", "d_hidden", "d_z", "carried_m", "carried_s"),
    *("hidden", "slope", "delta_one", "bend", "x", "x_slope", "first_part", "pairs"),
}
_TABLES = {"valid": "*i8", "sequences": "*i64", "chunks": "*i32", "stride": "i32", "heads": "i32", "total": "i32"}


def _describe(kernel: Any, sizes: Sizes, chosen: Config) -> Description:
    """Types and constants of a kernel of this file, by the names of its arguments."""
    constants = {
        "C": sizes.chunk,
        "D": sizes.dim,
        "HIDDEN": sizes.hidden,
        "TILE": tile_of(sizes, chosen),
        "ACT": sizes.activation,
        "OBJECTIVE": sizes.objective,
        "PARAMETER": 1.0,
        "BOUNDED": sizes.bounded,
        "RESUMED": sizes.resumed,
        "MIXED": sizes.read != "chunk",
        "SHIFT": sizes.read == "before",
    }
    names = list(kernel.arg_names)
    # In the adjoint of reading these are written chunk by chunk; in the reverse scan they are the running fp32 ones.
    local = {"d_m", "d_s"} if "d_y" in names else set()
    types = {
        name: _TABLES.get(name, f"*{sizes.dtype}" if name in _OPERANDS | local else "*fp32")
        for name in names
        if name not in constants
    }
    return types, {name: value for name, value in constants.items() if name in names}


def _mlp(sizes: Sizes) -> bool:
    return sizes.hidden > 0 and supports(sizes)


def _mixed(sizes: Sizes) -> bool:
    return _mlp(sizes) and sizes.read != "chunk"


def _plain(sizes: Sizes) -> bool:
    return _mlp(sizes) and sizes.read == "chunk"


KERNELS = (
    Kernel("gates", gates_kernel, partial(_describe, gates_kernel)),
    Kernel("gates_backward", gates_backward_kernel, partial(_describe, gates_backward_kernel)),
    Kernel("mlp_scan", mlp_scan_kernel, partial(_describe, mlp_scan_kernel), _mlp),
    Kernel("mlp_read", mlp_read_kernel, partial(_describe, mlp_read_kernel), _mlp),
    Kernel("mlp_recall", mlp_recall_kernel, partial(_describe, mlp_recall_kernel), _mlp),
    Kernel("mlp_alike", mlp_alike_kernel, partial(_describe, mlp_alike_kernel), _mixed),
    Kernel("mlp_answer_backward", mlp_answer_backward_kernel, partial(_describe, mlp_answer_backward_kernel), _mixed),
    Kernel("mlp_query_backward", mlp_query_backward_kernel, partial(_describe, mlp_query_backward_kernel), _mixed),
    Kernel(
        "mlp_read_plain_backward", mlp_read_plain_backward_kernel, partial(_describe, mlp_read_plain_backward_kernel), _plain
    ),
    Kernel("mlp_reverse", mlp_reverse_kernel, partial(_describe, mlp_reverse_kernel), _mlp),
    Kernel("mlp_key_backward", mlp_key_backward_kernel, partial(_describe, mlp_key_backward_kernel), _mlp),
)
