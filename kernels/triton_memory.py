"""The memory's Triton kernels as two operators of ``torch.library``, and which memories they are made for.

Stands beside memory_ops.py, the same for the portable form; :mod:`~titans_graph.kernels.memory` chooses between them. The
operators know no network but by its sizes, read nothing on the host, and are opaque to a compiled region, so a whole model
can be captured in a CUDA graph. They are deterministic: no kernel adds to memory that another program adds to.

Shapes: ``S`` sequences (rows of a grid, or packed ones), ``H`` heads; a state is one fp32 tensor ``[S, H, *shape]``: ``w``
``[d, d]`` of a linear memory; of an MLP ``[2, d, hidden]``, layer 2 transposed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_graph.errors import UsageError
from titans_graph.kernels.memory_objectives import Objective, parse_objective
from titans_graph.kernels.memory_ops import once_only
from titans_graph.kernels.networks import Network, parse_network
from titans_graph.kernels.triton_config import Sizes, available, current_arch, interpreted
from titans_graph.kernels.triton_plan import Plan, grid_plan, packed_chunks, packed_plan
from titans_graph.kernels.triton_table import longest_chunk

log = logging.getLogger("titans_graph.kernels")

ACTIVATIONS = ("silu", "gelu", "relu2")
OBJECTIVES = ("l2", "dot", "huber")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Memory(NamedTuple):
    """What the kernels are specialised on, and the objective's number."""

    sizes: Sizes
    parameter: float


def refusal(network: str, objective: str, read: str, chunk: int, bounded: bool, dim: int, operand: torch.dtype) -> str:
    """Why the kernels cannot compute this memory here; empty where they can."""
    arch = "" if interpreted() else current_arch()
    return str(available().why) or _refusal(network, objective, read, chunk, bounded, dim, operand, arch)


@lru_cache(maxsize=256)
def _refusal(
    network: str, objective: str, read: str, chunk: int, bounded: bool, dim: int, operand: torch.dtype, arch: str
) -> str:
    try:
        sizes = memory_of(network, objective, read, chunk, bounded, True, dim, operand).sizes
    except UsageError as problem:
        return str(problem)
    if sizes.hidden:
        from titans_graph.kernels.triton_mlp_host import supports
    else:
        from titans_graph.kernels.triton_linear import supported as supports
    inner = f", hidden size {sizes.hidden}" if sizes.hidden else ""
    what = f"no kernel for keys of size {dim}{inner} in chunks of {chunk} and {sizes.dtype}"
    if not supports(sizes):
        return what
    # The interpreter has all the memory there is.
    most = longest_chunk(sizes, arch) if arch else chunk
    return "" if chunk <= most else f"{what} on {arch}, which has memory for chunks of {most}" if most else f"{what} on {arch}"


@lru_cache(maxsize=256)
def memory_of(
    network: str, objective: str, read: str, chunk: int, bounded: bool, resumed: bool, dim: int, operand: torch.dtype
) -> Memory:
    """What the kernels see of a memory from canonical texts; :class:`UsageError` where they know none like it."""
    hidden, activation = _layers(parse_network(network), dim)
    goal, parameter = _goal(parse_objective(objective))
    if operand not in DTYPES:
        raise UsageError(f"no kernel computes in {str(operand).removeprefix('torch.')}")
    # The bound of a linear memory is 1.
    bounded = bounded and hidden > 0
    return Memory(Sizes(chunk, dim, hidden, DTYPES[operand], activation, goal, read, resumed, bounded), parameter)


def _layers(network: Network, dim: int) -> tuple[int, str]:
    """Hidden size and activation of an MLP of two layers, (0, "") of a linear memory."""
    uses = [node.use for node in network.nodes]
    chain = [node.inputs for node in network.nodes[1:]] == [(node.name,) for node in network.nodes[:-1]]
    if chain and network.output == network.nodes[-1].name:
        if uses == ["fast.linear"]:
            return 0, ""
        plain = len(uses) == 3 and uses[1] in ACTIVATIONS and len(network.weights(dim)) == 2
        if plain and uses[0] == uses[2] == "fast.linear":
            return network.sizes(dim)[network.nodes[0].name], uses[1]
    raise UsageError("there are kernels for a linear memory and for an MLP of two layers (silu, gelu, relu2) alone")


