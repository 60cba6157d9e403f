"""Decoding lazily: inside a chunk the weights and momenta of every token are known without being written.

One token changes M and S by outer products of what went into each fast weight and its delta (:mod:`memory_chunk`). So
the last few tokens are kept as such pairs, and M_t and S_t are written once for all of them:

    M_t = a0 M + f S - sum_i w_i u_i^T d_i          S_t = e0 S - sum_i s_i u_i^T d_i

with M and S as last written. A token multiplies s and e0 by its momentum, puts its step where its pair stands in s, and
then w <- keep w + s, f <- keep f + e0, a0 <- keep a0. Reading costs one product with M, one with S and a few with the pairs;
the update of every token would read and write all of M and S.

The way of a token. :func:`ready` runs before it, outside all compiled code, and knows every row's place on the host: rows
that begin a document get their first weights; where the ring is full, or all rows begin a chunk, M and S are written and the
ring is empty again; rows that begin a chunk get M_t as their anchor. :func:`lazy_step` then reads nothing on the host: it
takes the pair into the ring at ``slot`` and answers. The pairs do not care where a chunk begins, so all rows share one slot
however far apart they stand: M and S are written every :data:`SLOTS` tokens, never for one row's sake.

A state is a value, so the pairs are copied at every token, and M, S and the anchor at no token but those above. (Pairs that
are changed in place would need an owner: two continuations of one state would write into the same slot.) A short ring is
cheap to copy, a long one seldom written out; :data:`SLOTS` is where the sum is least: measured on a processor, and counted in
bytes on a GPU (docs/kernels.md). What a chunk decides once, the norms of its first weights for the bound of the step, is kept
beside it.

``kernel``: ``triton`` for the operators of :mod:`memory_decode`, which take the same tensors, or ``portable``. A model in half
precision reads on a GPU from copies of anchor, M and S in its own type: reading is most of what a token takes there, and half
of it so. What is written, and all that is added up over tokens, stays float32; the copies are made anew from that.

Shapes: ``B`` batch, ``H`` heads, ``N`` = B * H rows, ``R`` slots of the ring, ``W`` fast weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_graph.kernels.memory import parsed
from titans_graph.kernels.memory_bound import bound_of, weight_norms
from titans_graph.kernels.memory_chunk import trace_keys
from titans_graph.kernels.memory_decode import decode_step, decode_write
from titans_graph.kernels.memory_objectives import Objective
from titans_graph.kernels.networks import Network, PlainUse
from titans_graph.kernels.precision import without_autocast

SLOTS = 16
"""Tokens after which weights and momenta are written."""


class Lazy(NamedTuple):
    """A memory between two writings of its weights, all tensors but ``slot`` ``[B, H, ...]``.

    ``anchor``: the chunk's first weights, where gradients are taken; ``weights`` M and ``momenta`` S as last written; each
    one tensor a fast weight. ``inputs`` u ``[.., R, in]`` (size 0 for a vector, which has none) and ``deltas`` d ``[.., R,
    out]``: one tensor for every *use* of a weight, in the order of ``network.uses``. ``shares`` ``[.., 2, R]``: w and s of
    the pairs, 0 for an empty slot. ``ends`` ``[.., 3]``: a0, f and e0. ``slot`` int64 ``[B]``: where the next pair goes,
    the same in all rows. ``norms`` ``[.., W]``: those of the anchor. ``shares``, ``ends`` and ``norms`` are float32 at
    least: half precision cannot tell a keep of 0.998 from 1. ``copies``: anchor, weights and momenta, one list after the
    other, in the type that the Triton kernels read them in; empty where that is their own.
    """

    anchor: list[Tensor]
    weights: list[Tensor]
    momenta: list[Tensor]
    inputs: list[Tensor]
    deltas: list[Tensor]
    shares: Tensor
    ends: Tensor
    slot: Tensor
    norms: Tensor
    copies: Sequence[Tensor] = ()


def slots_of(chunk: int) -> int:
    """How many slots a ring has: never more than a chunk."""
    return min(SLOTS, chunk)


def begin(
    network: str | Network,
    chunk: int,
    bounded: bool,
    anchor: list[Tensor],
    weights: list[Tensor],
    momenta: list[Tensor],
    *,
    reads: torch.dtype | None = None,
) -> Lazy:
    """An empty ring over weights and momenta as they are; ``reads`` as in :func:`read_in`."""
    net = parsed(network, "l2")[0]
    lead, like = anchor[0].shape[:2], anchor[0]
    precise = torch.promote_types(like.dtype, torch.float32)
    inputs, deltas = [], []
    shapes = dict(zip(_names(net), (x.shape[2:] for x in weights), strict=True))
    for name in net.uses(0):
        shape = shapes[name]
        inputs.append(like.new_zeros(*lead, slots_of(chunk), shape[0] if len(shape) == 2 else 0))
        deltas.append(like.new_zeros(*lead, slots_of(chunk), shape[-1]))
    shares = like.new_zeros(*lead, 2, slots_of(chunk), dtype=precise)
    norms = _norms(net, anchor) if bounded else like.new_zeros(*lead, 0, dtype=precise)
    slot = like.new_zeros(lead[0], dtype=torch.int64)
    state = Lazy(anchor, weights, momenta, inputs, deltas, shares, _clear(shares.new_zeros(*lead, 3)), slot, norms)
    return read_in(state, reads)


def read_in(state: Lazy, reads: torch.dtype | None) -> Lazy:
    """The state with copies in the type ``reads``, and without any where that is no narrower than the state's own."""
    wanted = reads if reads is not None and reads.itemsize < state.weights[0].dtype.itemsize else None
    if wanted == (state.copies[0].dtype if state.copies else None):
        return state
    fast = () if wanted is None else (*state.anchor, *state.weights, *state.momenta)
    return state._replace(copies=[x.to(wanted) for x in fast])


