"""The attention family: segment, window and full attention with one set of ports and parameters.

The three differ in which earlier tokens a query sees and in what they keep between calls; the arithmetic is in
:mod:`titans_graph.kernels.attention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_graph.errors import UnknownName, suggest
from titans_graph.kernels.attention import full_attention, segment_attention, window_attention
from titans_graph.kernels.rotary import rotate
from titans_graph.registry import Component, Port, Site, SiteError, parameter
from titans_graph.shapes import Clock, Dependence, Value

NORM_EPS = 1e-6
INITIAL_ROOM = 16


@dataclass(frozen=True)
class AttentionParameters:
    """What the family has in common."""

    heads: int = parameter(doc="query heads", minimum=1)
    kv_heads: int | None = parameter(
        None,
        doc="key and value heads, each shared by heads / kv_heads query heads; null: as many as heads",
        reason="the paper's attention is multi-head (eq. 2-5); grouping (arXiv 2305.13245) is a choice",
        minimum=1,
    )
    head_dim: int | None = parameter(
        None, doc="features per head; null: dim / heads", reason="Vaswani et al., arXiv 1706.03762", minimum=1
    )
    rotary: float | None = parameter(
        10000.0,
        doc="base of the rotary positions; null turns them off",
        reason="arXiv 2104.09864, section 3.4.3",
        minimum=1.0,
    )
    keep: str | None = parameter(
        None,
        doc="name of the piece whose queries are computed; null: the only timed piece",
        reason="a stream has one piece",
    )
    qk_norm: bool = parameter(
        False,
        doc="whether queries and keys are RMS-normalised per head, with learned gains",
        reason="not in the paper; arXiv 2302.05442 adds it for stability at scale",
    )


class Attention(Component, nn.Module):
    """What the family has in common: pieces, projections, rotary positions.

    ``x``: any pieces with features -> ``out [B, T, dim]``, one element per token of the kept piece. Fixed pieces are
    seen by every query and are not rotated; element j of a timed piece is seen by query t when j <= t and j is within
    reach.
    State: ``cache``, rotated keys and values of the timed pieces, ``[B, reach, P, 2, kv_heads, head_dim]``.
    """

    Parameters: ClassVar[type] = AttentionParameters
    inputs = (Port("x", "the sequence to attend over", accepts="sequence"),)
    outputs = (Port("out", "the attended stream"),)
    stateful = True

    @classmethod
    def infer(cls, site: Site) -> dict[str, Value]:
        """The kept piece's type; a SiteError where heads do not divide or no piece can be kept."""
        value = site.value("x")
        cls.sizes(site)
        return {"out": Value((value.pieces[cls.kept(site)],), site.features("x"))}

    @classmethod
    def kept(cls, site: Site) -> int:
        """Where the kept piece stands among the pieces."""
        pieces, keep = site.value("x").pieces, site.parameters.keep
        names = [piece.name for piece in pieces]
        timed = [i for i, piece in enumerate(pieces) if piece.timed]
        if keep is None:
            if len(timed) != 1:
                shown = ", ".join(names[i] for i in timed) or "none"
                message = f"attention needs `keep` unless exactly one piece is timed; timed here: {shown}"
                raise SiteError(message, kind=UnknownName, key="keep" if timed else "x", help="write keep: ...")
            return timed[0]
        if keep not in names:
            raise SiteError(f"no piece {keep!r} in this sequence", kind=UnknownName, key="keep", help=suggest(keep, names))
        if names.index(keep) not in timed:
            raise SiteError(f"the piece {keep!r} belongs to no token, so no queries come from it", key="keep")
        return names.index(keep)

    @classmethod
    def sizes(cls, site: Site) -> tuple[int, int, int]:
        """``(heads, kv_heads, head_dim)``; a SiteError where they do not fit."""
        p, dim = site.parameters, site.features("x")
        kv_heads = p.kv_heads or p.heads
        if p.heads % kv_heads:
            raise SiteError(f"kv_heads {kv_heads} does not divide heads {p.heads}", key="kv_heads")
        if p.head_dim is None and dim % p.heads:
            raise SiteError(f"heads {p.heads} does not divide the {dim} features of x", key="heads")
        head_dim = p.head_dim or dim // p.heads
        if p.rotary is not None and head_dim % 2:
            message = f"rotary positions turn pairs of features, but a head has {head_dim}"
            raise SiteError(message, key="head_dim" if p.head_dim else "heads", help="or write rotary: null")
        return p.heads, kv_heads, head_dim

    @classmethod
    def dependences(cls, site: Site) -> tuple[Dependence, ...]:
        """All earlier tokens, unless a class says less."""
        return (Dependence("x", "out", "causal"),)

    @classmethod
    def context(cls, site: Site) -> float:
        """Mean number of elements of one timed piece that a query sees; 0 where it depends on the length."""
        return 0.0

    @classmethod
    def flops(cls, site: Site) -> float:
        """Projections, and two products with everything seen (full attention's part that grows is not counted)."""
        heads, kv_heads, head_dim = cls.sizes(site)
        pieces = site.value("x").pieces
        timed = sum(piece.timed for piece in pieces)
        seen = cls.context(site) * timed + sum(piece.length or 0 for piece in pieces)
        projections = 2.0 * site.features("x") * head_dim * (2 * heads + 2 * kv_heads * timed)
        return projections + 4.0 * heads * head_dim * seen

    def __init__(self, site: Site) -> None:
        super().__init__()
        p, dim = site.parameters, site.features("x")
        self.heads, self.kv_heads, self.head_dim = self.sizes(site)
        self.at = self.kept(site)
        self.timed = tuple(piece.timed for piece in site.value("x").pieces)
        self.rotary: float | None = p.rotary
        self.query = nn.Linear(dim, self.heads * self.head_dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * self.kv_heads * self.head_dim, bias=False)
        self.project = nn.Linear(self.heads * self.head_dim, dim, bias=False)
        self.query_gain = nn.Parameter(torch.ones(self.head_dim)) if p.qk_norm else None
        self.key_gain = nn.Parameter(torch.ones(self.head_dim)) if p.qk_norm else None

    def reach(self) -> int:
        """How many tokens the cache holds."""
        raise TypeError(f"{type(self).__name__} does not say what it keeps")

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        """``cache`` of zeros, which no query sees."""
        shape = (batch, self.reach(), sum(self.timed), 2, self.kv_heads, self.head_dim)
        # Not by the weight of a layer: a user may have put another layer in its place.
        like = next((p for p in self.parameters() if p.is_floating_point()), torch.zeros(()))
        return {"cache": like.new_zeros(shape)}

    def forward(
        self, x: Tensor | tuple[Tensor, ...], state: Mapping[str, Tensor], clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x: pieces ``[B, G, dim]`` or ``[n, dim]`` -> ``[B, G, dim]`` and the new state."""
        pieces = (x,) if isinstance(x, Tensor) else tuple(x)
        position = self.place(clock)
        q = _normed(self.query(pieces[self.at]).unflatten(-1, (self.heads, self.head_dim)), self.query_gain)
        kv = torch.stack([self.keys(p, position) for p, timed in zip(pieces, self.timed, strict=True) if timed], dim=2)
        still = [self.keys(p, None) for p, timed in zip(pieces, self.timed, strict=True) if not timed]
        fixed = torch.cat(still) if still else None
        if self.rotary is not None:
            q = rotate(q, position, self.rotary)
        out, cache = self.attend(q, kv, fixed, state["cache"], clock)
        return self.project(out.flatten(2)), {"cache": cache}

    def keys(self, piece: Tensor, position: Tensor | None) -> Tensor:
        """A piece's keys and values ``[..., dim]`` -> ``[..., 2, kv_heads, head_dim]``; keys rotated."""
        k, v = self.key_value(piece).unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(-3)
        k = _normed(k, self.key_gain)
        if position is not None and self.rotary is not None:
            k = rotate(k, position, self.rotary)
        return torch.stack([k, v], dim=-3)

    def place(self, clock: Clock) -> Tensor:
        """The positions ``[B, G]`` that rotary angles come from."""
        return clock.position

    def attend(self, q: Tensor, kv: Tensor, fixed: Tensor | None, cache: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        """The kind's own attention: ``[B, G, heads, head_dim]`` and the new cache."""
        raise TypeError(f"{type(self).__name__} does not say how it attends")


def _normed(x: Tensor, gain: Tensor | None) -> Tensor:
    """``[..., head_dim]`` normalised where there is a gain."""
    return x if gain is None else F.rms_norm(x, gain.shape, eps=NORM_EPS) * gain


class FullAttention(Attention):
    """Causal attention over the whole document (eq. 3-5). The cache grows with the tokens read."""

    grows = True

    def reach(self) -> int:
        """The first cache; ``clock.room`` says how large the next must be."""
        return INITIAL_ROOM

    def attend(self, q: Tensor, kv: Tensor, fixed: Tensor | None, cache: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        """See :func:`titans_graph.kernels.attention.full_attention`."""
        return full_attention(q, kv, fixed, cache, clock)


class WindowAttention(Attention):
    """Attention over the last ``window`` tokens, this one among them (SWA in eq. 27 and 31)."""

    @dataclass(frozen=True)
    class Parameters(AttentionParameters):
        """The family's, and the window."""

        window: int = parameter(
            64, doc="tokens a query sees, itself among them", reason="as long as the default segment", minimum=1
        )

    @classmethod
    def dependences(cls, site: Site) -> tuple[Dependence, ...]:
        """A window."""
        return (Dependence("x", "out", "window", site.parameters.window),)

    @classmethod
    def context(cls, site: Site) -> float:
        """The window."""
        return float(site.parameters.window)

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.window: int = site.parameters.window

    def reach(self) -> int:
        """The window."""
        return self.window

    def attend(self, q: Tensor, kv: Tensor, fixed: Tensor | None, cache: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        """See :func:`titans_graph.kernels.attention.window_attention`."""
        return window_attention(q, kv, fixed, cache, clock, self.window)


class SegmentAttention(Attention):
    """Attention inside segments (eq. 21-22); a segment starts with each document and every ``segment`` tokens on."""

    @dataclass(frozen=True)
    class Parameters(AttentionParameters):
        """The family's, the segment and how eq. 22 is read."""

        segment: int | None = parameter(
            None,
            doc="tokens per segment; null: the enclosing block's segment, or 64 without one",
            reason="one segment length serves the whole block",
            minimum=1,
        )
        causal: bool = parameter(
            True,
            doc="whether a token sees only its segment up to itself; false: the whole segment, as eq. 22 is written",
            reason="a language model must not read later tokens",
        )

    @classmethod
    def segment_of(cls, site: Site) -> int:
        """Tokens per segment."""
        chosen: int | None = site.parameters.segment
        return chosen or site.segment or 64

    @classmethod
    def dependences(cls, site: Site) -> tuple[Dependence, ...]:
        """At most a segment back; the whole segment, later tokens too, where not causal."""
        if not site.parameters.causal:
            return (Dependence("x", "out", "segment"),)
        return (Dependence("x", "out", "window", cls.segment_of(site)),)

    @classmethod
    def periods(cls, site: Site) -> tuple[int, ...]:
        """The segment."""
        return (cls.segment_of(site),)

    @classmethod
    def context(cls, site: Site) -> float:
        """Half a segment, or all of it."""
        return cls.segment_of(site) * (0.5 if site.parameters.causal else 1.0)

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.segment = self.segment_of(site)
        self.causal: bool = site.parameters.causal

    def reach(self) -> int:
        """The segment."""
        return self.segment

    def place(self, clock: Clock) -> Tensor:
        """Places in the segment, so that every segment stands alike to the fixed pieces, which are not rotated."""
        return clock.position % self.segment

    def attend(self, q: Tensor, kv: Tensor, fixed: Tensor | None, cache: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        """See :func:`titans_graph.kernels.attention.segment_attention`."""
        return segment_attention(q, kv, fixed, cache, clock, self.segment, self.causal)
