"""Decoding lazily: inside a chunk the weights and momenta of every token are known without being written.

One token changes M and S by outer products of what went into each fast weight and its delta (:mod:`memory_chunk`). So
the last few tokens are kept as such pairs, and M_t and S_t are written once for all of them:

    M_t = a0 M + f S - sum_i w_i u_i^T d_i          S_t = e0 S - sum_i s_i u_i^T d_i

with M and S as last written. A token multiplies s and e0 by its momentum, puts its step where its pair stands in s, and
then w <- keep w + s, f <- keep f + e0, a0 <- keep a0. Reading costs one product with M, one with S and a few with the pairs;
the update of every token would read and write all of M and S.

A state is a value, so the pairs are copied at every token: a short ring is cheap to copy, a long one seldom written out.
:data:`SLOTS` is where the sum is least (measured). What a chunk decides once, the norms of its first weights for the bound
of the step, is kept beside it.

Shapes: ``B`` batch, ``H`` heads, ``N`` = B * H rows, ``R`` slots of the ring, ``W`` fast weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titans_graph.kernels.memory import parsed
from titans_graph.kernels.memory_bound import bound_of, weight_norms
from titans_graph.kernels.memory_chunk import trace_keys
from titans_graph.kernels.memory_objectives import Objective
from titans_graph.kernels.networks import Network, PlainUse

SLOTS = 16
"""Tokens after which weights and momenta are written."""


class Lazy(NamedTuple):
    """A memory between two writings of its weights, all tensors ``[B, H, ...]``.

    ``anchor``: the chunk's first weights, where gradients are taken; ``weights`` M and ``momenta`` S as last written; each
    one tensor a fast weight. ``inputs`` u ``[.., R, in]`` (size 0 for a vector, which has none) and ``deltas`` d ``[.., R,
    out]``: one tensor for every *use* of a weight, in the order of ``network.uses``. ``shares`` ``[.., 2, R]``: w and s of
    the pairs, 0 for an empty slot. ``ends`` ``[.., 3]``: a0, f and e0. ``norms`` ``[.., W]``: those of the anchor.
    """

    anchor: list[Tensor]
    weights: list[Tensor]
    momenta: list[Tensor]
    inputs: list[Tensor]
    deltas: list[Tensor]
    shares: Tensor
    ends: Tensor
    norms: Tensor


def slots_of(chunk: int) -> int:
    """How many slots a ring has: never more than a chunk."""
    return min(SLOTS, chunk)


def due(place: int, chunk: int) -> bool:
    """Whether weights are written before the token at position ``place`` is read: a chunk begins, or the ring is full."""
    return place % chunk % slots_of(chunk) == 0


def begin(
    network: str | Network, chunk: int, bounded: bool, anchor: list[Tensor], weights: list[Tensor], momenta: list[Tensor]
) -> Lazy:
    """An empty ring over weights and momenta as they are."""
    net = parsed(network, "l2")[0]
    lead, like = anchor[0].shape[:2], anchor[0]
    inputs, deltas = [], []
    shapes = dict(zip(_names(net), (x.shape[2:] for x in weights), strict=True))
    for name in net.uses(0):
        shape = shapes[name]
        inputs.append(like.new_zeros(*lead, slots_of(chunk), shape[0] if len(shape) == 2 else 0))
        deltas.append(like.new_zeros(*lead, slots_of(chunk), shape[-1]))
    shares = like.new_zeros(*lead, 2, slots_of(chunk))
    norms = _norms(net, anchor) if bounded else like.new_zeros(*lead, 0)
    return Lazy(anchor, weights, momenta, inputs, deltas, shares, _clear(like.new_zeros(*lead, 3)), norms)


def current(network: str | Network, state: Lazy) -> tuple[list[Tensor], list[Tensor]]:
    """M_t and S_t, written out."""
    net = parsed(network, "l2")[0]
    (w, s), (a0, f, e0) = state.shares.unbind(-2), state.ends.unbind(-1)
    weights, momenta = [], []
    for name, m, moving in zip(_names(net), state.weights, state.momenta, strict=True):
        one = (..., *[None] * (m.dim() - 2))
        new, after = (a0[one] * m).addcmul_(f[one], moving), e0[one] * moving
        for u, d, use in zip(state.inputs, state.deltas, net.uses(0), strict=True):
            if use == name:
                _subtract(new, u, d, w)
                _subtract(after, u, d, s)
        weights.append(new)
        momenta.append(after)
    return weights, momenta


def _subtract(total: Tensor, u: Tensor, d: Tensor, share: Tensor) -> None:
    """``sum_i share_i u_i^T d_i`` from a matrix, the shared deltas alone from a vector; in place."""
    if total.dim() == 3:
        total.sub_((share[..., None] * d).sum(-2))
        return
    # A view of both leading axes as one: whatever is large was made just now, and is contiguous.
    total.flatten(0, 1).baddbmm_((share[..., None] * u).flatten(0, 1).mT, d.flatten(0, 1), alpha=-1)


def written(network: str | Network, state: Lazy, rows: Tensor, starts: Tensor) -> Lazy:
    """The state with weights and momenta written in ``rows``, of which those in ``starts`` begin a chunk.

    Both bool ``[B]`` and on the CPU: what is to be done is decided here, outside all compiled code.
    """
    net = parsed(network, "l2")[0]
    weights, momenta = current(net, state)
    state = _emptied(state, rows, weights, momenta)
    if not bool(starts.any()):
        return state
    # Never the weights themselves: two inputs of a compiled region that are one tensor would be a variant of their own.
    every = bool(starts.all())
    anchor = [w.clone() for w in state.weights] if every else _rows(starts, state.weights, state.anchor)
    return state._replace(anchor=anchor, norms=_norms(net, anchor) if state.norms.shape[-1] else state.norms)


def restarted(state: Lazy, rows: Tensor, weights: list[Tensor]) -> Lazy:
    """The state with other weights and no momenta in ``rows`` (bool ``[B]``, on the CPU), which begin a document."""
    return _emptied(state, rows, weights, [torch.zeros_like(x) for x in state.momenta])


def _emptied(state: Lazy, rows: Tensor, weights: list[Tensor], momenta: list[Tensor]) -> Lazy:
    there = rows.to(state.ends.device)[:, None, None]
    return state._replace(
        weights=_rows(rows, weights, state.weights),
        momenta=_rows(rows, momenta, state.momenta),
        shares=torch.where(there[..., None], 0.0, state.shares),
        ends=torch.where(there, _clear(state.ends), state.ends),
    )


def lazy_step(
    network: str | Network,
    objective: str | Objective,
    read: str,
    chunk: int,
    bounded: bool,
    state: Lazy,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    log_momentum: Tensor,
    log_keep: Tensor,
    position: Tensor,
) -> tuple[Tensor, Lazy]:
    """One token a row: ``(y, state')``, as :func:`~titans_graph.kernels.memory.memory_step` but without writing weights.

    q, k, v ``[B, H, 1, d]``, gates ``[B, H, 1]``, position ``[B, 1]``. Rows that are :func:`due` have been
    :func:`written`. Only the ring, ``shares`` and ``ends`` are new in ``state'``; the other tensors are those of ``state``.
    """
    net, goal = parsed(network, objective)
    heads, names, dtype = q.shape[1], _names(net), state.shares.dtype
    at = dict(zip(names, (x.flatten(0, 1) for x in state.anchor), strict=True))
    q1, k1, v1 = (x.flatten(0, 1).to(dtype) for x in (q, k, v))
    theta, eta, keep = (x.flatten(0, 1).to(dtype) for x in (step, log_momentum.exp(), log_keep.exp()))
    if bounded:
        bound = bound_of(net, state.norms.flatten(0, 1), at, k1)
        theta = theta / (bound if bound.dim() == 2 else bound[:, None])
    trace = trace_keys(net, goal, at, k1, v1)
    slots = torch.arange(state.shares.shape[-1], device=q.device)
    here = (slots == position % chunk % slots.shape[0]).repeat_interleave(heads, 0)
    (w, s), (a0, f, e0) = state.shares.flatten(0, 1).unbind(1), state.ends.flatten(0, 1)[..., None].unbind(1)
    s, e0 = torch.where(here, theta, eta * s), eta * e0
    new = _Ring(
        net,
        _put(here, state.inputs, _in_order(net, trace.inputs, k1)),
        _put(here, state.deltas, _in_order(net, trace.deltas, k1)),
        (keep * w + s, keep * a0, keep * f + e0),
        {n: (m.flatten(0, 1), x.flatten(0, 1)) for n, m, x in zip(names, state.weights, state.momenta, strict=True)},
    )
    use = PlainUse(at) if read == "chunk" else new if read == "after" else new.before((w, a0, f))
    y = net.apply(q1, use).to(q.dtype).view(q.shape)
    after = state._replace(
        inputs=[x.view(o.shape) for x, o in zip(new.inputs, state.inputs, strict=True)],
        deltas=[x.view(o.shape) for x, o in zip(new.deltas, state.deltas, strict=True)],
        shares=torch.stack([new.shares[0], s], 1).view(state.shares.shape),
        ends=torch.cat([*new.shares[1:], e0], 1).view(state.ends.shape),
    )
    return y, after


class _Ring:
    """The query pass: every use reads weights that are formed from those last written and the ring's pairs."""

    def __init__(
        self,
        network: Network,
        inputs: list[Tensor],
        deltas: list[Tensor],
        shares: tuple[Tensor, Tensor, Tensor],
        written: dict[str, tuple[Tensor, Tensor]],
    ) -> None:
        self.network, self.inputs, self.deltas, self.shares, self.written = network, inputs, deltas, shares, written

    def before(self, shares: tuple[Tensor, Tensor, Tensor]) -> _Ring:
        """The same ring with the shares from before the token, whose own pair then counts nothing."""
        return _Ring(self.network, self.inputs, self.deltas, shares, self.written)

    def _pairs(self, name: str) -> list[tuple[Tensor, Tensor]]:
        uses = zip(self.network.uses(0), self.inputs, self.deltas, strict=True)
        return [(u, d) for use, u, d in uses if use == name]

    def linear(self, name: str, u: Tensor) -> Tensor:
        (weight, momentum), (w, a0, f) = self.written[name], (x[:, None] for x in self.shares)
        z = a0 * torch.bmm(u, weight) + f * torch.bmm(u, momentum)
        for source, delta in self._pairs(name):
            z = z - torch.bmm(w * torch.bmm(u, source.mT), delta)
        return z

    def vector(self, name: str) -> Tensor:
        (weight, momentum), (w, a0, f) = self.written[name], self.shares
        value = (a0 * weight + f * momentum)[:, None]
        for _, delta in self._pairs(name):
            value = value - torch.bmm(w[:, None], delta)
        return value


def _names(network: Network) -> list[str]:
    """The fast weights in the order of their first use, which is that of all lists."""
    return list(dict.fromkeys(network.uses(0)))


def _in_order(network: Network, found: dict[str, list[Tensor]], like: Tensor) -> list[Tensor]:
    """What a key pass noted by name, in the order of uses; nothing for the input of a vector."""
    waiting = {name: iter(values) for name, values in found.items()}
    return [next(waiting[name], like[..., :0]) for name in network.uses(0)]


def _put(here: Tensor, old: Sequence[Tensor], new: list[Tensor]) -> list[Tensor]:
    """``new`` ``[N, 1, ...]`` where it belongs in the ring, ``here`` ``[N, R]``."""
    return [torch.where(here[..., None], n, o.flatten(0, 1)) for n, o in zip(new, old, strict=True)]


def _norms(network: Network, anchor: list[Tensor]) -> Tensor:
    flat = dict(zip(_names(network), (x.flatten(0, 1) for x in anchor), strict=True))
    norms = weight_norms(network, flat)
    return norms.view(*anchor[0].shape[:2], norms.shape[-1])


def _clear(ends: Tensor) -> Tensor:
    """a0 = 1, f = 0, e0 = 1."""
    return torch.stack([torch.ones_like(ends[..., 0]), torch.zeros_like(ends[..., 0]), torch.ones_like(ends[..., 0])], -1)


def _rows(rows: Tensor, new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    if bool(rows.all()):
        return new
    there = rows.to(old[0].device)
    return [torch.where(there.view(-1, *[1] * (n.dim() - 1)), n, o) for n, o in zip(new, old, strict=True)]