def current(network: str | Network, state: Lazy, kernel: str = "portable") -> tuple[list[Tensor], list[Tensor]]:
    """M_t and S_t, written out."""
    if kernel == "triton":
        return decode_write(*_pairs_of(state))[:2]
    net, dtype = parsed(network, "l2")[0], state.weights[0].dtype
    (w, s), (a0, f, e0) = state.shares.to(dtype).unbind(-2), state.ends.to(dtype).unbind(-1)
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


def ready(
    network: str | Network,
    chunk: int,
    state: Lazy,
    taken: int,
    places: Sequence[int],
    initial: Sequence[Tensor],
    kernel: str = "portable",
) -> tuple[Lazy, int]:
    """The state for the tokens at ``places``, and how many pairs its ring holds; ``taken``: how many it held.

    Rows at 0 begin with the weights ``initial``, each expanded to ``[B, H, *shape]``.
    """
    starts = [place % chunk == 0 for place in places]
    if not any(starts) and taken < state.shares.shape[-1]:
        return state, taken
    if 0 in places:
        state = _restarted(state, torch.tensor([place == 0 for place in places], device="cpu"), list(initial))
    if taken and (taken == state.shares.shape[-1] or all(starts)):
        state, taken = written(network, state, kernel), 0
    return _anchored(network, state, starts, taken > 0, kernel), taken


def written(network: str | Network, state: Lazy, kernel: str = "portable") -> Lazy:
    """The state with weights and momenta of the last token, and an empty ring."""
    if kernel == "triton":
        weights, momenta, copies = decode_write(*_pairs_of(state), reads=state.copies[0].dtype if state.copies else None)
    else:
        weights, momenta = current(network, state, kernel)
        copies = [x.to(state.copies[0].dtype) for x in (*weights, *momenta)] if state.copies else []
    empty, clear, first = torch.zeros_like(state.shares), _clear(state.ends), torch.zeros_like(state.slot)
    kept = [*state.copies[: len(weights)], *copies]
    return state._replace(weights=weights, momenta=momenta, shares=empty, ends=clear, slot=first, copies=kept)


def _pairs_of(state: Lazy) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    """What M_t and S_t are made from."""
    return state.weights, state.momenta, state.inputs, state.deltas, state.shares, state.ends


def _restarted(state: Lazy, rows: Tensor, weights: list[Tensor]) -> Lazy:
    """With other weights, no momenta and no pairs in ``rows`` (bool ``[B]``, on the CPU), which begin a document."""
    there = rows.to(state.ends.device)[:, None, None]
    # The pairs as well: one of the document before that is not finite would not be, times a share of 0.
    clean = [[torch.where(there[..., None], 0.0, x) for x in values] for values in (state.inputs, state.deltas)]
    # Copies: where all rows restart these are the state, which must not be the model's parameters.
    weights = _rows(rows, [x.clone(memory_format=torch.contiguous_format) for x in weights], state.weights)
    momenta = _rows(rows, [torch.zeros_like(x) for x in state.momenta], state.momenta)
    return state._replace(
        weights=weights,
        momenta=momenta,
        inputs=clean[0],
        deltas=clean[1],
        shares=torch.where(there[..., None], 0.0, state.shares),
        ends=torch.where(there, _clear(state.ends), state.ends),
        copies=[x.to(c.dtype) for c, x in zip(state.copies, (*state.anchor, *weights, *momenta), strict=False)],
    )


def _anchored(network: str | Network, state: Lazy, starts: list[bool], pending: bool, kernel: str) -> Lazy:
    """With the weights of now as anchor in the rows that begin a chunk; ``pending``: there are pairs in the ring."""
    if not any(starts):
        return state
    net, bounded, count = parsed(network, "l2")[0], state.norms.shape[-1] > 0, len(state.weights)
    at, rest = state.copies[:count], state.copies[count:]
    # Never the weights themselves: two inputs of a compiled region that are one tensor would be a variant of their own.
    if all(starts) and not pending:
        anchor = [w.clone() for w in state.weights]
        copies = [*(c.clone() for c in rest[:count]), *rest]
        return state._replace(anchor=anchor, norms=_norms(net, anchor) if bounded else state.norms, copies=copies)
    index = torch.tensor([row for row, start in enumerate(starts) if start], device=state.slot.device)
    some = Lazy(*(_select(x, index) for x in state._replace(copies=[])))
    now = current(net, some, kernel)[0] if pending else some.weights
    pairs = (zip(old, now, strict=False) for old in (state.anchor, at))
    anchor, at = ([old.index_copy(0, index, new.to(old.dtype)) for old, new in pair] for pair in pairs)
    norms = state.norms.index_copy(0, index, _norms(net, now)) if bounded else state.norms
    return state._replace(anchor=anchor, norms=norms, copies=[*at, *rest])


