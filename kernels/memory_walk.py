"""The walk over a scan's chunks: what rows do at each, which body runs, and how the tensors of a chunk are cut out.

Shapes: ``B`` batch, ``H`` heads, ``N`` = B * H rows, ``G`` slots, ``C`` slots of a chunk; lists ``[B, H, *shape]``.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def chunks_first(x: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """``[B, H, G]`` as one contiguous ``[N, C]`` per chunk."""
    return x.view(*x.shape[:2], x.shape[2] // chunk, chunk).movedim(2, 0).flatten(1, 2).contiguous().unbind(0)


def pieces(x: Tensor, chunk: int, c: int, count: int) -> tuple[Tensor, ...]:
    """``count`` chunks of ``[B, H, G, d]`` from chunk ``c`` on, ``[N, C, d]`` each with dense rows: views, or of one copy."""
    part = x.view(*x.shape[:2], x.shape[2] // chunk, chunk, x.shape[3])[:, :, c : c + count].flatten(0, 1)
    return (part if part.stride()[2:] == (x.shape[3], 1) else part.contiguous()).unbind(1)


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
        self._slots = rows.contiguous().unbind(0)
        self.width = kept_width(form.network, tokens[0].shape[3], chunk, form.read)
        self._bodies: dict[tuple[str, bool], Body] = {}
        self._turns: list[list[Tensor]] = []

    def slots(self, c: int) -> Tensor:
        """Which slots of chunk ``c`` are valid, ``[N, C]``."""
        return self._slots[c]

    def inputs(self, c: int, weights: list[Tensor], momenta: list[Tensor]) -> list[Tensor]:
        """The differentiable arguments of chunk ``c``'s body."""
        vectors = [pieces(x, self.chunk, c, 1)[0] for x in self.tokens[:-3]]
        state = [*weights, *momenta, *vectors, *(parts[c] for parts in self._gates)]
        if not self.flags[c].resumed:
            return state
        # A row with tokens in a chunk it did not begin is in its first chunk of this call: its anchor is the entry's.
        return [*where(self.flags[c].first, weights, self.entry_anchor), *state]

    def together(self, c: int, kind: str, *, backward: bool = False) -> int:
        """How many chunks from ``c`` on, or down from it, one call of a native body of ``kind`` can run; 1 where none can.

        Such chunks are full and begun in every row; where rows restart, their weights are exchanged before the body.
        """
        if not isinstance(self._bodies.get((kind, False)), Native):
            return 1
        count = 0
        for flags in self.flags[c::-1] if backward else self.flags[c:]:
            if count == TOGETHER or not (flags.all_first and flags.full) or flags.resumed:
                break
            if flags.any_restart and (backward or count):
                count += backward
                break
            count += 1
        return max(count, 1)

    def token_pieces(self, c: int, count: int) -> list[list[Tensor]]:
        """The token arguments of ``count`` chunks from ``c`` on, with dense rows."""
        vectors = [pieces(x, self.chunk, c, count) for x in self.tokens[:-3]]
        return [
            [*(parts[i] for parts in vectors), *(parts[c + i] for parts in self._gates), self._slots[c + i]]
            for i in range(count)
        ]

    def states(self, first: list[Tensor], places: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor]]:
        """The state before each of some chunks and after the last, ``first`` being the one before all of them.

        ``places``: where what is after each chunk goes. What has none goes to two places of the walk in turns, and stays there
        until the next call of this.
        """
        result = [first]
        for place in places:
            if any(x is None for x in place):
                if len(self._turns) < 2:
                    self._turns.append([torch.empty_like(x) for x in first])
                else:
                    self._turns.reverse()
            result.append([self._turns[-1][i] if x is None else x for i, x in enumerate(place)])
        return result

    def sweep(self, kind: str, args: list[list[Tensor]], out: list[list[Tensor]]) -> None:
        """Calls of the native body of ``kind`` one after the other, as :meth:`together` allows."""
        body = self._bodies[kind, False]
        assert isinstance(body, Native)
        body.sweep(args, out)

    def forward(self, c: int, weights: list[Tensor], momenta: list[Tensor], out: Sequence[Tensor | None] = ()) -> list[Tensor]:
        """Run chunk ``c``: ``[y [N, C, d], weights'.., momenta'.., scale [N, C] if bounded, products [N, C, K] if K > 0]``.

        K is ``width``. Results are those of ``out`` where it has a tensor for them.
        """
        args = [*self.inputs(c, weights, momenta), self.slots(c)]
        return self._run(c, FORWARD, args, len(weights), out)

    def advance(
        self, c: int, weights: list[Tensor], momenta: list[Tensor], products: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and momenta after chunk ``c``; nothing is read. ``products``: what forward kept of it."""
        count = len(weights)
        inputs = self.inputs(c, weights, momenta)
        result = self._run(c, ADVANCE, [*inputs[:-6], *inputs[-5:], self.slots(c), *products], count)
        return result[:count], result[count:]

    def backward(
        self,
        c: int,
        inputs: list[Tensor],
        products: list[Tensor],
        cotangents: list[Tensor],
        count: int,
        out: Sequence[Tensor | None] = (),
    ) -> list[Tensor]:
        """Input cotangents of chunk ``c``'s body, those of ``out`` where it has a tensor for them."""
        return self._run(c, PULLBACK, [*inputs, self.slots(c), *products, *cotangents], count, out)

    def _run(self, c: int, kind: str, args: list[Tensor], count: int, out: Sequence[Tensor | None] = ()) -> list[Tensor]:
        key = kind, self.flags[c].resumed
        if key not in self._bodies:
            body = body_of(self.form, kind, count, kept=self.width > 0, resumed=key[1])
            # At most the first chunk of a row is resumed: not worth a compilation of its own.
            use = self.compiled and not key[1]
            self._bodies[key] = compiled((self.form, kind), body, args) if use else body
        return run_into(self._bodies[key], args, out)
