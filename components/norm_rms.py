"""Root-mean-square norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_graph.registry import Component, Port, Site, parameter
from titans_graph.shapes import Value


class RMSNorm(Component, nn.Module):
    """``x / sqrt(mean(x^2) + eps) * gain`` over the features of every piece (Zhang and Sennrich, arXiv 1910.07467)."""

    @dataclass(frozen=True)
    class Parameters:
        """The only number of the norm."""

        eps: float = parameter(
            1e-6, doc="added to the mean square", reason="convention of LLaMA; keeps a zero vector finite", minimum=0.0
        )

    inputs = (Port("x", "features to normalise", accepts="sequence"),)
    outputs = (Port("out", "normalised features"),)

    @classmethod
    def infer(cls, site: Site) -> dict[str, Value]:
        """The input's own type."""
        site.features("x")
        return {"out": site.value("x")}

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.eps: float = site.parameters.eps
        self.gain = nn.Parameter(torch.ones(site.features("x")))

    def forward(self, x: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Each piece ``[B, T, dim]`` or ``[n, dim]`` -> the same shape."""
        if isinstance(x, Tensor):
            return self.norm(x)
        return tuple(self.norm(piece) for piece in x)

    def norm(self, x: Tensor) -> Tensor:
        """One piece."""
        return F.rms_norm(x, self.gain.shape, eps=self.eps) * self.gain
