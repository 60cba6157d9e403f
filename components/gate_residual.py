"""A branch added to another through a learned vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titans_graph.registry import Component, Port, Site, SiteError, parameter
from titans_graph.shapes import Value, stream


class ResidualGate(Component, nn.Module):
    """``a + vector * b`` with one learned number per feature. Two ``[B, T, dim]`` -> ``[B, T, dim]``."""

    @dataclass(frozen=True)
    class Parameters:
        """How the second branch starts."""

        initial: float = parameter(
            1.0,
            doc="initial value of the vector",
            reason="1: starts as the plain sum, so that it can take the place of `add`",
        )

    inputs = (Port("x", "the two branches, e.g. attention and memory", many=True),)
    outputs = (Port("out", "the joined stream"),)

    @classmethod
    def infer(cls, site: Site) -> dict[str, Value]:
        """The branches' common type; a SiteError where they are not two or differ in size."""
        values = site.inputs.get("x", ())
        if len(values) != 2:
            raise SiteError(f"a gate needs exactly two streams, got {len(values)}", key="x", help="write in: [a, b]")
        if values[0].dim != values[1].dim:
            raise SiteError(f"cannot gate {values[0].text()} and {values[1].text()}: their last sizes differ", key="x")
        return {"out": stream(site.features("x"), "out")}

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.full((site.features("x"),), float(site.parameters.initial)))

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        """Two streams ``[B, T, dim]`` -> the first plus the scaled second."""
        a, b = x
        return torch.addcmul(a, self.vector, b)
