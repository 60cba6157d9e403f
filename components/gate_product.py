"""The paper's gate between two branches (section 4.2 and eq. 28 of arXiv 2501.00663)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_graph.registry import Component, Port, Site, SiteError, parameter
from titans_graph.shapes import Value, stream

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}


class ProductGate(Component, nn.Module):
    """``f(norm(a)) * f(norm(b))``, each branch normalised with a learned vector.

    "We normalize the outputs y and M(x) using learnable vector-valued weights, followed by a non-linearity" (section
    4.2). Two streams ``[B, T, dim]`` -> ``[B, T, dim]``.
    """

    @dataclass(frozen=True)
    class Parameters:
        """The nonlinearity and the norm."""

        nonlinearity: str = parameter(
            "silu",
            doc="the function on each normalised branch",
            reason="the paper leaves it open here and uses SiLU wherever it names one (section 4.4)",
            choices=("silu", "sigmoid", "tanh", "none"),
        )
        eps: float = parameter(1e-6, doc="added to the mean square in the norms", reason="as in norm.rms", minimum=0.0)

    inputs = (Port("x", "the two branches, e.g. attention and memory", many=True),)
    outputs = (Port("out", "the gated stream"),)

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
        dim = site.features("x")
        self.eps: float = site.parameters.eps
        self.nonlinearity = NONLINEARITIES.get(site.parameters.nonlinearity)
        self.gain_a = nn.Parameter(torch.ones(dim))
        self.gain_b = nn.Parameter(torch.ones(dim))

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        """Two streams ``[B, T, dim]`` -> their gated product."""
        a, b = x
        return self.branch(a, self.gain_a) * self.branch(b, self.gain_b)

    def branch(self, x: Tensor, gain: Tensor) -> Tensor:
        """One branch, normalised and squashed."""
        y = F.rms_norm(x, gain.shape, eps=self.eps) * gain
        return y if self.nonlinearity is None else self.nonlinearity(y)
