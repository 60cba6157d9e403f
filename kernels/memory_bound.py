"""How much a memory's stable step shrinks when its weights grow.

For ``||f(k) - v||^2`` the curvature along a token is twice the squared length of the Jacobian of f by all weights. For
a linear memory that is ``|k|^2``; for an MLP the other layers' gains multiply it (sum over layers of the product of
their squared norms); for any graph of nodes it is derived from the graph (``Network.curvature``). Dividing the step by that
bound makes one step rule serve every network.

The norms come from chunk-start weights alone, and the gains of normalisations from the token's own key as well, so the
bound is causal and the same in streaming. Norms are *upper* bounds: ``(trace G^16)^(1/32)`` of the smaller Gram matrix, by
repeated squaring, is never below the spectral norm and at most n^(1/32) above it (14 % at n = 64), where a few power
iterations may fall below. The bound is a control, not a signal: it is detached, so training cannot trade accuracy for a
larger step through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from titans_graph.kernels.networks import Network, PlainUse

SQUARINGS = 3
"""How often the Gram matrix is squared before its Frobenius norm is taken: exponent 2^(SQUARINGS + 1)."""


def spectral_bound(weight: Tensor) -> Tensor:
    """Upper bounds of the spectral norms of matrices ``[..., in, out]``: ``[...]``. Zero matrices give about 1e-18."""
    dtype = weight.dtype
    if dtype.itemsize < 4:  # Squares of squares leave the range of half precision.
        weight = weight.float()
    wide = weight.shape[-1] > weight.shape[-2]
    gram = weight @ weight.mT if wide else weight.mT @ weight
    log_scale = torch.zeros_like(gram[..., 0, 0])
    power = 1.0
    for _ in range(SQUARINGS):
        size = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True).clamp_min(1e-36)
        log_scale = log_scale + size[..., 0, 0].log() / power
        gram = gram / size
        gram = gram @ gram
        power *= 2
    last = torch.linalg.vector_norm(gram, dim=(-2, -1)).clamp_min(1e-36)
    bound: Tensor = ((log_scale + last.log() / power) / 2).exp()
    return bound.to(dtype)


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "spectral": spectral_bound,
    "length": lambda vector: torch.linalg.vector_norm(vector, dim=-1),
    "largest": lambda vector: vector.abs().amax(-1),
}
"""The norms of fast weights by name: ``[N, in, out]`` or ``[N, size]`` to ``[N]``."""


def weight_norms(network: Network, weights: Mapping[str, Tensor]) -> Tensor:
    """The norm of every fast weight that bounds are made from, detached: ``[N, W]`` in the order of ``network.measures``."""
    return torch.stack([MEASURES[how](weights[name].detach()) for name, how in network.measures().items()], -1)


def bound_of(network: Network, norms: Tensor, weights: Mapping[str, Tensor], keys: Tensor) -> Tensor:
    """:func:`step_bound` from the ``norms`` of the weights, which one chunk keeps."""
    fixed = {name: weight.detach() for name, weight in weights.items()}
    named = dict(zip(network.measures(), norms.unbind(-1), strict=True))
    gains: dict[str, Tensor] = {}
    if network.local():
        gains = network.local_gains(keys.detach(), PlainUse(fixed))
        named = {name: norm[:, None] for name, norm in named.items()}
    return network.curvature(named, keys.shape[-1], gains).clamp_min(1.0)


def step_bound(network: Network, weights: Mapping[str, Tensor], keys: Tensor) -> Tensor:
    """By how much the step must be divided: ``[N]``, or ``[N, C]`` where it depends on the token; at least 1, detached.

    ``weights`` ``{name: [N, in, out] | [N, size]}``, ``keys`` ``[N, C, d]``. Never below 1: where weights collapse the
    Gauss-Newton curvature vanishes but that of the residual does not. A norm after a fast weight has no finite gain for
    all tokens, so its gain is taken at each token's own key, from one more pass of the network over the keys.
    """
    return bound_of(network, weight_norms(network, weights), weights, keys)


def bounded_step(network: Network, weights: Mapping[str, Tensor], keys: Tensor, step: Tensor) -> Tensor:
    """``step`` ``[N, C]`` divided by :func:`step_bound`."""
    bound = step_bound(network, weights, keys)
    return step / (bound if bound.dim() == 2 else bound[:, None])
