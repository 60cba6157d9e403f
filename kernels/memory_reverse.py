"""The reverse walk over a scan's chunks: cotangents from the end of a call to its start.

Shapes as in :mod:`~titans_graph.kernels.memory_walk`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_graph.kernels.memory_compile import PULLBACK
from titans_graph.kernels.memory_walk import Flags, Walk, added, masked, pieces, restarted


class Reverse:
    """The reverse walk: carries the cotangents of anchor, weights and momenta, and gathers those of the tokens."""

    def __init__(
        self,
        walk: Walk,
        every: int,
        initial: tuple[list[Tensor], list[Tensor]],
        saved: list[Tensor],
        ends: list[Tensor],
        y: Tensor,
    ) -> None:
        self.walk, self.every, self.initial, self.y = walk, every, initial, y
        self.count = len(ends) // 3
        self.states, self.products = saved[: 2 * self.count], saved[2 * self.count :]
        self.weights, self.momenta = ends[self.count : 2 * self.count], ends[2 * self.count :]
        self.anchor: list[Tensor] | None = ends[: self.count]
        self.initial_weights: list[Tensor] | None = None
        self.initial_momenta: list[Tensor] | None = None
        self.tokens = [x.new_empty(x.shape[0] * x.shape[1], len(walk.flags), walk.chunk, *x.shape[3:]) for x in walk.tokens]
        self.parts = [x.unbind(1) for x in self.tokens]
        self.group: list[tuple[list[Tensor], list[Tensor]]] = []

    def start(self, c: int) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and momenta that chunk ``c`` starts from: a checkpoint, or recomputed from the one before."""
        if not self.group:
            base = c - c % self.every
            kept = [x[base // self.every] for x in self.states]
            now, moving = kept[: self.count], kept[self.count :]
            self.group = [(now, moving)]
            for i in range(base, c):
                now, moving = self.walk.advance(i, now, moving, self.kept(i))
                now, moving = restarted(self.walk.flags[i + 1], self.initial, (now, moving))
                self.group.append((now, moving))
        return self.group.pop()

    def kept(self, c: int) -> list[Tensor]:
        """The products that forward kept of chunk ``c``: one tensor or none."""
        return [pieces(x, self.walk.chunk, c, 1)[0] for x in self.products]

    def run(self) -> list[Tensor]:
        """All chunks, from the last to the first, and the cotangents in the operator's order."""
        c = len(self.walk.flags) - 1
        while c >= 0:
            n = self.walk.together(c, PULLBACK, backward=True) if self.anchor is None else 1
            if self.every > 1:
                # What is recomputed from one checkpoint.
                n = min(n, c % self.every + 1)
            if n > 1:
                self.chunks(c, n)
            else:
                self.chunk(c)
            c -= n
        return self.results()

    def chunks(self, c: int, n: int) -> None:
        """The same as :meth:`chunk` for ``n`` chunks down from ``c``, in one call."""
        walk, low, count = self.walk, c - n + 1, self.count
        tokens, y = walk.token_pieces(low, n), pieces(self.y, walk.chunk, low, n)
        kept = [pieces(x, walk.chunk, low, n) for x in self.products]
        ends = walk.states([x.contiguous() for x in (*self.weights, *self.momenta)], [[None] * 2 * count] * n)
        args, out = [], []
        for i in range(n):
            now, moving = self.start(c - i)
            at = n - 1 - i
            start = [x.contiguous() for x in (*now, *moving)]
            args.append([*start, *tokens[at], *(x[at] for x in kept), y[at], *ends[i]])
            out.append([*ends[i + 1], *(parts[c - i] for parts in self.parts)])
        walk.sweep(PULLBACK, args, out)
        self.weights, self.momenta = ends[-1][:count], ends[-1][count:]
        if walk.flags[low].any_restart:
            self._to_initial(walk.flags[low])

    def chunk(self, c: int) -> None:
        """Carry the cotangents from the end of chunk ``c`` to its start."""
        walk, flags, count = self.walk, self.walk.flags[c], self.count
        inputs = walk.inputs(c, *self.start(c))
        (y,) = pieces(self.y, walk.chunk, c, 1)
        if not flags.full:
            y = torch.where(walk.slots(c)[..., None], y, 0.0)
        places = [parts[c] for parts in self.parts]
        state = [None] * (len(inputs) - len(places))
        grads = walk.backward(c, inputs, self.kept(c), [y, *self.weights, *self.momenta], count, [*state, *places])
        if flags.resumed:
            body_anchor, grads = grads[:count], grads[count:]
            # In rows that begin their chunk here the anchor is the weights.
            self.anchor = added(self.anchor, body_anchor)
        self.weights, self.momenta = grads[:count], grads[count : 2 * count]
        self._to_weights(flags)
        if flags.any_restart:
            self._to_initial(flags)

    def results(self) -> list[Tensor]:
        """All cotangents in the operator's order, every one a tensor of its own."""
        zeros = [torch.zeros_like(x) for x in self.weights]
        unowned = self.anchor or zeros, self.weights, self.momenta, self.initial_weights or zeros, self.initial_momenta or zeros
        state = [x.clone(memory_format=torch.contiguous_format) for values in unowned for x in values]
        return [*state, *self.tokens]

    def _to_weights(self, flags: Flags) -> None:
        """Where a chunk begins, the anchor was set from the weights, so its cotangent joins theirs."""
        if self.anchor is None:
            return
        self.weights = added(self.weights, self.anchor if flags.all_first else masked(flags.first, self.anchor))
        self.anchor = None if flags.all_first else masked(~flags.first, self.anchor)

    def _to_initial(self, flags: Flags) -> None:
        """Where a row restarts, weights and momenta were set from the initial ones."""
        if flags.all_restart:
            # Copies, because the places of a walk's states are used again.
            weights, momenta = ([x.clone() for x in values] for values in (self.weights, self.momenta))
            self.weights = self.momenta = [torch.zeros_like(x) for x in weights]
        else:
            weights, momenta = masked(flags.restart, self.weights), masked(flags.restart, self.momenta)
            self.weights, self.momenta = masked(~flags.restart, self.weights), masked(~flags.restart, self.momenta)
        self.initial_weights, self.initial_momenta = added(self.initial_weights, weights), added(self.initial_momenta, momenta)
