"""The walk over a scan's chunks: answers, the state after them, and what the backward pass starts from.

Shapes as in :mod:`~titans_graph.kernels.memory_walk`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_graph.kernels.memory_checkpoints import SPARE, size_of, slots, spacing
from titans_graph.kernels.memory_compile import FORWARD
from titans_graph.kernels.memory_walk import Flags, Walk, restarted, where


class Forward:
    """Carries weights, momenta and anchor (``[N, *shape]``) through the chunks, with checkpoints ``every`` chunks, or 0."""

    def __init__(
        self, walk: Walk, every: int, weights: list[Tensor], momenta: list[Tensor], initial: tuple[list[Tensor], list[Tensor]]
    ) -> None:
        q, chunk, steps = walk.tokens[0], walk.chunk, len(walk.flags)
        self.walk, self.steps, self.weights, self.momenta, self.initial = walk, steps, weights, momenta, initial
        self.count, self.anchor = len(weights), walk.entry_anchor
        self.whole = q.new_empty(q.shape)
        y = self.whole.view(q.shape[0] * q.shape[1], steps, chunk, q.shape[3])
        self.answers = y.unbind(1)
        # What bodies give beside answers and states goes to one place, over and over, where it is not to be kept.
        shapes: list[tuple[int, ...]] = [*([()] if walk.form.bounded else []), *([(walk.width,)] if walk.width else [])]
        self.extra = [y.new_empty(y.shape[0], steps if every else 1, chunk, *s).expand(-1, steps, -1, *s) for s in shapes]
        size, state = size_of((*weights, *momenta)), (*weights, *momenta)
        self.kept = [x.new_empty(slots(steps, every, size), *x.shape) for x in state] if every else []
        for slot in self.kept:
            slot[-SPARE:].zero_()
        self.every = spacing(steps, every, size)

    def run(self) -> list[Tensor]:
        """``[y [B, H, G, d], anchor.., weights.., momenta.., saved..]``."""
        c = 0
        while c < self.steps:
            self._start(c, self.walk.flags[c])
            n = self.walk.together(c, FORWARD)
            if n > 1:
                self.chunks(c, n)
            else:
                self.chunk(c)
            c += n
        lead, scales = self.walk.tokens[0].shape[:3], int(self.walk.form.bounded)
        extra = [x.view(*lead, *x.shape[3:]) for x in self.extra] if self.every else []
        return [self.whole, *self.anchor, *self.weights, *self.momenta, *extra[:scales], *self.kept, *extra[scales:]]

    def chunk(self, c: int) -> None:
        """One chunk."""
        flags, count = self.walk.flags[c], self.count
        at = self.weights if flags.all_first else where(flags.first, self.weights, self.anchor)
        places = [self.answers[c] if flags.full else None, *self._next_slots(c), *(x[:, c] for x in self.extra)]
        part, *ends = self.walk.forward(c, self.weights, self.momenta, places)
        if not flags.full:
            self.answers[c].copy_(torch.where(self.walk.slots(c)[..., None], part, 0.0))
        self.anchor, self.weights, self.momenta = at, ends[:count], ends[count : 2 * count]

    def chunks(self, c: int, n: int) -> None:
        """The same for ``n`` chunks from ``c`` on, in one call."""
        count, tokens = self.count, self.walk.token_pieces(c, n)
        first = [x.contiguous() for x in (*self.weights, *self.momenta)]
        states = self.walk.states(first, [self._next_slots(i) for i in range(c, c + n)])
        results = [[self.answers[c + i], *states[i + 1], *(x[:, c + i] for x in self.extra)] for i in range(n)]
        self.walk.sweep(FORWARD, [[*states[i], *tokens[i]] for i in range(n)], results)
        self.anchor, self.weights, self.momenta = states[-2][:count], states[-1][:count], states[-1][count:]

    def _start(self, c: int, flags: Flags) -> None:
        """Rows that restart take the initial state, and a checkpoint is set where one belongs."""
        self.weights, self.momenta = restarted(flags, self.initial, (self.weights, self.momenta))
        if self.every and c % self.every == 0:
            for slot, x in zip(self.kept, (*self.weights, *self.momenta), strict=True):
                # Most are already there: the chunk before wrote them.
                if x.data_ptr() != slot[c // self.every].data_ptr():
                    slot[c // self.every].copy_(x)

    def _next_slots(self, c: int) -> list[Tensor | None]:
        """Where chunk ``c`` may write the weights and momenta after it: the checkpoint of chunk ``c + 1``, if any."""
        after = c + 1
        if not self.every or after == self.steps or after % self.every:
            return [None] * (2 * self.count)
        return [slot[after // self.every] for slot in self.kept]
