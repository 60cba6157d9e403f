"""Sequences put one after another, e.g. ``[persistent | h | segment]`` of eq. 21."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from titans_graph.registry import Component, Port, Site, SiteError
from titans_graph.shapes import Value


class Concat(Component, nn.Module):
    """All pieces of the inputs, in order, as one sequence value. Nothing is copied: a sequence is a tuple of pieces."""

    @dataclass(frozen=True)
    class Parameters:
        """None."""

    inputs = (Port("x", "the sequences to join, in order", accepts="sequence", many=True),)
    outputs = (Port("out", "the joined sequence"),)

    @classmethod
    def infer(cls, site: Site) -> dict[str, Value]:
        """All pieces in order; a SiteError where a piece comes twice or the features differ."""
        values = site.inputs.get("x", ())
        if not values:
            raise SiteError("sequence.concat needs at least one sequence", key="x")
        dim = site.features("x")
        for other in values[1:]:
            if other.dim != dim:
                message = f"cannot join {values[0].text()} and {other.text()}: their last sizes differ"
                raise SiteError(message, key="x")
        pieces = tuple(piece for value in values for piece in value.pieces)
        names = [piece.name for piece in pieces]
        for name in names:
            if names.count(name) > 1:
                raise SiteError(f"the piece {name!r} comes twice in one sequence", key="x", help="each piece once")
        return {"out": Value(pieces, dim)}

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, x: tuple[Tensor | tuple[Tensor, ...], ...]) -> Tensor | tuple[Tensor, ...]:
        """Values of one piece (tensors) or several (tuples) -> the flat tuple, or the tensor where there is one."""
        pieces: list[Tensor] = []
        for value in x:
            pieces.extend([value] if isinstance(value, Tensor) else value)
        return pieces[0] if len(pieces) == 1 else tuple(pieces)
