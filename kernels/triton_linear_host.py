"""Launches the Triton kernels of a linear memory: forward, and backward from what forward kept.

Plain functions on tensors; nothing is read on the host, so both can be captured in a CUDA graph. Shapes as in
triton_linear.py; gates fp32, tokens contiguous in the operands' type.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_graph.kernels.triton_config import Config, Sizes, config
from titans_graph.kernels.triton_host import Cotangents, State, Tokens, gates, gates_backward, kept_limit
from titans_graph.kernels.triton_linear import (
    can_fuse,
    constants,
    linear_read_kernel,
    linear_scan_kernel,
    scan_tile,
    token_tile,
    value_tile,
)
from titans_graph.kernels.triton_linear_backward import (
    linear_delta_backward_kernel,
    linear_key_backward_kernel,
    linear_query_backward_kernel,
)
from titans_graph.kernels.triton_linear_reverse import linear_reverse_kernel
from titans_graph.kernels.triton_plan import Plan


class Saved(NamedTuple):
    """What forward leaves for backward, chunk by chunk; the mixing is made again from the gates."""

    states: Tensor
    moving: Tensor
    deltas: Tensor


Grid = Callable[[int], tuple[int, ...]]
"""The grid of a launch from the number of tiles that the value columns are cut into."""


def launch(name: str, function: Any, sizes: Sizes, grid: Grid, args: tuple[Any, ...], **given: Any) -> None:
    """Launch a kernel with its configuration; its outputs overlap no input, so it may be measured by launching it again."""

    def run(chosen: Config) -> None:
        programs = grid(sizes.dim // value_tile(sizes, chosen))
        if 0 not in programs:
            values = constants(function, sizes, chosen, **given)
            function[programs](*args, **values, num_warps=chosen.num_warps, num_stages=chosen.num_stages)

    run(config(name, sizes, run=run))


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; none on the processor, where the interpreter runs the kernels one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def fuses(sizes: Sizes, device: torch.device, rows: int) -> bool:
    """Whether ``rows`` sequences times heads fill the chip, so that the scan reads as well."""
    if not can_fuse(sizes) or not _processors(device):
        return False
    splits = sizes.dim // value_tile(sizes, config("linear_fused", sizes))
    return rows * splits >= 2 * _processors(device)


def forward(
    plan: Plan,
    sizes: Sizes,
    parameter: float,
    tokens: Tokens,
    state: State,
    start_m: Tensor | None,
    start_s: Tensor | None,
    *,
    save: bool = True,
    fused: bool | None = None,
) -> tuple[Tensor, State, Saved | None]:
    """``y`` like q, the state after all tokens, and what backward needs (None without ``save``).

    ``parameter``: the objective's number. ``start_m``, ``start_s``: the state of a restart, None where no chunk of the plan
    restarts. ``fused``: whether the scan reads as well; chosen by the number of sequences and heads where None.
    """
    g = gates(plan, sizes, tokens)
    q, k, v = tokens[:3]
    rows, heads, count = len(plan.sequences), plan.heads, len(plan.chunks)
    if fused is None:
        fused = fuses(sizes, q.device, rows * heads)
    kept = save or not fused
    states, moving = (q.new_empty((count, *state.weights.shape[1:]) if kept else (0,)) for _ in range(2))
    saved = Saved(states, moving, q.new_empty((count, heads, sizes.chunk, sizes.dim) if kept else (0,)))
    y, after = torch.empty_like(q), State(*(torch.empty_like(x) for x in state))
    tables = plan.sequences, plan.chunks
    launch(
        "linear_fused" if fused else "linear_scan", linear_scan_kernel, sizes, lambda splits: (rows, heads, splits),
        (q, k, v, *g, *tables, state.weights, state.momenta, *_started(state, start_m, start_s), state.anchor,
         y, *saved, after.weights, after.momenta, after.anchor, plan.stride, heads),
        PARAMETER=parameter, T=scan_tile(sizes), RESTARTS=start_m is not None, FUSED=fused, SAVE=kept,
    )  # fmt: skip
    if not fused:
        tiles = count * (sizes.chunk // token_tile(sizes))
        launch(
            "linear_read", linear_read_kernel, sizes, lambda splits: (tiles, heads, splits),
            (q, k, g.mix, g.vectors, *tables, *saved, state.anchor, y, plan.stride, heads),
        )  # fmt: skip
    return y, after, saved if save else None


def _started(state: State, start_m: Tensor | None, start_s: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state of a restart; any tensors where none is ever read."""
    return (state.weights if start_m is None else start_m), (state.momenta if start_s is None else start_s)


