"""Output head with weights of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from titans_graph.registry import Component, Port, Site, parameter
from titans_graph.shapes import Value, stream


class LinearHead(Component, nn.Module):
    """Logits by a learned linear map. ``x [B, T, dim]`` -> ``out [B, T, vocab]``."""

    @dataclass(frozen=True)
    class Parameters:
        """Size of the head."""

        vocab: int = parameter(doc="how many ids there are", minimum=1)
        std: float = parameter(
            0.02,
            doc="standard deviation of the initial weights",
            reason="the embedding's convention, so that tied and untied heads start alike",
            minimum=0.0,
        )

    inputs = (Port("x", "features to classify"),)
    outputs = (Port("out", "logits"),)

    @classmethod
    def infer(cls, site: Site) -> dict[str, Value]:
        """``[B, T, vocab]``."""
        site.features("x")
        return {"out": stream(site.parameters.vocab, "out")}

    @classmethod
    def flops(cls, site: Site) -> float:
        """One matrix product."""
        return 2.0 * site.features("x") * float(site.parameters.vocab)

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.project = nn.Linear(site.features("x"), site.parameters.vocab, bias=False)
        nn.init.normal_(self.project.weight, std=site.parameters.std)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[B, T, dim]`` -> ``[B, T, vocab]``."""
        logits: Tensor = self.project(x)
        return logits
