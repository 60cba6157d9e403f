"""One chunk of a neural memory in exact parallel form: no weight and no gradient per token is ever stored.

All gradients of a chunk are taken at its first weights (the anchor), so the per-token gradient of a product ``u W`` is
the outer product of its input u_i and its delta_i, and everything the recurrence does with it is a weighting known from
the gates. With A(t,j) and E(t,j) the products of keep and momentum over j+1..t, and V marking valid slots,

    W = A V E diag(theta),   a0 = A(., 0),   f = A V E(., 0)
    u M_t  =  a0 (u M) + f (u S) - (W * u U^T) D                 (equations 13-15 of arXiv 2501.00663)

so any network that touches fast weights only by products and broadcast vectors runs unchanged on the queries with each
use replaced by that formula. An invalid slot has gates 1 and is left out of the middle sum: an exact identity.

Products and sums are separate operations on purpose: ``torch.baddbmm`` copies what it adds to, where Inductor fuses a sum
into the elementwise work that follows it anyway (forward took a tenth longer with it).

Shapes: ``N`` rows (batch times heads), ``C`` slots of the chunk, ``d`` key size; fast weights ``[N, *shape]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from titans_graph.kernels.memory_bound import bounded_step
from titans_graph.kernels.memory_objectives import Objective
from titans_graph.kernels.memory_products import scaled
from titans_graph.kernels.networks import Network, PlainUse
from titans_graph.kernels.undisturbed import unhooked

Named = dict[str, Tensor]
Product = Callable[[Tensor, Tensor], Tensor]


class Mixing(NamedTuple):
    """How the chunk's deltas and first values enter each slot's weights, and the values after the chunk.

    ``deltas`` W ``[N, C, C]``, ``weights`` a0 and ``momenta`` f ``[N, C, 1]`` for the weights that slot t reads; for
    the chunk's end ``last`` (W's last row) and ``surprise`` (the same for S) ``[N, C, 1]``, and the scalars
    ``[N, 1, 1]``.
    """

    deltas: Tensor
    weights: Tensor
    momenta: Tensor
    last: Tensor
    surprise: Tensor
    end_weights: Tensor
    end_momenta: Tensor
    end_surprise: Tensor


class Trace(NamedTuple):
    """The key pass: for every name its inputs ``U`` (none for vectors) and deltas ``D`` ``[N, C, out]``, use by use."""

    inputs: dict[str, list[Tensor]]
    deltas: dict[str, list[Tensor]]


def products(log_gates: Tensor) -> Tensor:
    """exp of all segment sums: ``[..., C] -> [..., C, C + 1]``, entry (t, j) the product over j+1..t, 0 where j > t.

    Column 0 is the chunk's boundary. Each sum is summed on its own (a cumulative sum of masked rows), never as a
    difference of two: exact for any gate, and log 0 = -inf gives exact zeros with finite gradients.
    """
    size = log_gates.shape[-1]
    t = torch.arange(1, size + 1, device=log_gates.device)[:, None]
    j = torch.arange(size + 1, device=log_gates.device)
    terms = torch.where(t > j, log_gates[..., None], 0.0)
    return torch.where(t >= j, terms.cumsum(-2).exp(), 0.0)


def mixing(read: str, step: Tensor, log_momentum: Tensor, log_keep: Tensor, valid: Tensor) -> Mixing:
    """The chunk's mixing from gates and ``valid`` (bool), all ``[N, C]``; with read ``"chunk"`` for its last slot alone."""
    gates = torch.where(valid, torch.stack([log_keep, log_momentum]), 0.0)
    keep, momentum = products(gates).unbind(0)
    theta = torch.where(valid, step, 0.0)
    if read == "chunk":  # Nothing is read from the weights in between.
        keep = keep[:, -1:]
    middle = torch.bmm(keep[..., 1:], torch.where(valid[..., None], momentum, 0.0))
    deltas, share = middle[..., 1:] * theta[:, None, :], middle[..., :1]
    decay = keep[..., :1]
    last, surprise = deltas[:, -1, :, None], (momentum[:, -1, 1:] * theta)[..., None]
    ends = decay[:, -1:], share[:, -1:], momentum[:, -1:, :1]
    if read == "before":
        none = torch.zeros_like(share[:, :1])
        deltas = torch.cat([torch.zeros_like(deltas[:, :1]), deltas[:, :-1]], 1)
        decay, share = torch.cat([none + 1, decay[:, :-1]], 1), torch.cat([none, share[:, :-1]], 1)
    return Mixing(deltas, decay, share, last, surprise, *ends)


class _KeyUse:
    """The key pass: every use gets a zero leaf added, whose gradient is the delta, and its input is noted."""

    def __init__(self, weights: Named, leaves: dict[str, list[Tensor]], product: Product) -> None:
        self.weights, self.leaves, self.product = weights, leaves, product
        self.inputs: dict[str, list[Tensor]] = {name: [] for name in weights}
        self.count = dict.fromkeys(weights, 0)

    def _leaf(self, name: str) -> Tensor:
        self.count[name] += 1
        return self.leaves[name][self.count[name] - 1]

    def linear(self, name: str, u: Tensor) -> Tensor:
        self.inputs[name].append(u)
        return self.product(u, self.weights[name]) + self._leaf(name)

    def vector(self, name: str) -> Tensor:
        return self.weights[name].unsqueeze(-2) + self._leaf(name)