def _select(x: Any, index: Tensor) -> Any:
    return [t.index_select(0, index) for t in x] if isinstance(x, list) else x.index_select(0, index)


def lazy_step(
    network: str | Network,
    objective: str | Objective,
    read: str,
    bounded: bool,
    state: Lazy,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    log_momentum: Tensor,
    log_keep: Tensor,
    kernel: str = "portable",
) -> tuple[Tensor, Lazy]:
    """One token a row: ``(y, state')``, as :func:`~titans_graph.kernels.memory.memory_step` but without writing weights.

    q, k, v ``[B, H, 1, d]``, gates ``[B, H, 1]``; the state is :func:`ready`. Only the ring, ``shares``, ``ends`` and
    ``slot`` are new in ``state'``; the other tensors are those of ``state``.
    """
    if kernel == "triton":
        assert isinstance(network, str)
        assert isinstance(objective, str)
        n, copies = len(state.weights), list(state.copies)
        fast = (copies[:n], copies[n : 2 * n], copies[2 * n :]) if copies else (state.anchor, state.weights, state.momenta)
        pairs, place = (state.inputs, state.deltas), (state.shares, state.ends, state.slot, state.norms)
        y, inputs, deltas, shares, ends, slot = decode_step(
            network, objective, read, bounded, *fast, *pairs, *place, q, k, v, step, log_momentum, log_keep
        )
        return y, state._replace(inputs=inputs, deltas=deltas, shares=shares, ends=ends, slot=slot)
    return _portable(q, k, v, (step, log_momentum, log_keep), state, *parsed(network, objective), read, bounded)


@without_autocast
def _portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, ...],
    state: Lazy,
    net: Network,
    goal: Objective,
    read: str,
    bounded: bool,
) -> tuple[Tensor, Lazy]:
    heads, names, dtype, precise = q.shape[1], _names(net), state.weights[0].dtype, state.shares.dtype
    at = dict(zip(names, (x.flatten(0, 1) for x in state.anchor), strict=True))
    q1, k1, v1 = (x.flatten(0, 1).to(dtype) for x in (q, k, v))
    step, log_momentum, log_keep = (x.to(precise).flatten(0, 1) for x in gates)
    theta, eta, keep = step, log_momentum.exp(), log_keep.exp()
    if bounded:
        bound = bound_of(net, state.norms.flatten(0, 1).to(dtype), at, k1)
        theta = theta / (bound if bound.dim() == 2 else bound[:, None])
    trace = trace_keys(net, goal, at, k1, v1)
    slots = torch.arange(state.shares.shape[-1], device=q.device)
    here = (slots == state.slot[:, None]).repeat_interleave(heads, 0)
    (w, s), (a0, f, e0) = state.shares.flatten(0, 1).unbind(1), state.ends.flatten(0, 1)[..., None].unbind(1)
    s, e0 = torch.where(here, theta, eta * s), eta * e0
    after = keep * w + s, keep * a0, keep * f + e0
    new = _Ring(
        net,
        _put(here, state.inputs, _in_order(net, trace.inputs, k1)),
        _put(here, state.deltas, _in_order(net, trace.deltas, k1)),
        _all_to(dtype, after),
        {n: (m.flatten(0, 1), x.flatten(0, 1)) for n, m, x in zip(names, state.weights, state.momenta, strict=True)},
    )
    use = PlainUse(at) if read == "chunk" else new if read == "after" else new.before(_all_to(dtype, (w, a0, f)))
    y = net.apply(q1, use).to(q.dtype).view(q.shape)
    return y, state._replace(
        inputs=[x.view(o.shape) for x, o in zip(new.inputs, state.inputs, strict=True)],
        deltas=[x.view(o.shape) for x, o in zip(new.deltas, state.deltas, strict=True)],
        shares=torch.stack([after[0], s], 1).view(state.shares.shape),
        ends=torch.cat([*after[1:], e0], 1).view(state.ends.shape),
        slot=state.slot + 1,
    )


def _all_to(dtype: torch.dtype, shares: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    w, a0, f = shares
    return w.to(dtype), a0.to(dtype), f.to(dtype)


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
    precise = torch.promote_types(anchor[0].dtype, torch.float32)
    flat = dict(zip(_names(network), (x.flatten(0, 1).to(precise) for x in anchor), strict=True))
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
