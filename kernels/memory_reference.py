"""The naive truth of the neural memory: one token after another, as the paper writes it (arXiv 2501.00663).

To be read beside equations 8-18. Slow on purpose; every faster form is tested against it, outputs and gradients.

Shapes: ``B`` batch, ``H`` heads, ``G`` slots, ``d`` key and value size; weights are lists ``[B, H, *shape]`` in the
order of ``network.weights``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans_graph.kernels.memory_bound import bounded_step
from titans_graph.kernels.memory_objectives import Objective, parse_objective
from titans_graph.kernels.networks import Network, PlainUse, parse_network
from titans_graph.kernels.undisturbed import unhooked

Weights = list[Tensor]


class State(NamedTuple):
    """Chunk-start weights (where gradients are taken), weights M and momenta S, all ``[B, H, *shape]``."""

    anchor: Weights
    weights: Weights
    momenta: Weights


def predict(network: Network, names: list[str], weights: Weights, x: Tensor) -> Tensor:
    """The memory M(x) of equation 15 for one token: ``x`` ``[B, H, d]`` -> ``[B, H, d]``."""
    use = PlainUse(dict(zip(names, weights, strict=True)))
    return network.apply(x.unsqueeze(-2), use).squeeze(-2)


def surprise(network: Network, objective: Objective, names: list[str], anchor: Weights, k: Tensor, v: Tensor) -> Weights:
    """The momentary surprise: the gradient of the loss (equation 12) by every weight, at the chunk's first weights.

    Rows and heads do not touch each other, so the gradient of the summed loss is each row's own gradient.
    """

    def loss(weights: Weights) -> Tensor:
        return objective.loss(predict(network, names, weights, k), v)

    gradient: Weights = unhooked(lambda: torch.func.grad(loss)(anchor))
    return gradient


def where_rows(rows: Tensor, new: Weights, old: Weights) -> Weights:
    """``new`` in the rows ``[B]`` that are true, ``old`` elsewhere."""
    return [torch.where(rows.view(-1, *[1] * (n.dim() - 1)), n, o) for n, o in zip(new, old, strict=True)]


def memory_reference(
    network: str,
    objective: str,
    read: str,
    chunk: int,
    bounded: bool,
    anchor: Weights,
    weights: Weights,
    momenta: Weights,
    initial_weights: Weights,
    initial_momenta: Weights,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    log_momentum: Tensor,
    log_keep: Tensor,
    valid: Tensor,
    position: Tensor,
) -> tuple[Tensor, Weights, Weights, Weights]:
    """Equations 9, 10 and 13-15, token by token; called as :func:`titans_graph.kernels.memory.memory_scan`.

    For every valid token t of a row:

        position == 0: the row restarts, M = M_initial, S = S_initial; position % chunk == 0: a chunk begins, anchor = M
        S_t = eta_t S_{t-1} - theta_t grad loss(anchor; k_t, v_t)          (equations 10 and 14)
        M_t = (1 - alpha_t) M_{t-1} + S_t                                   (equation 13)
        y_t = M*(q_t)                                                       (equation 15)

    with M* = M_t, M_{t-1} or the chunk's first weights for ``read`` after, before and chunk.
    """
    net, goal = parse_network(network), parse_objective(objective)
    names = list(net.weights(q.shape[-1]))
    state = State(anchor, weights, momenta)
    outputs = []
    for t in range(q.shape[2]):
        now, place = valid[:, t], position[:, t]
        first, start = now & (place % chunk == 0), now & (place == 0)
        before = where_rows(start, initial_weights, state.weights)
        old_momenta = where_rows(start, initial_momenta, state.momenta)
        at = where_rows(first, before, state.anchor)
        gates = step[:, :, t], log_momentum[:, :, t].exp(), log_keep[:, :, t].exp()
        theta, eta, keep = (torch.where(now[:, None], g, torch.zeros_like(g)) for g in gates)
        if bounded:
            flat = {n: w.flatten(0, 1) for n, w in zip(names, at, strict=True)}
            theta = bounded_step(net, flat, k[:, :, t].flatten(0, 1)[:, None], theta.reshape(-1, 1)).view_as(theta)
        gradient = surprise(net, goal, names, at, k[:, :, t], v[:, :, t])
        new_momenta = [_rows(eta, s) * s - _rows(theta, g) * g for s, g in zip(old_momenta, gradient, strict=True)]
        after = [_rows(keep, m) * m + s for m, s in zip(before, new_momenta, strict=True)]
        source = {"after": after, "before": before, "chunk": at}[read]
        y = predict(net, names, source, q[:, :, t])
        outputs.append(torch.where(now[:, None, None], y, torch.zeros_like(y)))
        state = State(*(where_rows(now, n, o) for n, o in zip((at, after, new_momenta), state, strict=True)))
    return torch.stack(outputs, 2), *state


def _rows(gate: Tensor, like: Tensor) -> Tensor:
    """A gate ``[B, H]`` shaped to multiply ``[B, H, *shape]``."""
    return gate.view(*gate.shape, *[1] * (like.dim() - 2))