class _QueryUse:
    """The query pass: every use reads the weights of its slot, formed from first values and deltas."""

    def __init__(self, weights: Named, momenta: Named, mix: Mixing, trace: Trace) -> None:
        self.weights, self.momenta, self.mix, self.trace = weights, momenta, mix, trace

    def linear(self, name: str, u: Tensor) -> Tensor:
        weight, momentum, mix = self.weights[name], self.momenta[name], self.mix
        if weight.shape[-2] <= weight.shape[-1]:
            # Rows are scaled on the narrower side of the product.
            z = torch.bmm(mix.weights * u, weight) + torch.bmm(mix.momenta * u, momentum)
        else:
            z = scaled(mix.weights, u, weight) + scaled(mix.momenta, u, momentum)
        for source, delta in zip(self.trace.inputs[name], self.trace.deltas[name], strict=True):
            z = z - torch.bmm(mix.deltas * torch.bmm(u, source.mT), delta)
        return z

    def vector(self, name: str) -> Tensor:
        value = self.mix.weights * self.weights[name].unsqueeze(-2)
        value = value + self.mix.momenta * self.momenta[name].unsqueeze(-2)
        for delta in self.trace.deltas[name]:
            value = value - torch.bmm(self.mix.deltas, delta)
        return value


def trace_keys(
    network: Network, objective: Objective, anchor: Named, k: Tensor, v: Tensor, product: Product = torch.bmm
) -> Trace:
    """Run the network on the keys ``[N, C, d]`` at the anchor and take one vector-Jacobian product for all deltas."""
    uses = network.uses(k.shape[-1])
    leaves: dict[str, list[Tensor]] = {name: [] for name in anchor}
    for name in uses:
        leaves[name].append(k.new_zeros(*k.shape[:-1], anchor[name].shape[-1]))

    def total(leaves: dict[str, list[Tensor]]) -> tuple[Tensor, dict[str, list[Tensor]]]:
        use = _KeyUse(anchor, leaves, product)
        loss = objective.loss(network.apply(k, use), v)
        return loss, use.inputs

    def traced() -> Trace:
        # The third result exists with has_aux alone, which the annotation of vjp does not tell.
        loss, pull, inputs = cast("tuple[Any, ...]", torch.func.vjp(total, leaves, has_aux=True))
        (deltas,) = pull(torch.ones_like(loss))
        return Trace(inputs, deltas)

    return unhooked(traced)


def _end(mix: Mixing, trace: Trace, name: str, weight: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
    """M and S after the chunk for one fast weight: weighted outer products of inputs and deltas."""
    if weight.dim() == 2:
        end = mix.end_weights * weight.unsqueeze(-2) + mix.end_momenta * momentum.unsqueeze(-2)
        end_momentum = mix.end_surprise * momentum.unsqueeze(-2)
        for delta in trace.deltas[name]:
            end = end - torch.bmm(mix.last.mT, delta)
            end_momentum = end_momentum - torch.bmm(mix.surprise.mT, delta)
        return end.squeeze(-2), end_momentum.squeeze(-2)
    end = mix.end_weights * weight + mix.end_momenta * momentum
    end_momentum = mix.end_surprise * momentum
    for source, delta in zip(trace.inputs[name], trace.deltas[name], strict=True):
        end = end - _outer(mix.last, source, delta)
        end_momentum = end_momentum - _outer(mix.surprise, source, delta)
    return end, end_momentum


def _outer(share: Tensor, source: Tensor, delta: Tensor) -> Tensor:
    """``source^T (share * delta)``, with the shares ``[N, C, 1]`` on the narrower of the two."""
    if source.shape[-1] <= delta.shape[-1]:
        return torch.bmm((share * source).mT, delta)
    return torch.bmm(source.mT, share * delta)


class Form(NamedTuple):
    """The static side of a memory: what is computed, apart from all tensors."""

    network: Network
    objective: Objective
    read: str
    bounded: bool


def step_scale(form: Form, anchor: list[Tensor], k: Tensor) -> Tensor:
    """What the step of every token is multiplied by where the form is bounded: ``[N, C]``, at most 1, detached.

    ``anchor``: the chunk's first weights; keys ``[N, C, d]``.
    """
    names = list(form.network.weights(k.shape[-1]))
    return bounded_step(form.network, dict(zip(names, anchor, strict=True)), k, torch.ones_like(k[..., 0]))


def memory_chunk(
    form: Form,
    anchor: list[Tensor],
    weights: list[Tensor],
    momenta: list[Tensor],
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    log_momentum: Tensor,
    log_keep: Tensor,
    valid: Tensor,
    product: Product,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """One chunk, or the rest of one: ``(y [N, C, d], weights', momenta')``, equations 8-18.

    ``anchor`` holds the chunk's first weights, ``weights`` and ``momenta`` the values just before the first valid slot;
    they differ from the anchor where the chunk is resumed in the middle. q, k, v ``[N, C, d]``, gates and ``valid``
    ``[N, C]``; the step is used as given. Without q nothing is read and y is None. Outputs at invalid slots are finite
    where the inputs are. ``product`` multiplies what is worth keeping for backward
    (:class:`~titans_graph.kernels.memory_products.Products`).
    """
    names = list(form.network.weights(k.shape[-1]))
    at, now, moving = (dict(zip(names, values, strict=True)) for values in (anchor, weights, momenta))
    mix = mixing("chunk" if q is None else form.read, step, log_momentum, log_keep, valid)
    trace = trace_keys(form.network, form.objective, at, k, v, product)
    y = None
    if q is not None:
        y = form.network.apply(q, PlainUse(at) if form.read == "chunk" else _QueryUse(now, moving, mix, trace))
    ends = [_end(mix, trace, name, now[name], moving[name]) for name in names]
    return y, [end[0] for end in ends], [end[1] for end in ends]
