"""Depthwise causal convolution along time (section 4.4 of arXiv 2501.00663 puts one after each of q, k and v)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titans_graph.kernels.convolution import short_convolution
from titans_graph.registry import Component, Port, Site, parameter
from titans_graph.shapes import Clock, Dependence, Value, stream


class CausalConv(Component, nn.Module):
    """``y_t = sum_j w_j * x_(t-j)``, j = 0 .. kernel - 1, within the document. ``[B, T, dim]`` -> ``[B, T, dim]``.

    State: ``tail [B, kernel - 1, dim]``, the last inputs.
    """

    @dataclass(frozen=True)
    class Parameters:
        """Reach of the convolution and how it starts."""

        kernel: int = parameter(
            4, doc="taps, this token's among them", reason="convention of H3, Mamba and GatedDeltaNet", minimum=2
        )
        std: float = parameter(
            0.02,
            doc="standard deviation of the noise on the initial taps",
            reason="the tap of this token starts at 1 and the others at 0, plus this: near identity, so that the layer "
            "neither mixes nor rescales its stream before it has learned to",
            minimum=0.0,
        )
        bias: bool = parameter(False, doc="whether a learned vector is added", reason="as in `linear`")
        activation: str = parameter(
            "none",
            doc="function on the result",
            reason="none: starts near identity; silu is the paper's choice for q, k and v",
            choices=("none", "silu"),
        )

    inputs = (Port("x", "the stream"),)
    outputs = (Port("out", "the convolved stream"),)
    stateful = True

    @classmethod
    def infer(cls, site: Site) -> dict[str, Value]:
        """The input's own type."""
        return {"out": stream(site.features("x"), "out")}

    @classmethod
    def dependences(cls, site: Site) -> tuple[Dependence, ...]:
        """A window of ``kernel`` tokens."""
        return (Dependence("x", "out", "window", site.parameters.kernel),)

    @classmethod
    def flops(cls, site: Site) -> float:
        """One multiply-add per tap and feature."""
        return 2.0 * float(site.parameters.kernel) * site.features("x")

    def __init__(self, site: Site) -> None:
        super().__init__()
        p, dim = site.parameters, site.features("x")
        taps = torch.randn(dim, p.kernel) * p.std
        taps[:, 0] += 1.0
        self.weight = nn.Parameter(taps)
        self.bias = nn.Parameter(torch.zeros(dim)) if p.bias else None
        self.silu: bool = p.activation == "silu"

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        """``tail [batch, kernel - 1, dim]`` of zeros, which no token reads."""
        dim, kernel = self.weight.shape
        return {"tail": self.weight.new_zeros(batch, kernel - 1, dim)}

    def forward(self, x: Tensor, state: Mapping[str, Tensor], clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        """x ``[B, G, dim]`` -> ``[B, G, dim]`` and the new state."""
        y, tail = short_convolution(x, state["tail"], self.weight, self.bias, clock, activated=self.silu)
        return y[:, 0], {"tail": tail}
