"""What the launchers of all memories' Triton kernels share: the tensors they take and give, and the gates' kernels.

Plain functions on tensors; nothing is read on the host, so all can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, empty_like

from titans_graph.kernels.triton_config import Sizes, config
from titans_graph.kernels.triton_gates import gates_backward_kernel, gates_kernel
from titans_graph.kernels.triton_plan import Plan


class State(NamedTuple):
    """The state of all sequences and heads, fp32 ``[S, H, *shape]``: anchor, M, S."""

    anchor: Tensor
    weights: Tensor
    momenta: Tensor


class Tokens(NamedTuple):
    """q, k, v ``[.., d]`` in the operands' type and the gates ``[..]`` in fp32 of all tokens, in the plan's order."""

    q: Tensor
    k: Tensor
    v: Tensor
    step: Tensor
    log_momentum: Tensor
    log_keep: Tensor


class Gates(NamedTuple):
    """W and what goes with it, as triton_gates.py makes them."""

    mix: Tensor
    vectors: Tensor
    ends: Tensor


class Cotangents(NamedTuple):
    """Of everything forward was given; those of the initial state are None where forward was given none."""

    state: State
    start_m: Tensor | None
    start_s: Tensor | None
    tokens: Tokens


def kept_limit(parameter: float, operand: torch.dtype) -> float:
    """The objective's number as it stands in deltas, which are kept in the operands' type: one that was cut off there equals
    the rounded limit. On the host, whatever the default device is: there is nothing to wait for.
    """
    return float(torch.tensor(parameter, dtype=operand, device="cpu"))


def gates(plan: Plan, sizes: Sizes, tokens: Tokens) -> Gates:
    """The mixing of every chunk."""
    count, heads, c = len(plan.chunks), plan.heads, sizes.chunk
    step = tokens.step
    mix = tokens.q.new_empty(count, heads, c, c)
    vectors, ends = step.new_empty(count, heads, 4, c), step.new_empty(count, heads, 4)
    if count and heads:
        chosen = config("gates", sizes)
        gates_kernel[count, heads](
            step, tokens.log_momentum, tokens.log_keep, plan.valid, plan.sequences, plan.chunks, mix, vectors, ends,
            plan.stride, heads, C=c, SHIFT=sizes.read == "before", num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        )  # fmt: skip
    return Gates(mix, vectors, ends)


def gates_backward(
    plan: Plan, sizes: Sizes, tokens: Tokens, scale: Tensor, d_mix: Tensor, d_vectors: Tensor, d_ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of step, log momentum and log keep from those of the mixing; ``scale`` ``[N, H]`` multiplied the step."""
    count, heads, c = len(plan.chunks), plan.heads, sizes.chunk
    step = tokens.step
    rows = step.new_empty(count, heads, 2, c, c)
    d_step, d_log_momentum, d_log_keep = (empty_like(x) for x in tokens[3:])
    if count and heads:
        chosen = config("gates_backward", sizes)
        gates_backward_kernel[count, heads](
            step, tokens.log_momentum, tokens.log_keep, plan.valid, plan.sequences, plan.chunks, scale, d_mix, d_vectors,
            d_ends, rows, d_step, d_log_momentum, d_log_keep, plan.stride, heads, C=c, SHIFT=sizes.read == "before",
            num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        )  # fmt: skip
    return d_step, d_log_momentum, d_log_keep
