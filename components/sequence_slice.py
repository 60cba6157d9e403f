"""One piece of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from titans_graph.errors import UnknownName, suggest
from titans_graph.registry import Component, Port, Site, SiteError, parameter
from titans_graph.shapes import Value


class Slice(Component, nn.Module):
    """The piece named ``keep``, alone: ``[B, T, dim]`` or ``[n, dim]``."""

    @dataclass(frozen=True)
    class Parameters:
        """Which piece."""

        keep: str = parameter(doc="name of the piece")

    inputs = (Port("x", "the sequence", accepts="sequence"),)
    outputs = (Port("out", "the piece"),)

    @classmethod
    def infer(cls, site: Site) -> dict[str, Value]:
        """The piece's own type; a SiteError where the sequence has no such piece."""
        value = site.value("x")
        return {"out": Value((value.pieces[cls.index(site)],), site.features("x"))}

    @classmethod
    def index(cls, site: Site) -> int:
        """Where the piece stands in the sequence."""
        names = [piece.name for piece in site.value("x").pieces]
        keep: str = site.parameters.keep
        if keep not in names:
            raise SiteError(f"no piece {keep!r} in this sequence", kind=UnknownName, key="keep", help=suggest(keep, names))
        return names.index(keep)

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.at = self.index(site)

    def forward(self, x: Tensor | tuple[Tensor, ...]) -> Tensor:
        """The pieces -> the one kept."""
        return x if isinstance(x, Tensor) else x[self.at]