def _goal(objective: Objective) -> tuple[str, float]:
    if objective.name not in OBJECTIVES:
        raise UsageError(f"no kernel knows the objective {objective.name!r}, only {', '.join(OBJECTIVES)}")
    return objective.name, float(dict(objective.options).get("delta") or 0.0)


def join(weights: Sequence[Tensor]) -> Tensor:
    """Fast weights ``[B, H, *shape]`` in the network's order as one fp32 state."""
    if len(weights) == 1:
        return weights[0].float()
    return torch.stack([weights[0].float(), weights[1].float().mT], 2)


def part(state: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A state as fast weights again, contiguous and in the types of ``like``."""
    if len(like) == 1:
        return [state.to(like[0].dtype)]
    one, two = state.select(2, 0), state.select(2, 1)  # not unbind, whose results autograd lets nobody change in place
    return [one.to(like[0].dtype).contiguous(), two.mT.to(like[1].dtype).contiguous()]


def _plan(places: Sequence[Tensor], q: Tensor, chunk: int) -> Plan:
    """``places``: valid and position of a grid, or the offsets of packed sequences."""
    if len(places) == 2:
        return grid_plan(places[0], places[1], chunk, q.shape[1])
    return packed_plan(places[0], q.shape[2], chunk, q.shape[1])


def _host(sizes: Sizes) -> Any:
    if sizes.hidden:
        from titans_graph.kernels import triton_mlp_host as host
    else:
        from titans_graph.kernels import triton_linear_host as host  # type: ignore[no-redef]
    return host


@torch.library.custom_op("titans_graph::memory_triton", mutates_args=())
def triton_op(
    network: str,
    objective: str,
    read: str,
    chunk: int,
    bounded: bool,
    resumed: bool,
    save: bool,
    state: Sequence[Tensor],
    tokens: Sequence[Tensor],
    places: Sequence[Tensor],
) -> list[Tensor]:
    """``[y, anchor', weights', momenta', saved..]``.

    ``state``: anchor, weights, momenta, initial weights and momenta (of a restart). ``tokens``: q, k, v ``[B, H, G, d]`` in
    the operands' type, and the gates ``[B, H, G]`` fp32; ``[1, H, T, ..]`` where packed. ``resumed``: some chunk may have
    begun in an earlier call.
    """
    from titans_graph.kernels.triton_host import State, Tokens

    q = tokens[0]
    memory = memory_of(network, objective, read, chunk, bounded, resumed, q.shape[-1], q.dtype)
    anchor, weights, momenta, start_m, start_s = (x.contiguous() for x in state)
    streams = Tokens(*(x.contiguous() for x in tokens))
    with torch.cuda.device(q.get_device()):  # Triton launches on the current GPU, wherever the tensors are.
        y, after, saved = _host(memory.sizes).forward(
            _plan(places, q, chunk), memory.sizes, memory.parameter, streams, State(anchor, weights, momenta), start_m,
            start_s, save=save,
        )  # fmt: skip
    return [y, *after, *(saved or ())]


@triton_op.register_fake
def _(
    network: str,
    objective: str,
    read: str,
    chunk: int,
    bounded: bool,
    resumed: bool,
    save: bool,
    state: Sequence[Tensor],
    tokens: Sequence[Tensor],
    places: Sequence[Tensor],
) -> list[Tensor]:
    q = tokens[0]
    heads, size = q.shape[1], q.shape[-1]
    result = [torch.empty_like(q, memory_format=torch.contiguous_format), *(x.new_empty(x.shape) for x in state[:3])]
    if save:
        packed = len(places) == 1
        count = packed_chunks(q.shape[2], places[0].shape[0] - 1, chunk) if packed else q.shape[0] * (q.shape[2] // chunk)
        kept = [q.new_empty(count, *state[0].shape[1:]) for _ in range(2)]
        result += [*kept, q.new_empty(count, heads, chunk, size)]
        if state[0].dim() == 5:
            result.append(state[0].new_empty(count, heads))
    return result


@torch.library.custom_op("titans_graph::memory_triton_backward", mutates_args=())
def triton_backward_op(
    network: str,
    objective: str,
    read: str,
    chunk: int,
    bounded: bool,
    resumed: bool,
    anchor: Tensor,
    tokens: Sequence[Tensor],
    places: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> list[Tensor]:
    """Cotangents of ``state`` and ``tokens`` from ``grads``, those of y and of the three final states."""
    from titans_graph.kernels.triton_host import State, Tokens

    q = tokens[0]
    memory = memory_of(network, objective, read, chunk, bounded, resumed, q.shape[-1], q.dtype)
    host = _host(memory.sizes)
    y, *ends = (x.contiguous() for x in grads)
    streams = Tokens(*(x.contiguous() for x in tokens))
    with torch.cuda.device(q.get_device()):
        found = host.backward(
            _plan(places, q, chunk), memory.sizes, memory.parameter, streams, anchor.contiguous(), host.Saved(*saved), y,
            State(*ends),
        )  # fmt: skip
    return [*found.state, found.start_m, found.start_s, *found.tokens]


@triton_backward_op.register_fake
def _(
    network: str,
    objective: str,
    read: str,
    chunk: int,
    bounded: bool,
    resumed: bool,
    anchor: Tensor,
    tokens: Sequence[Tensor],
    places: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (*[anchor] * 5, *tokens)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    *spec, state, tokens, places = inputs
    ctx.spec, ctx.places = tuple(spec), len(places)
    ctx.like = [(x.shape, x.dtype, x.device) for x in output[:4]]
    ctx.save_for_backward(state[0], *tokens, *places, *output[4:])


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    *spec, save = ctx.spec
    if not save:
        raise UsageError("memory_scan ran without gradients enabled and cannot be differentiated")
    anchor, *rest = ctx.saved_tensors
    tokens, places, saved = rest[:6], rest[6 : 6 + ctx.places], rest[6 + ctx.places :]
    given = [torch.zeros(s[0], dtype=s[1], device=s[2]) if g is None else g for g, s in zip(grads[:4], ctx.like, strict=True)]
    found = triton_backward_op(*spec, anchor, tokens, places, saved, given)
    return *[None] * 7, found[:5], found[5:], [None] * ctx.places


torch.library.register_autograd("titans_graph::memory_triton", _backward, setup_context=_setup_context)


@lru_cache(maxsize=64)
def _announce(network: str, operand: str, device: str) -> None:
    log.info("memory_scan: kernel triton on %s in %s for %s", device, operand, network)


def memory_triton(
    network: str,
    objective: str,
    read: str,
    chunk: int,
    bounded: bool,
    state: Sequence[Sequence[Tensor]],
    tokens: Sequence[Tensor],
    places: Sequence[Tensor],
    *,
    resumed: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """:func:`~titans_graph.kernels.memory.memory_scan` on Triton kernels; ``(y, anchor', weights', momenta')``.

    ``state``: anchor, weights, momenta, initial weights and momenta, each a list ``[S, H, *shape]``; ``tokens``: q, k, v in
    the operands' type and the three gates; ``places``: valid and position, or the offsets of packed sequences.
    """
    if not torch.compiler.is_compiling():
        _announce(network, str(tokens[0].dtype), str(tokens[0].device))
    flat = triton_op(
        network,
        objective,
        read,
        chunk,
        bounded,
        resumed,
        torch.is_grad_enabled(),
        [join(x) for x in state],
        [*tokens[:3], *(x.float() for x in tokens[3:])],
        list(places),
    )
    y, *ends = flat[:4]
    anchor, weights, momenta = (part(end, like) for end, like in zip(ends, state[:3], strict=True))
    return y, anchor, weights, momenta


torch.library.register_autograd("titans_graph::memory_triton_backward", once_only)
