"""The sum of streams: a residual connection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from titans_graph.registry import Component, Port, Site, SiteError
from titans_graph.shapes import Value, stream


class Add(Component, nn.Module):
    """The sum of two or more streams ``[B, T, dim]``."""

    @dataclass(frozen=True)
    class Parameters:
        """None."""

    inputs = (Port("x", "the streams to add", many=True),)
    outputs = (Port("out", "their sum"),)

    @classmethod
    def infer(cls, site: Site) -> dict[str, Value]:
        """The common type; a SiteError where fewer than two streams meet or their sizes differ."""
        values = site.inputs.get("x", ())
        if len(values) < 2:
            raise SiteError(f"add needs at least two streams, got {len(values)}", key="x", help="write in: [a, b]")
        first = values[0]
        for other in values[1:]:
            if other.dim != first.dim:
                raise SiteError(f"cannot add {first.text()} and {other.text()}: their last sizes differ", key="x")
        return {"out": stream(site.features("x"), "out")}

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        """Streams ``[B, T, dim]`` -> their sum."""
        total = x[0]
        for term in x[1:]:
            total = total + term
        return total
