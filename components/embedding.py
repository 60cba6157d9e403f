"""Token embedding: ids to features, and the table itself as a value so that a head can be tied to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from titans_graph.registry import Component, Port, Site, parameter
from titans_graph.shapes import Dependence, Value, fixed, stream


class Embedding(Component, nn.Module):
    """Each id's row of a learned table. ``x [B, T]`` int64 -> ``out [B, T, dim]``, ``table [vocab, dim]``.

    Ids must lie in 0..vocab-1; the runtime checks that before the first region runs.
    """

    @dataclass(frozen=True)
    class Parameters:
        """Size of the table and how it starts."""

        vocab: int = parameter(doc="how many ids there are", minimum=1)
        dim: int = parameter(doc="features per token", minimum=1)
        std: float = parameter(
            0.02,
            doc="standard deviation of the initial table",
            reason="convention of GPT-2; with a tied head the first logits are then near 0",
            minimum=0.0,
        )
        scale: float = parameter(
            1.0,
            doc="factor on the features that leave `out`, not on `table`",
            reason="1: every block starts with a norm, so the scale of the stream needs no correction",
        )

    inputs = (Port("x", "token ids", accepts="ids"),)
    outputs = (Port("out", "the features of each id"), Port("table", "the table, for a tied head"))

    @classmethod
    def infer(cls, site: Site) -> dict[str, Value]:
        """``out [B, T, dim]`` and ``table [vocab, dim]``."""
        p = site.parameters
        return {"out": stream(p.dim, "out"), "table": fixed(p.vocab, p.dim, "table")}

    @classmethod
    def dependences(cls, site: Site) -> tuple[Dependence, ...]:
        """The table belongs to no token."""
        return (Dependence("x", "out", "pointwise"), Dependence("x", "table", "fixed"))

    def __init__(self, site: Site) -> None:
        super().__init__()
        p = site.parameters
        self.scale: float = p.scale
        self.embedding = nn.Embedding(p.vocab, p.dim)
        nn.init.normal_(self.embedding.weight, std=p.std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x ``[B, T]`` -> (``[B, T, dim]``, ``[vocab, dim]``)."""
        table = self.embedding.weight
        features = F.embedding(x, table)
        return features * self.scale, table
