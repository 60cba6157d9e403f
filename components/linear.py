"""A learned linear map of features."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from titans_graph.registry import Component, Port, Site, parameter
from titans_graph.shapes import Value


class Linear(Component, nn.Module):
    """``x W^T (+ bias)`` on every piece alike: ``[B, T, in]`` or ``[n, in]`` -> ``[B, T, dim]`` or ``[n, dim]``."""

    @dataclass(frozen=True)
    class Parameters:
        """Size of the map."""

        dim: int | None = parameter(
            None,
            doc="features that leave; null: as many as enter",
            reason="fits where a norm or an MLP stood",
            minimum=1,
        )
        bias: bool = parameter(
            False, doc="whether a learned vector is added", reason="convention of LLaMA; norms make a shift superfluous"
        )

    inputs = (Port("x", "features to map", accepts="sequence"),)
    outputs = (Port("out", "mapped features"),)

    @classmethod
    def infer(cls, site: Site) -> dict[str, Value]:
        """The input's pieces with ``dim`` features."""
        return {"out": replace(site.value("x"), dim=site.parameters.dim or site.features("x"))}

    @classmethod
    def flops(cls, site: Site) -> float:
        """One matrix product per timed piece."""
        out = cls.infer(site)["out"]
        return 2.0 * site.features("x") * (out.dim or 0) * sum(p.timed for p in out.pieces)

    def __init__(self, site: Site) -> None:
        super().__init__()
        size = site.features("x")
        self.project = nn.Linear(size, site.parameters.dim or size, bias=site.parameters.bias)

    def forward(self, x: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Each piece ``[..., in]`` -> ``[..., dim]``."""
        if isinstance(x, Tensor):
            return self.map(x)
        return tuple(self.map(piece) for piece in x)

    def map(self, x: Tensor) -> Tensor:
        """One piece."""
        mapped: Tensor = self.project(x)
        return mapped