def backward(
    plan: Plan,
    sizes: Sizes,
    parameter: float,
    tokens: Tokens,
    entry: Tensor,
    saved: Saved,
    d_y: Tensor,
    ends: State,
    *,
    restarts: bool = True,
) -> Cotangents:
    """Cotangents from those of y and of the final state (``ends``, fp32). ``entry``: the anchor forward was given.

    ``restarts``: whether forward was given a state of a restart.
    """
    g = gates(plan, sizes, tokens)
    q, k = tokens.q, tokens.k
    rows, heads, count = len(plan.sequences), plan.heads, len(plan.chunks)
    tiles = count * (sizes.chunk // token_tile(sizes))
    tables = plan.sequences, plan.chunks
    place = plan.stride, heads
    mixed = sizes.read != "chunk"
    d_q, d_k, d_v = (torch.empty_like(x) for x in tokens[:3])
    d_deltas = torch.empty_like(saved.deltas) if mixed else saved.deltas
    if mixed:
        launch(
            "linear_delta_backward", linear_delta_backward_kernel, sizes, lambda splits: (tiles, heads, splits),
            (q, k, d_y, g.mix, *tables, d_deltas, *place),
        )  # fmt: skip
    d_state = State(*(torch.empty_like(x) for x in ends))
    d_start_m, d_start_s = torch.empty_like(ends.weights), torch.empty_like(ends.momenta)
    d_states, d_moving = torch.empty_like(saved.states), torch.empty_like(saved.moving)
    launch(
        "linear_reverse", linear_reverse_kernel, sizes, lambda splits: (rows, heads, splits),
        (q, k, d_y, g.vectors, g.ends, *tables, saved.deltas, d_deltas, ends.weights, ends.momenta, ends.anchor,
         d_v, d_states, d_moving, d_state.weights, d_state.momenta, d_state.anchor, d_start_m, d_start_s, *place),
        PARAMETER=kept_limit(parameter, q.dtype), T=scan_tile(sizes), RESTARTS=restarts,
    )  # fmt: skip
    # Reading the chunk's first weights does not mix.
    d_mix, d_vectors = (torch.empty_like(x) if mixed else torch.zeros_like(x) for x in (g.mix, g.vectors))
    d_ends = torch.empty_like(g.ends)
    launch(
        "linear_query_backward", linear_query_backward_kernel, sizes, lambda _: (tiles, heads),
        (q, k, d_y, g.mix, g.vectors, *tables, *saved, entry, d_q, d_mix, d_vectors, *place),
    )  # fmt: skip
    launch(
        "linear_key_backward", linear_key_backward_kernel, sizes, lambda _: (tiles, heads),
        (q, k, d_y, d_v, g.mix, g.vectors, *tables, *saved, entry, d_states, d_moving, d_k, d_vectors, d_ends, count, *place),
        RESTARTS=restarts,
    )  # fmt: skip
    d_gates = gates_backward(plan, sizes, tokens, g.ends.new_ones(count, heads), d_mix, d_vectors, d_ends)
    of_tokens = Tokens(d_q, d_k, d_v, *d_gates)
    return Cotangents(d_state, d_start_m if restarts else None, d_start_s if restarts else None, of_tokens)
