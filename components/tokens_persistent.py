"""Persistent memory: learned tokens that belong to no time (section 3.3 of arXiv 2501.00663)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titans_graph.errors import WrongType
from titans_graph.registry import Component, Port, Site, SiteError, parameter
from titans_graph.shapes import Value, fixed


class PersistentTokens(Component, nn.Module):
    """The learned tokens p_1 .. p_count of eq. 19, independent of the input: ``out [count, dim]``.

    ``count`` 0 is a model without them (table 5): a piece of no elements that every sequence and attention may still name,
    and no parameter.
    """

    @dataclass(frozen=True)
    class Parameters:
        """How many tokens, and how they start."""

        count: int = parameter(doc="how many tokens (N_p in the paper); 0 = none", minimum=0)
        dim: int | None = parameter(
            None,
            doc="features per token; null: those of the enclosing block's first input",
            reason="the tokens stand in one sequence with that input",
            minimum=1,
        )
        std: float = parameter(
            0.02, doc="standard deviation of the initial tokens", reason="the embedding's convention", minimum=0.0
        )

    inputs = ()
    outputs = (Port("out", "the tokens"),)

    @classmethod
    def infer(cls, site: Site) -> dict[str, Value]:
        """``[count, dim]``; a SiteError where neither the spec nor the block says how many features."""
        return {"out": fixed(site.parameters.count, cls.size(site), "out")}

    @classmethod
    def size(cls, site: Site) -> int:
        """Features per token."""
        dim: int | None = site.parameters.dim or site.dim
        if dim is None:
            message = "the enclosing block's first input has no features, so `dim` must be given"
            raise SiteError(message, kind=WrongType, key="dim", help="write dim: ...")
        return dim

    def __init__(self, site: Site) -> None:
        super().__init__()
        tokens = torch.randn(site.parameters.count, self.size(site)) * site.parameters.std
        if site.parameters.count:
            self.tokens = nn.Parameter(tokens)
        else:  # a buffer only for its device and dtype; checkpoints hold nothing of it
            self.register_buffer("tokens", tokens, persistent=False)

    def forward(self) -> Tensor:
        """-> ``[count, dim]``."""
        return self.tokens
