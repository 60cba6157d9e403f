"""The neural memory of many sequences that lie end to end in one row (``cu_seqlens``), each with a state of its own.

Beside :mod:`~titans_graph.kernels.memory_function`, which has one row a sequence. On a GPU the Triton kernels take packed
sequences as they are; elsewhere they are spread over the rows of a grid.

Shapes: ``S`` sequences, ``H`` heads, ``T`` tokens of all sequences together, ``d`` key and value size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titans_graph.errors import UsageError
from titans_graph.kernels.memory import check_choices, choose, memory_scan, operand_type
from titans_graph.kernels.memory_function import (
    Description,
    Named,
    check_call,
    check_named,
    check_tensors,
    complete_gates,
    described,
)
from titans_graph.kernels.memory_objectives import Objective
from titans_graph.kernels.networks import Network
from titans_graph.kernels.precision import running
from titans_graph.kernels.triton_memory import memory_triton


def neural_memory_packed(
    network: Description | Network,
    weights: Named,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    step: Tensor,
    log_momentum: Tensor | None = None,
    log_keep: Tensor | None = None,
    momenta: Named | None = None,
    chunk: int = 64,
    objective: Description | Objective = "l2",
    read: str = "after",
    kernel: str = "auto",
) -> tuple[Tensor, Named, Named]:
    """:func:`~titans_graph.neural_memory` of packed sequences: y ``[1, H, T, d]``, and M and S at every sequence's end.

    q, k, v ``[1, H, T, d]``, gates ``[1, H, T]``; ``cu_seqlens`` int ``[S + 1]``: sequence i is the tokens from
    ``cu_seqlens[i]`` to before ``cu_seqlens[i + 1]``; it rises from 0 to T, and a sequence may be empty. ``weights`` M_0 and
    ``momenta`` S_0 (zero where not given) ``{name: [S, H, *shape]}``, or ``[1, H, *shape]`` for one start of all; the
    results are ``{name: [S, H, *shape]}``. Every sequence begins with a chunk of its own and sees no other. Gradients reach
    everything that is given. The other arguments are those of ``neural_memory``.

    On a GPU ``cu_seqlens`` is not read on the host (the call can be captured in a CUDA graph), so it is not checked there:
    offsets outside 0..T are cut off, falling ones make empty sequences. Raises :class:`UsageError` where shapes, names or
    settings do not fit. To go on inside a chunk, give sequences as rows to ``neural_memory``.
    """
    check_tensors(q=q, k=k, v=v, step=step, log_momentum=log_momentum, log_keep=log_keep)
    text, goal, shapes = described(network, objective, q.shape[-1])
    check_choices(read, kernel)
    step, log_momentum, log_keep = complete_gates(step, log_momentum, log_keep)
    _check_offsets(cu_seqlens, q)
    count = cu_seqlens.shape[0] - 1
    start = _rows("weights", weights, count)
    rest = {n: torch.zeros_like(w) for n, w in start.items()} if momenta is None else _rows("momenta", momenta, count)
    check_call(text, dict(shapes), {"weights": start, "momenta": rest}, count, (q, k, v), (step, log_momentum, log_keep), chunk)
    names = [name for name, _ in shapes]
    state = [[named[n] for n in names] for named in (start, start, rest, start, rest)]
    tokens = [q, k, v, step, log_momentum, log_keep]
    operand = operand_type(q, state[0][0].dtype)
    name = choose(kernel, text, goal, read, chunk, False, q.shape[-1], operand, q.is_cuda)
    if name == "triton":
        tokens = [*(x.to(operand) for x in tokens[:3]), *tokens[3:]]
        y, _, now, moving = memory_triton(text, goal, read, chunk, False, state, tokens, (cu_seqlens,), resumed=False)
        y = y.to(q.dtype)
    else:
        y, now, moving = _spread(text, goal, read, chunk, state, tokens, cu_seqlens, name)
    return y, dict(zip(names, now, strict=True)), dict(zip(names, moving, strict=True))


def _rows(kind: str, named: Named, count: int) -> dict[str, Tensor]:
    """One start for all sequences, or one for each."""
    check_named(kind, named)
    if any(w.dim() < 3 or w.shape[0] not in (1, count) for w in named.values()):
        found = {n: list(w.shape) for n, w in named.items()}
        raise UsageError(f"{kind} must begin with one axis of {count} sequences, or of 1 for all of them; got {found}")
    return {n: running(w).expand(count, *w.shape[1:]) for n, w in named.items()}


def _check_offsets(offsets: object, q: Tensor) -> None:
    if not isinstance(offsets, Tensor):
        raise UsageError(f"cu_seqlens must be a tensor of whole numbers [S + 1], not {offsets!r:.60}")
    if offsets.dim() != 1 or offsets.shape[0] < 2 or offsets.is_floating_point() or offsets.dtype == torch.bool:
        raise UsageError(f"cu_seqlens must be whole numbers [S + 1]; got {offsets.dtype} {list(offsets.shape)}")
    if q.dim() != 4 or q.shape[0] != 1:
        raise UsageError(f"packed sequences lie in one row, [1, H, T, d]; got {list(q.shape)}")
    if offsets.device != q.device:
        raise UsageError(f"all tensors must be on one device; cu_seqlens is on {offsets.device}, q on {q.device}")
    if offsets.is_cuda or torch.compiler.is_compiling():
        return
    if int(offsets[0]) != 0 or int(offsets[-1]) != q.shape[2] or bool((offsets.diff() < 0).any()):
        raise UsageError(f"cu_seqlens must rise from 0 to the number of tokens, {q.shape[2]}; got {offsets.tolist()!r:.200}")


def _spread(
    network: str,
    objective: str,
    read: str,
    chunk: int,
    state: Sequence[Sequence[Tensor]],
    tokens: Sequence[Tensor],
    offsets: Tensor,
    kernel: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The sequences as rows of a grid, as long as the longest."""
    start, length = offsets[:-1].long(), offsets.diff().long()
    slots = max(-(-int(length.max()) // chunk), 1) * chunk
    slot = torch.arange(slots, device=offsets.device)
    valid = slot < length[:, None]
    place = torch.where(valid, start[:, None] + slot, 0)
    total = tokens[0].shape[2]
    rows = [_take(x, place) if total else x.new_zeros(len(length), x.shape[1], slots, *x.shape[3:]) for x in tokens]
    # Past the first chunk: position 0 would restart from the initial state, which is the same.
    position = (slot + chunk).expand_as(valid)
    anchor, weights, momenta, initial_weights, initial_momenta = state
    y, _, now, moving = memory_scan(
        network, objective, read, chunk, False, anchor, weights, momenta, initial_weights, initial_momenta,
        rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], valid, position, kernel=kernel, resumed=False,
    )  # fmt: skip
    row = torch.repeat_interleave(torch.arange(len(length), device=offsets.device), length)
    inside = torch.arange(total, device=offsets.device) - start[row]
    return y[row, :, inside].transpose(0, 1)[None], now, moving


def _take(x: Tensor, place: Tensor) -> Tensor:
    """``[1, H, T, ...]`` at ``place`` ``[S, G]``: ``[S, H, G, ...]``."""
    return x[0][:, place].transpose(0, 1)
