"""One token a row on Triton kernels, as two operators of ``torch.library``, and the choice between them and the portable form.

The operators take and give the tensors of :class:`~titans_graph.kernels.memory_lazy.Lazy` as they are: there is no second
layout. What is only read (anchor, M and S of a step) may be in a narrower type than the ring. Both return new tensors and
change none, so that a state stays a value; they read nothing on the host, where the ring's next slot is known besides
(:func:`~titans_graph.kernels.memory_lazy.ready`), and so a step can be captured in a CUDA graph and replayed. No gradients:
single tokens with gradients are the portable form's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from titans_graph.errors import UsageError
from titans_graph.kernels.triton_config import available
from titans_graph.kernels.triton_memory import memory_of

log = logging.getLogger("titans_graph.kernels")

Ring = tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor]


def refusal(network: str, objective: str, read: str, dim: int, operand: torch.dtype) -> str:
    """Why no kernel decodes this memory here; empty where one does."""
    return str(available().why) or _refusal(network, objective, read, dim, operand)


@lru_cache(maxsize=256)
def _refusal(network: str, objective: str, read: str, dim: int, operand: torch.dtype) -> str:
    from titans_graph.kernels.triton_decode_host import supports

    try:
        sizes = memory_of(network, objective, read, 1, False, False, dim, operand).sizes
    except UsageError as problem:
        return str(problem)
    inner = f", hidden size {sizes.hidden}" if sizes.hidden else ""
    return "" if supports(sizes) else f"no kernel decodes with keys of size {dim}{inner}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def decode_kernel(kernel: str, network: str, objective: str, read: str, dim: int, operand: torch.dtype, device: str) -> str:
    """``triton`` or ``portable``: what reads single tokens of a memory with a state in ``operand`` on a type of device.

    ``kernel``: ``auto`` is ``triton`` on a GPU where it knows the memory. :class:`UsageError` where ``triton`` is asked for
    by name and does not. The choice is logged once.
    """
    if kernel != "triton" and (kernel != "auto" or device == "cpu"):
        return "portable"
    why = refusal(network, objective, read, dim, operand)
    if why and kernel == "triton":
        raise UsageError(f"kernel='triton': {why}")
    _tell("portable" if why else "triton", network, str(operand), device, why)
    return "portable" if why else "triton"


@lru_cache(maxsize=64)
def _tell(kernel: str, network: str, operand: str, device: str, why: str) -> None:
    log.info("single tokens: kernel %s on %s in %s for %s%s", kernel, device, operand, network, f": {why}" if why else "")


def decode_step(
    network: str,
    objective: str,
    read: str,
    bounded: bool,
    anchor: list[Tensor],
    weights: list[Tensor],
    momenta: list[Tensor],
    inputs: list[Tensor],
    deltas: list[Tensor],
    shares: Tensor,
    ends: Tensor,
    slot: Tensor,
    norms: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    log_momentum: Tensor,
    log_keep: Tensor,
) -> Ring:
    """:func:`~titans_graph.kernels.memory_lazy.lazy_step`: y, and of the next state ``inputs``, ``deltas``, ``shares``,
    ``ends`` and ``slot``."""
    tokens = [*(x.to(deltas[0].dtype) for x in (q, k, v)), *(x.float() for x in (step, log_momentum, log_keep))]
    fast = anchor, weights, momenta, inputs, deltas
    y, *new = decode_op(network, objective, read, bounded, *fast, shares, ends, slot, norms, tokens)
    n = len(inputs)
    return y.to(q.dtype), new[:n], new[n : 2 * n], new[2 * n], new[2 * n + 1], slot + 1


@torch.library.custom_op("titans_graph::memory_decode", mutates_args=())
def decode_op(
    network: str,
    objective: str,
    read: str,
    bounded: bool,
    anchor: Sequence[Tensor],
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    inputs: Sequence[Tensor],
    deltas: Sequence[Tensor],
    shares: Tensor,
    ends: Tensor,
    slot: Tensor,
    norms: Tensor,
    tokens: Sequence[Tensor],
) -> list[Tensor]:
    """``[y, inputs.., deltas.., shares, ends]``; ``tokens``: q, k, v ``[B, H, 1, d]`` and the gates ``[B, H, 1]`` in fp32."""
    from titans_graph.kernels.triton_decode_host import Ring, decode
    from titans_graph.kernels.triton_host import Tokens

    dim, operand = tokens[0].shape[-1], weights[0].dtype
    memory = memory_of(network, objective, read, shares.shape[-1], bounded, False, dim, operand)
    ring = Ring(
        *(_packed(anchor), _packed(weights), _packed(momenta), _packed(inputs), _packed(deltas)),
        *(shares.contiguous(), ends.contiguous(), slot, norms.contiguous()),
    )
    with torch.cuda.device(shares.get_device()):  # Triton launches on the current GPU, wherever the tensors are.
        return decode(memory.sizes, memory.parameter, ring, Tokens(*(x.contiguous() for x in tokens)))


@decode_op.register_fake
def _(
    network: str,
    objective: str,
    read: str,
    bounded: bool,
    anchor: Sequence[Tensor],
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    inputs: Sequence[Tensor],
    deltas: Sequence[Tensor],
    shares: Tensor,
    ends: Tensor,
    slot: Tensor,
    norms: Tensor,
    tokens: Sequence[Tensor],
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (tokens[0], *inputs, *deltas, shares, ends)]


def decode_write(
    weights: list[Tensor],
    momenta: list[Tensor],
    inputs: list[Tensor],
    deltas: list[Tensor],
    shares: Tensor,
    ends: Tensor,
    reads: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """:func:`~titans_graph.kernels.memory_lazy.current`, and both again in the type ``reads``, where there is one."""
    new = write_op(weights, momenta, inputs, deltas, shares, ends, reads)
    n = len(weights)
    return new[:n], new[n : 2 * n], new[2 * n :]


@torch.library.custom_op("titans_graph::memory_decode_write_2", mutates_args=())
def write_op(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    inputs: Sequence[Tensor],
    deltas: Sequence[Tensor],
    shares: Tensor,
    ends: Tensor,
    reads: torch.dtype | None,
) -> list[Tensor]:
    """``[weights.., momenta..]`` with the ring's pairs, and copies of all in the type ``reads``, unless that is None.

    Every weight is used once, in the order of the lists.
    """
    from titans_graph.kernels.triton_decode_host import write

    lists = [_packed(values) for values in (weights, momenta, inputs, deltas)]
    with torch.cuda.device(shares.get_device()):
        return write(lists[0], lists[1], lists[2], lists[3], shares.contiguous(), ends.contiguous(), reads)


def _packed(values: Sequence[Tensor]) -> list[Tensor]:
    return [x.contiguous() for x in values]


@write_op.register_fake
def _(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    inputs: Sequence[Tensor],
    deltas: Sequence[Tensor],
    shares: Tensor,
    ends: Tensor,
    reads: torch.dtype | None,
) -> list[Tensor]:
    new = [x.new_empty(x.shape) for x in (*weights, *momenta)]
    return new if reads is None else [*new, *(x.new_empty(x.shape, dtype=reads) for x in new)]
