"""The walk over a scan's chunks: what rows do at each, which body runs, and how the tensors of a chunk are cut out.

Shapes: ``B`` batch, ``H`` heads, ``N`` = B * H rows, ``G`` slots, ``C`` slots of a chunk; lists ``[B, H, *shape]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titans_graph.kernels.memory_chunk import Form
from titans_graph.kernels.memory_compile import ADVANCE, FORWARD, PULLBACK, Body, body_of, compiled
from titans_graph.kernels.memory_products import kept_width
from titans_graph.kernels.native import Native, run_into

TOGETHER = 8
"""Chunks that one call of a native body runs through at most: more gain nothing, and that much is copied of the keys, queries
and values of a component, whose heads lie side by side."""


class Flags(NamedTuple):
    """What the rows do at one chunk; the booleans are read on the host once a call.

    ``first`` and ``restart`` are ``[N]``. ``all_first``: every row begins a chunk. ``any_restart``: some row restarts,
    ``all_restart``: every row does. ``resumed``: some row has tokens here whose chunk began in an earlier call. ``full``: every
    slot holds a token.
    """

    first: Tensor
    restart: Tensor
    all_first: bool
    any_restart: bool
    resumed: bool
    full: bool
    all_restart: bool


def flags_of(valid: Tensor, position: Tensor, chunk: int, heads: int) -> list[Flags]:
    """One :class:`Flags` per chunk from ``[B, G]`` valid and position."""
    batch = valid.shape[0]
    first = valid[:, ::chunk]
    restart = first & (position[:, ::chunk] == 0)
    slots = valid.view(batch, valid.shape[1] // chunk, chunk)
    late = ~first & slots.any(-1)
    host = torch.stack([first.all(0), restart.any(0), late.any(0), slots.all(-1).all(0), restart.all(0)], 1).tolist()
    rows = torch.stack([first, restart]).repeat_interleave(heads, 1).unbind(-1)
    return [Flags(r[0], r[1], *h) for r, h in zip(rows, host, strict=True)]


def where(rows: Tensor, new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    """``new`` in the rows ``[N]`` that are true, ``old`` elsewhere."""
    return [torch.where(rows.view(-1, *[1] * (n.dim() - 1)), n, o) for n, o in zip(new, old, strict=True)]


def masked(rows: Tensor, values: list[Tensor]) -> list[Tensor]:
    """``values`` in the rows that are true, zero elsewhere."""
    return [torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, 0.0) for x in values]


def restarted(flags: Flags, initial: Sequence[list[Tensor]], state: Sequence[list[Tensor]]) -> Sequence[list[Tensor]]:
    """``state``, weights and momenta, at the start of a chunk: ``initial`` in the rows that restart there."""
    if flags.all_restart:
        return initial
    return [where(flags.restart, a, b) for a, b in zip(initial, state, strict=True)] if flags.any_restart else state


def added(old: list[Tensor] | None, new: list[Tensor]) -> list[Tensor]:
    """The sum of two lists; None counts as zero."""
    return new if old is None else [a + b for a, b in zip(old, new, strict=True)]


def merge(values: Sequence[Tensor]) -> list[Tensor]:
    """``[B, H, *shape]`` to contiguous ``[N, *shape]``."""
    return [x.flatten(0, 1).contiguous() for x in values]


def split(values: list[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """``[N, *shape]`` back to ``[B, H, *shape]``."""
    return [x.view(o.shape) for x, o in zip(values, like, strict=True)]


def chunks_first(x: Tensor, chunk: int) -> Tensor:
    """``[B, H, G]`` as contiguous ``[chunks, N, C]``."""
    return x.view(*x.shape[:2], x.shape[2] // chunk, chunk).movedim(2, 0).flatten(1, 2).contiguous()


def pieces(x: Tensor, chunk: int, c: int, count: int) -> Tensor:
    """``count`` chunks of ``[B, H, G, d]`` from chunk ``c`` on, ``[count, N, C, d]`` with dense rows: a view, or a copy."""
    part = x.view(*x.shape[:2], x.shape[2] // chunk, chunk, x.shape[3])[:, :, c : c + count].flatten(0, 1)
    return (part if part.stride()[2:] == (x.shape[3], 1) else part.contiguous()).transpose(0, 1)


class Walk:
    """Everything forward and backward need to run one chunk.

    ``tokens``: [q, k, v ``[B, H, G, d]``, step, log_momentum, log_keep ``[B, H, G]``]; ``valid`` ``[B, G]``;
    ``entry_anchor`` ``[N, *shape]``. What is the same at every chunk is made here, once.
    """

    def __init__(
        self,
        form: Form,
        use_compiled: bool,
        chunk: int,
        flags: list[Flags],
        entry_anchor: list[Tensor],
        tokens: list[Tensor],
        valid: Tensor,
    ) -> None:
        self.form, self.compiled, self.chunk, self.flags = form, use_compiled, chunk, flags
        self.entry_anchor, self.tokens = entry_anchor, tokens
        # Gates are small: all chunks' copies at once. Of keys, queries and values some chunks at a time, to save memory.
        self._gates = [chunks_first(x, chunk) for x in tokens[-3:]]
        rows = valid.view(valid.shape[0], len(flags), chunk).transpose(0, 1).repeat_interleave(tokens[0].shape[1], 1)
        self._slots = rows.contiguous()
        self.width = kept_width(form.network, tokens[0].shape[3])
        self.count = len(entry_anchor)
        self._bodies: dict[tuple[str, bool], Body] = {}

    def slots(self, c: int) -> Tensor:
        """Which slots of chunk ``c`` are valid, ``[N, C]``."""
        return self._slots[c]

    def inputs(self, c: int, weights: list[Tensor], momenta: list[Tensor]) -> list[Tensor]:
        """The differentiable arguments of chunk ``c``'s body."""
        vectors = [pieces(x, self.chunk, c, 1)[0] for x in self.tokens[:-3]]
        state = [*weights, *momenta, *vectors, *(x[c] for x in self._gates)]
        if not self.flags[c].resumed:
            return state
        # A row with tokens in a chunk it did not begin is in its first chunk of this call: its anchor is the entry's.
        return [*where(self.flags[c].first, weights, self.entry_anchor), *state]

    def together(self, c: int, *, backward: bool = False) -> int:
        """How many chunks from ``c`` on, or down from it, native bodies can run through in one call; at least 1.

        Such chunks are full and begun in every row; rows restart at the first of them alone, for which the walks exchange
        their weights.
        """
        count = 0
        for flags in self.flags[c::-1] if backward else self.flags[c:]:
            if count == TOGETHER or not (flags.all_first and flags.full) or flags.resumed:
                break
            if flags.any_restart and (backward or count):
                count += backward
                break
            count += 1
        return max(count, 1)

    def runs(self, c: int, count: int) -> list[Tensor]:
        """The token arguments of ``count`` chunks from ``c`` on, ``[count, N, C, ...]`` with dense rows."""
        vectors = [pieces(x, self.chunk, c, count) for x in self.tokens[:-3]]
        return [*vectors, *(x[c : c + count] for x in (*self._gates, self._slots))]

    def native(self, kind: str, args: Callable[[], list[Tensor]]) -> Native | None:
        """The body of a kind for chunks that go together, which is called with tensors like ``args``; None where it is none."""
        body = self._bodies.get((kind, False)) or self._body(kind, args(), resumed=False)
        return body if isinstance(body, Native) else None

    def forward(self, c: int, weights: list[Tensor], momenta: list[Tensor], out: Sequence[Tensor | None] = ()) -> list[Tensor]:
        """Run chunk ``c``: ``[y [N, C, d], weights'.., momenta'.., scale [N, C] if bounded, products [N, C, K] if K > 0]``.

        K is ``width``. Results are those of ``out`` where it has a tensor for them.
        """
        return self._run(c, FORWARD, [*self.inputs(c, weights, momenta), self.slots(c)], out)

    def advance(
        self, c: int, weights: list[Tensor], momenta: list[Tensor], products: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and momenta after chunk ``c``; nothing is read. ``products``: what forward kept of it."""
        inputs = self.inputs(c, weights, momenta)
        result = self._run(c, ADVANCE, [*inputs[:-6], *inputs[-5:], self.slots(c), *products])
        return result[: self.count], result[self.count :]

    def backward(
        self,
        c: int,
        inputs: list[Tensor],
        products: list[Tensor],
        cotangents: list[Tensor],
        out: Sequence[Tensor | None] = (),
    ) -> list[Tensor]:
        """Input cotangents of chunk ``c``'s body, those of ``out`` where it has a tensor for them."""
        return self._run(c, PULLBACK, [*inputs, self.slots(c), *products, *cotangents], out)

    def _run(self, c: int, kind: str, args: list[Tensor], out: Sequence[Tensor | None] = ()) -> list[Tensor]:
        resumed = self.flags[c].resumed
        return run_into(self._bodies.get((kind, resumed)) or self._body(kind, args, resumed=resumed), args, out)

    def _body(self, kind: str, args: list[Tensor], *, resumed: bool) -> Body:
        body = body_of(self.form, kind, self.count, kept=self.width > 0, resumed=resumed)
        # At most the first chunk of a row is resumed: not worth a compilation of its own.
        if self.compiled and not resumed:
            body = compiled((self.form, kind), body, args)
        self._bodies[kind, resumed] = body
        return body
