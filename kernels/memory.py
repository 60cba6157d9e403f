"""The neural memory as functions on tensors: a whole sequence, one token, or reading alone (arXiv 2501.00663).

The dispatcher: a component calls :func:`memory_scan` and never knows which kernel runs. ``triton`` for tensors on a GPU and
memories it is made for; else the portable form: ``compiled`` (chunk bodies built by Inductor) inside a compiled region,
``chunk`` (the same bodies, eager) outside; ``reference`` by name. The choice is logged once by ``titans_graph.kernels``.

Shapes: ``B`` batch, ``H`` heads, ``G`` slots, ``d`` key and value size; fast weights, momenta and anchors are lists of
``[B, H, *shape]`` in the order of ``network.weights(d)``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from titans_graph.errors import UsageError
from titans_graph.kernels.memory_bound import bounded_step
from titans_graph.kernels.memory_checkpoints import EVERY
from titans_graph.kernels.memory_chunk import trace_keys
from titans_graph.kernels.memory_objectives import Objective, parse_objective
from titans_graph.kernels.memory_ops import scan_op
from titans_graph.kernels.memory_reference import memory_reference
from titans_graph.kernels.networks import Network, Node, PlainUse, parse_network
from titans_graph.kernels.precision import without_autocast
from titans_graph.kernels.triton_memory import memory_triton, refusal

log = logging.getLogger("titans_graph.kernels")

READS = ("after", "before", "chunk")
KERNELS = ("auto", "reference", "chunk", "compiled", "portable", "triton")

Result = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]


def memory_scan(
    network: str,
    objective: str,
    read: str,
    chunk: int,
    bounded: bool,
    anchor: Sequence[Tensor],
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    initial_weights: Sequence[Tensor],
    initial_momenta: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    log_momentum: Tensor,
    log_keep: Tensor,
    valid: Tensor,
    position: Tensor,
    *,
    kernel: str = "auto",
    resumed: bool = True,
    every: int | None = None,
) -> Result:
    """Write ``k``, ``v`` and read ``q`` for a whole grid of tokens: ``(y, anchor', weights', momenta')``.

    q, k, v ``[B, H, G, d]``, ``step`` and the log gates (at most 0, -inf allowed) ``[B, H, G]``, ``valid`` bool and
    ``position`` int64 ``[B, G]``. G is a multiple of ``chunk``, slot and position agree modulo ``chunk``, and the
    tokens of one document are contiguous. Per row, a chunk whose first slot is valid begins here (the anchor becomes
    the current weights; at position 0 the row first restarts from the initial ones); otherwise it continues with the
    state's anchor. Invalid slots change nothing and give zeros.

    ``read``: ``after`` the token's own write, ``before`` it, or with the ``chunk``'s first weights. ``bounded`` divides
    the step by :func:`~titans_graph.kernels.memory_bound.step_bound` of the chunk's first weights. Gradients reach
    every floating argument, from y and from the final state. ``kernel``: one of ``KERNELS``; ``auto`` is ``triton`` for
    tensors on a GPU where it knows the memory, else the portable form. Not ``resumed``: the caller knows that every chunk
    with a token begins here, which saves the Triton kernels a second read of the weights. ``every``: chunks from one
    checkpoint to the next in the backward pass of the portable form (at least 1, ``EVERY`` of
    :mod:`~titans_graph.kernels.memory_checkpoints` by default).

    Raises :class:`UsageError` for unknown names, a grid that is not a whole number of chunks, a memory that
    ``kernel="triton"`` does not know, and ``every`` with a kernel that has no checkpoints.
    """
    check_choices(read, kernel)
    if every is not None and every < 1:
        raise UsageError(f"every counts chunks between checkpoints and is at least 1; got {every}")
    # Not while tracing: the check would become a guard on the number of slots.
    if not torch.compiler.is_compiling() and (chunk < 1 or q.shape[2] % chunk != 0):
        raise UsageError(f"memory_scan needs a whole number of chunks of {chunk} slots; got {q.shape[2]} slots")
    dtype = weights[0].dtype
    state = [list(x) for x in (anchor, weights, momenta, initial_weights, initial_momenta)]
    if kernel != "reference" and _transformed([*(x for xs in state for x in xs), q, k, v, step, log_momentum, log_keep]):
        raise UsageError("the memory's operators know reverse-mode gradients only; take kernel='reference' under torch.func")
    operand = operand_type(q, dtype)
    kernel = choose(kernel, network, objective, read, chunk, bounded, q.shape[-1], operand, q.is_cuda)
    if kernel in ("triton", "reference") and every is not None:
        raise UsageError(f"every={every} is a setting of the portable form, not of {kernel}: take kernel='chunk' or 'compiled'")
    if kernel == "triton":
        tokens = [*(x.to(operand) for x in (q, k, v)), step, log_momentum, log_keep]
        y, *ends = memory_triton(
            network, objective, read, chunk, bounded, state, tokens, (valid, position), resumed=resumed
        )  # fmt: skip
        return y.to(q.dtype), ends[0], ends[1], ends[2]
    tokens = [x.to(dtype) for x in (q, k, v, step, log_momentum, log_keep)]
    if kernel == "reference":
        return _reference(network, objective, read, chunk, bounded, state, tokens, valid, position, q.dtype)
    flat = scan_op(
        network,
        objective,
        read,
        chunk,
        bounded,
        kernel == "compiled",
        (every or EVERY) if torch.is_grad_enabled() else 0,
        *state,
        tokens,
        valid,
        position,
    )
    n = len(state[0])
    return flat[0].to(q.dtype), flat[1 : 1 + n], flat[1 + n : 1 + 2 * n], flat[1 + 2 * n : 1 + 3 * n]


def check_choices(read: str, kernel: str) -> None:
    """A UsageError for names that are not in ``READS`` and ``KERNELS``."""
    if read not in READS or kernel not in KERNELS:
        raise UsageError(f"read is one of {', '.join(READS)} and kernel one of {', '.join(KERNELS)}; got {read!r}, {kernel!r}")


def operand_type(q: Tensor, weight: torch.dtype) -> torch.dtype:
    """In what the Triton kernels multiply: autocast's type where that is on; else half precision where the tokens have it,
    and the wider of the two types where they have not.

    Autocast cannot be left to the tokens: norms and sums, and whatever is made of them, are float32 under it.
    """
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):  # torch knows no autocast on meta
        return torch.get_autocast_dtype(q.device.type)
    return q.dtype if q.dtype.itemsize < 4 else torch.promote_types(q.dtype, weight)


def choose(
    kernel: str,
    network: str,
    objective: str,
    read: str,
    chunk: int,
    bounded: bool,
    dim: int,
    operand: torch.dtype,
    on_gpu: bool,
) -> str:
    """The kernel that runs; ``UsageError`` where Triton was asked for by name and does not know the memory."""
    why = ""
    if kernel == "triton" or (kernel == "auto" and on_gpu):
        why = _refusal(network, objective, read, chunk, bounded, dim, operand)
        if not why:
            return "triton"
        if kernel == "triton":
            raise UsageError(f"kernel='triton': {why}")
    if kernel in ("auto", "portable"):
        kernel = "compiled" if torch.compiler.is_compiling() else "chunk"
        if why and not torch.compiler.is_compiling():
            _tell(kernel, network, why)
    return kernel


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _refusal(network: str, objective: str, read: str, chunk: int, bounded: bool, dim: int, operand: torch.dtype) -> str:
    why = refusal(network, objective, read, chunk, bounded, dim, operand)
    if why and torch.compiler.is_compiling():
        _tell("compiled", network, why)
    return why


@lru_cache(maxsize=64)
def _tell(kernel: str, network: str, why: str) -> None:
    log.info("memory_scan: kernel %s instead of triton for %s: %s", kernel, network, why)


def _transformed(tensors: Sequence[Tensor]) -> bool:
    """Whether a functorch transform or forward-mode differentiation is at work, for which the operators have no rules."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return True
    unpack: Any = torch.autograd.forward_ad.unpack_dual
    return any(unpack(x).tangent is not None for x in tensors)


@without_autocast
def _reference(
    network: str,
    objective: str,
    read: str,
    chunk: int,
    bounded: bool,
    state: list[list[Tensor]],
    tokens: list[Tensor],
    valid: Tensor,
    position: Tensor,
    dtype: torch.dtype,
) -> Result:
    if not torch.compiler.is_compiling():
        log.info("memory_scan: kernel reference on %s for %s", tokens[0].device, network)
    anchor, weights, momenta, initial_weights, initial_momenta = state
    q, k, v, step, log_momentum, log_keep = tokens
    y, *ends = memory_reference(
        network, objective, read, chunk, bounded, anchor, weights, momenta, initial_weights, initial_momenta,
        q, k, v, step, log_momentum, log_keep, valid, position,
    )  # fmt: skip
    return y.to(dtype), ends[0], ends[1], ends[2]


@without_autocast
def memory_step(
    network: str | Network,
    objective: str | Objective,
    read: str,
    chunk: int,
    bounded: bool,
    anchor: Sequence[Tensor],
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    initial_weights: Sequence[Tensor],
    initial_momenta: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    log_momentum: Tensor,
    log_keep: Tensor,
    valid: Tensor,
    position: Tensor,
) -> Result:
    """:func:`memory_scan` for one token (G = 1), as plain tensor operations that fuse into the caller's region.

    The slot may stand anywhere in its chunk: it begins one where ``position % chunk`` is 0.
    """
    net, goal = parsed(network, objective)
    dtype, heads, names = weights[0].dtype, q.shape[1], list(net.weights(q.shape[-1]))
    now = valid[:, 0].repeat_interleave(heads)
    place = position[:, 0].repeat_interleave(heads)
    start, first = now & (place == 0), now & (place % chunk == 0)
    before = _where(start, _flat(initial_weights), _flat(weights))
    moving = _where(start, _flat(initial_momenta), _flat(momenta))
    at = _where(first, before, _flat(anchor))
    q1, k1, v1 = (x.flatten(0, 1).to(dtype) for x in (q, k, v))
    theta, eta, keep = (x.flatten() for x in (step.to(dtype), log_momentum.to(dtype).exp(), log_keep.to(dtype).exp()))
    if bounded:
        theta = bounded_step(net, dict(zip(names, at, strict=True)), k1, theta[:, None])[:, 0]
    gradient = _gradient(net, goal, names, at, k1, v1)
    momentum = [_rows(eta, s) * s - _rows(theta, g) * g for s, g in zip(moving, gradient, strict=True)]
    after = [_rows(keep, m) * m + s for m, s in zip(before, momentum, strict=True)]
    source = {"after": after, "before": before, "chunk": at}[read]
    y = net.apply(q1, PlainUse(dict(zip(names, source, strict=True))))
    y = torch.where(now[:, None, None], y, 0.0).to(q.dtype).view(q.shape)
    ends = at, _where(now, after, before), _where(now, momentum, moving)
    shaped = [[x.view(o.shape) for x, o in zip(end, weights, strict=True)] for end in ends]
    return y, shaped[0], shaped[1], shaped[2]


def memory_read(network: str | Network, weights: Sequence[Tensor], q: Tensor) -> Tensor:
    """Read without writing (equation 15): the network of the given weights for ``q`` ``[B, H, G, d]``, same shape."""
    net = parsed(network, "l2")[0]
    named = dict(zip(net.weights(q.shape[-1]), weights, strict=True))
    return net.apply(q.to(weights[0].dtype), PlainUse(named)).to(q.dtype)


def parsed(network: str | Network, objective: str | Objective) -> tuple[Network, Objective]:
    """Both descriptions parsed; texts by way of plain constants, which is all a traced call may bring back."""
    net = network
    if isinstance(net, str):
        nodes, *rest = _network_parts(net)
        net = Network(tuple(Node(*node) for node in nodes), *rest)
    goal = Objective(*_objective_parts(objective)) if isinstance(objective, str) else objective
    return net, goal


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _network_parts(text: str) -> tuple[tuple[tuple[Any, ...], ...], str, str]:
    network = parse_network(text)
    return tuple(tuple(node) for node in network.nodes), network.output, network.short


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _objective_parts(text: str) -> tuple[str, tuple[tuple[str, int | float | bool | str | None], ...]]:
    objective = parse_objective(text)
    return objective.name, objective.options


def _gradient(network: Network, objective: Objective, names: list[str], at: list[Tensor], k: Tensor, v: Tensor) -> list[Tensor]:
    """The momentary surprise of one token per row, ``[N, *shape]``, as sums of outer products."""
    trace = trace_keys(network, objective, dict(zip(names, at, strict=True)), k, v)
    result = []
    for name, weight in zip(names, at, strict=True):
        inputs, deltas = trace.inputs[name], trace.deltas[name]
        if weight.dim() == 2:
            result.append(torch.stack(deltas).sum((0, 2)))
        else:
            result.append(torch.stack([u.mT * d for u, d in zip(inputs, deltas, strict=True)]).sum(0))
    return result


def _flat(values: Sequence[Tensor]) -> list[Tensor]:
    return [x.flatten(0, 1) for x in values]


def _where(rows: Tensor, new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    return [torch.where(_rows(rows, n), n, o) for n, o in zip(new, old, strict=True)]


def _rows(gate: Tensor, like: Tensor) -> Tensor:
    return gate.view(-1, *[1] * (like.dim() - 1))
