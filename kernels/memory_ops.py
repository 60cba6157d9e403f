"""The memory scan as two operators of ``torch.library``: forward over the chunks, backward over them in reverse.

Forward keeps the weights and momenta that some chunks start from (:mod:`~titans_graph.kernels.memory_checkpoints`);
backward recomputes a chunk from there (but for the products of :mod:`~titans_graph.kernels.memory_products`, which forward
keeps as well) and takes the vector-Jacobian product of its whole body, so the second-order terms need no formula of their
own. Inside a compiled region both are opaque: the number of chunks is never seen by the compiler.

Shapes: ``B`` batch, ``H`` heads, ``N`` = B * H rows, ``G`` slots, ``C`` slots of a chunk; lists ``[B, H, *shape]``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from titans_graph.errors import UsageError
from titans_graph.kernels.memory_checkpoints import slots, storage
from titans_graph.kernels.memory_chunk import Form
from titans_graph.kernels.memory_forward import Forward
from titans_graph.kernels.memory_objectives import REPLACED, parse_objective
from titans_graph.kernels.memory_products import kept_width
from titans_graph.kernels.memory_reverse import Reverse
from titans_graph.kernels.memory_walk import Walk, flags_of, merge, split
from titans_graph.kernels.networks import parse_network
from titans_graph.kernels.undisturbed import undisturbed

log = logging.getLogger("titans_graph.kernels")

SCAN = "titans_graph::memory_scan_6"
"""The operator's name. A region that torch has compiled and kept on disk is found again by the names and arguments of its
operators, whatever these return by now: the name changes wherever the number or the shapes of the results do."""


@lru_cache(maxsize=64)
def form_of(network: str, objective: str, read: str, bounded: bool) -> Form:
    """The static side of a memory from canonical strings."""
    return Form(parse_network(network), parse_objective(objective), read, bounded)


REPLACED.append(form_of.cache_clear)


@lru_cache(maxsize=64)
def _announce(kernel: str, form: Form, device: str) -> None:
    log.info("memory_scan: kernel %s on %s for %s", kernel, device, form.network.text())


def _walk(
    spec: tuple[str, str, str, int, bool, bool],
    anchor: Sequence[Tensor],
    tokens: Sequence[Tensor],
    valid: Tensor,
    position: Tensor,
) -> Walk:
    network, objective, read, chunk, bounded, use_compiled = spec
    form = form_of(network, objective, read, bounded)
    _announce("compiled" if use_compiled else "chunk", form, str(tokens[0].device))
    heads = tokens[0].shape[1]
    flags = flags_of(valid, position, chunk, heads)
    return Walk(form, use_compiled, chunk, flags, merge(anchor), list(tokens), valid)


@torch.library.custom_op(SCAN, mutates_args=())
def scan_op(
    network: str,
    objective: str,
    read: str,
    chunk: int,
    bounded: bool,
    compiled: bool,
    every: int,
    anchor: Sequence[Tensor],
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    initial_weights: Sequence[Tensor],
    initial_momenta: Sequence[Tensor],
    tokens: Sequence[Tensor],
    valid: Tensor,
    position: Tensor,
) -> list[Tensor]:
    """``[y, anchor'.., weights'.., momenta'.., saved..]``; ``tokens`` is [q, k, v, step, log_momentum, log_keep].

    ``every``: chunks from one checkpoint to the next, or 0 for none. ``saved`` holds, unless it is 0: where bounded, the scale
    of the step ``[B, H, G]``; per weight and momentum the values that checkpointed chunks start from, flat
    (:func:`~titans_graph.kernels.memory_checkpoints.storage`), of a chunk at which all rows restart whatever lay there, which
    backward does not read; where a chunk keeps products, those of all slots ``[B, H, G, width]``.
    """
    spec = network, objective, read, chunk, bounded, compiled

    def run() -> list[Tensor]:
        with torch.no_grad(), torch.autocast(weights[0].device.type, enabled=False):
            walk = _walk(spec, anchor, tokens, valid, position)
            initial = merge(initial_weights), merge(initial_momenta)
            return Forward(walk, every, merge(weights), merge(momenta), initial).run()

    y, *rest = undisturbed(run)
    n = 3 * len(weights)
    return [y, *(_whole(x, like) for x, like in zip(rest[:n], (*anchor, *weights, *momenta), strict=True)), *rest[n:]]


def _whole(x: Tensor, like: Tensor) -> Tensor:
    """A copy in the shape of ``like``, contiguous and no view.

    An operator's results must not alias its arguments (the anchor may still be the entry's), have the strides that its fake
    has, whatever a body gives; and whoever gets them may change them in place, which autograd refuses for views.
    """
    result = x.new_empty(like.shape)
    result.view(x.shape).copy_(x)
    return result


@scan_op.register_fake
def _(
    network: str,
    objective: str,
    read: str,
    chunk: int,
    bounded: bool,
    compiled: bool,
    every: int,
    anchor: Sequence[Tensor],
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    initial_weights: Sequence[Tensor],
    initial_momenta: Sequence[Tensor],
    tokens: Sequence[Tensor],
    valid: Tensor,
    position: Tensor,
) -> list[Tensor]:
    q = tokens[0]
    state = [x.new_empty(x.shape) for x in (*anchor, *weights, *momenta)]
    scale = [q.new_empty(q.shape[:3])] if every and bounded else []
    kept = []
    if every:
        kept = storage(q.shape[2] // chunk, every, (*weights, *momenta))
        width = kept_width(form_of(network, objective, read, bounded).network, q.shape[3])
        if width:
            kept.append(q.new_empty(*q.shape[:3], width))
    return [q.new_empty(q.shape), *state, *scale, *kept]


@torch.library.custom_op(f"{SCAN}_backward", mutates_args=())
def backward_op(
    network: str,
    objective: str,
    read: str,
    chunk: int,
    bounded: bool,
    compiled: bool,
    every: int,
    anchor: Sequence[Tensor],
    initial_weights: Sequence[Tensor],
    initial_momenta: Sequence[Tensor],
    tokens: Sequence[Tensor],
    valid: Tensor,
    position: Tensor,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> list[Tensor]:
    """Cotangents ``[anchor.., weights.., momenta.., initial_weights.., initial_momenta.., tokens..]``.

    ``grads`` are those of ``[y, anchor'.., weights'.., momenta'..]``.
    """
    # The bound on the step is a constant here: forward has found it.
    spec = network, objective, read, chunk, False, compiled
    scale, kept = (list(saved[:1]), list(saved[1:])) if bounded else ([], list(saved))

    def run() -> list[Tensor]:
        with torch.no_grad(), torch.autocast(anchor[0].device.type, enabled=False):
            taken = [*tokens[:3], *(tokens[3] * x for x in scale), *tokens[3 + len(scale) :]]
            walk = _walk(spec, anchor, taken, valid, position)
            initial = merge(initial_weights), merge(initial_momenta)
            n = 2 * len(anchor)
            states = slots(kept[:n], len(walk.flags), every, [*initial[0], *initial[1]])
            results = Reverse(walk, every, initial, [*states, *kept[n:]], merge(grads[1:]), grads[0]).run()
            for x in scale:
                results[-3] *= x.view_as(results[-3])
            return results

    like = [*anchor, *anchor, *anchor, *initial_weights, *initial_momenta, *tokens]
    return split(undisturbed(run), like)


@backward_op.register_fake
def _(
    network: str,
    objective: str,
    read: str,
    chunk: int,
    bounded: bool,
    compiled: bool,
    every: int,
    anchor: Sequence[Tensor],
    initial_weights: Sequence[Tensor],
    initial_momenta: Sequence[Tensor],
    tokens: Sequence[Tensor],
    valid: Tensor,
    position: Tensor,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> list[Tensor]:
    like = [*anchor, *anchor, *anchor, *initial_weights, *initial_momenta, *tokens]
    return [x.new_empty(x.shape) for x in like]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)  # else the checkpoints get cotangents of zeros, as large as they are
    ctx.spec = inputs[:7]
    anchor, _, _, initial_weights, initial_momenta, tokens, valid, position = inputs[7:]
    ctx.count = len(anchor)
    ends = output[: 1 + 3 * ctx.count]
    ctx.like = [(x.shape, x.dtype, x.device) for x in ends]
    ctx.save_for_backward(*anchor, *initial_weights, *initial_momenta, *tokens, valid, position, *output[len(ends) :])


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    if not ctx.spec[-1]:
        raise UsageError("memory_scan ran without gradients enabled and cannot be differentiated")
    n = ctx.count
    kept = list(ctx.saved_tensors)  # Once: activation checkpointing unpacks at every access.
    given, saved = kept[: 3 * n + 8], kept[3 * n + 8 :]
    ends = [
        torch.zeros(s[0], dtype=s[1], device=s[2]) if g is None else g.contiguous()
        for g, s in zip(grads[: 1 + 3 * n], ctx.like, strict=True)
    ]
    lists = given[:n], given[n : 2 * n], given[2 * n : 3 * n], given[3 * n : 3 * n + 6]
    result = backward_op(*ctx.spec, *lists, *given[-2:], saved, ends)
    parts = [result[i * n : (i + 1) * n] for i in range(5)]
    return (*[None] * 7, *parts, result[5 * n :], None, None)


torch.library.register_autograd(SCAN, _backward, setup_context=_setup_context)


def once_only(*_: Any) -> Any:
    """The gradient of a gradient: there is none."""
    raise UsageError(
        "the memory's kernels know first derivatives only; take kernel='reference' where gradients are differentiated again"
    )


torch.library.register_autograd(f"{SCAN}_backward", once_only)
