"""The gated feed-forward layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from titans_graph.registry import Component, Port, Site, parameter
from titans_graph.shapes import Value


class SwiGLU(Component, nn.Module):
    """``(silu(x W_gate) * x W_up) W_down`` on every piece alike (Shazeer, arXiv 2002.05202)."""

    @dataclass(frozen=True)
    class Parameters:
        """Size of the hidden layer."""

        hidden: int | None = parameter(
            None,
            doc="hidden features; null: 8/3 of the input's, rounded up to a multiple of 8",
            reason="8/3 keeps the weights of an ungated layer four times as wide; multiples of 8 fill tensor cores",
            minimum=1,
        )

    inputs = (Port("x", "features to transform", accepts="sequence"),)
    outputs = (Port("out", "transformed features"),)

    @classmethod
    def infer(cls, site: Site) -> dict[str, Value]:
        """The input's own type."""
        site.features("x")
        return {"out": site.value("x")}

    @classmethod
    def hidden(cls, site: Site) -> int:
        """How many hidden features the layer has."""
        chosen: int | None = site.parameters.hidden
        return chosen or 8 * -(-site.features("x") // 3)

    @classmethod
    def flops(cls, site: Site) -> float:
        """Three matrix products per timed piece."""
        return 6.0 * site.features("x") * cls.hidden(site) * sum(p.timed for p in site.value("x").pieces)

    def __init__(self, site: Site) -> None:
        super().__init__()
        dim, hidden = site.features("x"), self.hidden(site)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Each piece ``[B, T, dim]`` or ``[n, dim]`` -> the same shape."""
        if isinstance(x, Tensor):
            return self.map(x)
        return tuple(self.map(piece) for piece in x)

    def map(self, x: Tensor) -> Tensor:
        """One piece."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        mapped: Tensor = self.down(F.silu(gate) * up)
        return mapped
