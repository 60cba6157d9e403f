"""How much a memory's stable step shrinks when its weights grow.

For ``||f(k) - v||^2`` the curvature along a token is twice the squared length of the Jacobian of f by all weights. For
a linear memory that is ``|k|^2``; for an MLP the other layers' gains multiply it (sum over layers of the product of
their squared norms). Dividing the step by that bound makes one step rule serve every network.

The norms come from chunk-start weights alone, so the bound is causal and the same in streaming. They are *upper*
bounds: ``(trace G^16)^(1/32)`` of the smaller Gram matrix, by repeated squaring, is never below the spectral norm and
at most n^(1/32) above it (14 % at n = 64), where a few power iterations may fall below. The bound is a control, not a
signal: it is detached, so training cannot trade accuracy for a larger step through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from titans_graph.kernels.networks import Network

SQUARINGS = 3
"""How often the Gram matrix is squared before its Frobenius norm is taken: exponent 2^(SQUARINGS + 1)."""


def spectral_bound(weight: Tensor) -> Tensor:
    """Upper bounds of the spectral norms of matrices ``[..., in, out]``: ``[...]``. Zero matrices give about 1e-18."""
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
    return bound


def step_bound(network: Network, weights: Mapping[str, Tensor]) -> Tensor:
    """By how much the step must be divided, per row: ``{name: [N, in, out] | [N, size]} -> [N]``, at least 1, detached.

    Never below 1: where weights collapse the Gauss-Newton curvature vanishes but that of the residual does not.
    """
    norms = {}
    for name, weight in weights.items():
        fixed = weight.detach()
        norms[name] = spectral_bound(fixed) if fixed.dim() == 3 else fixed.abs().amax(-1)
    return network.curvature(norms).clamp_min(1.0)
