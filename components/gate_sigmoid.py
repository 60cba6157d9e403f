"""A learned mix of two branches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titans_graph.registry import Component, Port, Site, SiteError, parameter
from titans_graph.shapes import Value, stream


class SigmoidGate(Component, nn.Module):
    """``g * a + (1 - g) * b`` with ``g = sigmoid(W [a, b] + bias)`` per feature. Two ``[B, T, dim]`` -> one."""

    @dataclass(frozen=True)
    class Parameters:
        """How the mix starts."""

        bias: float = parameter(
            0.0,
            doc="initial bias of the gate; large values favour the first branch",
            reason="0: an even mix at the start",
        )

    inputs = (Port("x", "the two branches, e.g. attention and memory", many=True),)
    outputs = (Port("out", "the mixed stream"),)

    @classmethod
    def infer(cls, site: Site) -> dict[str, Value]:
        """The branches' common type; a SiteError where they are not two or differ in size."""
        values = site.inputs.get("x", ())
        if len(values) != 2:
            raise SiteError(f"a gate needs exactly two streams, got {len(values)}", key="x", help="write in: [a, b]")
        if values[0].dim != values[1].dim:
            raise SiteError(f"cannot gate {values[0].text()} and {values[1].text()}: their last sizes differ", key="x")
        return {"out": stream(site.features("x"), "out")}

    @classmethod
    def flops(cls, site: Site) -> float:
        """One matrix product from both branches."""
        return 4.0 * site.features("x") ** 2

    def __init__(self, site: Site) -> None:
        super().__init__()
        dim = site.features("x")
        self.project = nn.Linear(2 * dim, dim)
        nn.init.constant_(self.project.bias, site.parameters.bias)

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        """Two streams ``[B, T, dim]`` -> their mix."""
        a, b = x
        g = torch.sigmoid(self.project(torch.cat([a, b], dim=-1)))
        return b + g * (a - b)
