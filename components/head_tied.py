"""Output head that shares the embedding's table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from titans_graph.registry import Component, Port, Site, SiteError, parameter
from titans_graph.shapes import Value, stream


class TiedHead(Component, nn.Module):
    """Logits as products with the rows of a table (Press and Wolf, arXiv 1608.05859).

    ``x [B, T, dim]``, ``table [vocab, dim]`` -> ``out [B, T, vocab]``. Has no parameters of its own.
    """

    @dataclass(frozen=True)
    class Parameters:
        """How the logits are scaled."""

        scale: float = parameter(
            1.0,
            doc="factor on the logits",
            reason="1: a normed x and a table of standard deviation 0.02 give first logits well below 1 already",
        )

    inputs = (
        Port("x", "features to classify"),
        Port("table", "one row of features per id, e.g. the embedding's `table`", accepts="fixed"),
    )
    outputs = (Port("out", "logits"),)

    @classmethod
    def infer(cls, site: Site) -> dict[str, Value]:
        """``[B, T, vocab]``; a SiteError where the table is several pieces or its features do not fit."""
        x, table = site.value("x"), site.value("table")
        if len(table.pieces) != 1 or table.single.length is None:
            raise SiteError(f"the table must be one fixed piece [vocab, dim], got {table.text()}", key="table")
        if site.features("x") != site.features("table"):
            raise SiteError(f"x {x.text()} and the table {table.text()} differ in their last size", key="table")
        return {"out": stream(table.single.length, "out")}

    @classmethod
    def flops(cls, site: Site) -> float:
        """One product with the table."""
        return 2.0 * site.features("x") * (cls.infer(site)["out"].dim or 0)

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.scale: float = site.parameters.scale

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """x ``[B, T, dim]``, table ``[vocab, dim]`` -> ``[B, T, vocab]``."""
        return (x @ table.t()) * self.scale
