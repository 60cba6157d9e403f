"""The walk over a scan's chunks: answers, the state after them, and what the backward pass starts from.

Shapes as in :mod:`~titans_graph.kernels.memory_walk`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_graph.kernels.memory_checkpoints import slots, storage
from titans_graph.kernels.memory_compile import FORWARD
from titans_graph.kernels.memory_walk import Flags, Walk, restarted, where
from titans_graph.kernels.native import Native
from titans_graph.kernels.native_calls import Run, run_parts


class Forward:
    """Carries weights, momenta and anchor (``[N, *shape]``) through the chunks, with checkpoints ``every`` chunks, or 0."""

    def __init__(
        self, walk: Walk, every: int, weights: list[Tensor], momenta: list[Tensor], initial: tuple[list[Tensor], list[Tensor]]
    ) -> None:
        q, chunk, steps = walk.tokens[0], walk.chunk, len(walk.flags)
        self.walk, self.steps, self.every = walk, steps, every
        self.weights, self.momenta, self.initial, self.anchor = weights, momenta, initial, walk.entry_anchor
        rows, state = q.shape[0] * q.shape[1], [*weights, *momenta]
        self.whole = q.new_empty(q.shape)
        self.answers = self.whole.view(rows, steps, chunk, q.shape[3]).transpose(0, 1)
        # What bodies give beside answers and states goes to one place, over and over, where it is not to be kept.
        shapes: list[tuple[int, ...]] = [*([()] if walk.form.bounded else []), *([(walk.width,)] if walk.width else [])]
        self.extra = [q.new_empty(rows, steps if every else 1, chunk, *s).expand(-1, steps, -1, *s) for s in shapes]
        self.flat = storage(steps, every, state) if every else []
        self.kept = slots(self.flat, steps, every, state) if every else []
        for x in self.flat:
            x[-1:].zero_()
        self._turns: list[list[Tensor]] = []

    def run(self) -> list[Tensor]:
        """``[y [B, H, G, d], anchor.., weights.., momenta.., saved..]``."""
        c = 0
        while c < self.steps:
            self._start(c, self.walk.flags[c])
            n = self.walk.together(c)
            body = self.walk.native(FORWARD, lambda c=c: self._arguments(c)) if n > 1 else None  # type: ignore[misc]
            if body is None:
                n = 1
                self.chunk(c)
            else:
                self.chunks(c, n, body)
            c += n
        lead, scales = self.walk.tokens[0].shape[:3], int(self.walk.form.bounded)
        extra = [x.view(*lead, *x.shape[3:]) for x in self.extra] if self.every else []
        return [self.whole, *self.anchor, *self.weights, *self.momenta, *extra[:scales], *self.flat, *extra[scales:]]

    def _arguments(self, c: int) -> list[Tensor]:
        return [*self.walk.inputs(c, self.weights, self.momenta), self.walk.slots(c)]

    def chunk(self, c: int) -> None:
        """One chunk."""
        flags, count = self.walk.flags[c], self.walk.count
        at = self.weights if flags.all_first else where(flags.first, self.weights, self.anchor)
        places = [self.answers[c] if flags.full else None, *self._next_slots(c), *(x[:, c] for x in self.extra)]
        part, *ends = self.walk.forward(c, self.weights, self.momenta, places)
        if not flags.full:
            self.answers[c].copy_(torch.where(self.walk.slots(c)[..., None], part, 0.0))
        self.anchor, self.weights, self.momenta = at, ends[:count], ends[count : 2 * count]

    def chunks(self, c: int, n: int, body: Native) -> None:
        """The same for ``n`` chunks from ``c`` on, in one call."""
        count, there = self.walk.count, slice(c, c + n)
        states = list(zip(*self._states(c, n), strict=True))
        extra = [x.transpose(0, 1)[there] for x in self.extra]
        args: list[Run] = [*(x[:-1] for x in states), *self.walk.runs(c, n)]
        out: list[Run] = [self.answers[there], *(x[1:] for x in states), *extra]
        run_parts([body.calls(args, out, n)], len(self.weights[0]))
        self.anchor = [x[-2] for x in states[:count]]
        self.weights, self.momenta = ([x[-1] for x in part] for part in (states[:count], states[count:]))

    def _states(self, c: int, n: int) -> list[list[Tensor]]:
        """Places of the state before each of ``n`` chunks from ``c`` on and after the last.

        They are checkpoints or, where there are none, two places in turns, which keep what they hold until the next call.
        """
        places = [[x.contiguous() for x in (*self.weights, *self.momenta)]]
        for i in range(c, c + n):
            place = [x for x in self._next_slots(i) if x is not None]
            if not place and len(self._turns) < 2:
                self._turns.append([torch.empty_like(x) for x in places[0]])
            elif not place:
                self._turns.reverse()
            places.append(place or self._turns[-1])
        return places

    def _start(self, c: int, flags: Flags) -> None:
        """Rows that restart take the initial state, and a checkpoint is set where one belongs."""
        self.weights, self.momenta = restarted(flags, self.initial, (self.weights, self.momenta))
        if self.every and c % self.every == 0 and not flags.all_restart:
            for slot, x in zip(self.kept, (*self.weights, *self.momenta), strict=True):
                # Most are already there: the chunk before wrote them.
                if x.data_ptr() != slot[c // self.every].data_ptr():
                    slot[c // self.every].copy_(x)

    def _next_slots(self, c: int) -> list[Tensor | None]:
        """Where chunk ``c`` may write the weights and momenta after it: the checkpoint of chunk ``c + 1``, if any."""
        after = c + 1
        if not self.every or after == self.steps or after % self.every:
            return [None] * (2 * self.walk.count)
        return [slot[after // self.every] for slot in self.kept]
