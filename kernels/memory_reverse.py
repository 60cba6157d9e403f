"""The reverse walk over a scan's chunks: cotangents from the end of a call to its start.

Shapes as in :mod:`~titans_graph.kernels.memory_walk`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_graph.kernels import memory_walk
from titans_graph.kernels.memory_checkpoints import owned
from titans_graph.kernels.memory_compile import ADVANCE, PULLBACK
from titans_graph.kernels.memory_walk import Flags, Walk, added, masked, pieces, restarted
from titans_graph.kernels.native import Native
from titans_graph.kernels.native_calls import PerThread, Run, run_parts, threads_for


class Reverse:
    """The reverse walk: carries the cotangents of anchor, weights and momenta, and gathers those of the tokens.

    ``saved``: what forward kept, checkpoints ``[K, N, *shape]`` of weights and momenta and the products. ``ends`` and ``y``:
    cotangents of ``[anchor'.., weights'.., momenta'..]`` and of the answers.
    """

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
        count = self.count = walk.count
        self.states, self.products = saved[: 2 * count], saved[2 * count :]
        anchor = ends[:count]
        self.weights, self.momenta = ([x.clone() for x in ends[i * count : (i + 1) * count]] for i in (1, 2))
        # Chunks that go together carry none. On a GPU there are no such chunks, and looking would wait for it.
        unused = y.device.type == "cpu" and not any(bool(x.any()) for x in anchor)
        self.anchor: list[Tensor] | None = None if unused else [x.clone() for x in anchor]
        self.initial_weights: list[Tensor] | None = None
        self.initial_momenta: list[Tensor] | None = None
        self.tokens = [x.new_empty(x.shape[0] * x.shape[1], len(walk.flags), walk.chunk, *x.shape[3:]) for x in walk.tokens]
        self.parts = [x.transpose(0, 1) for x in self.tokens]
        self.group: list[tuple[list[Tensor], list[Tensor]]] = []
        self._between: list[list[PerThread]] = []

    def start(self, c: int) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and momenta that chunk ``c`` starts from: a checkpoint, or recomputed from the one before."""
        base = c - c % self.every
        # Later ones are not needed any more, or are made again.
        del self.group[c - base + 1 :]
        if not self.group:
            kept = [x[base // self.every] for x in self.states]
            now, moving = self.initial if self.walk.flags[base].all_restart else (kept[: self.count], kept[self.count :])
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
            # What is recomputed from one checkpoint.
            n = min(self.walk.together(c, backward=True), c % self.every + 1) if self.anchor is None else 1
            bodies = self._bodies(c) if n > 1 else None
            if bodies is None:
                n = 1
                self.chunk(c)
            else:
                self.chunks(c - n + 1, n, *bodies)
            c -= n
            if c < 0:
                self._between.clear()  # Whose memory can be taken for what follows.
            self._to_initial(self.walk.flags[c + 1])
        return self.results()

    def _bodies(self, c: int) -> tuple[Native, Native] | None:
        """What brings the state from one chunk to the next, and the cotangents back; None where they are not native."""

        def advance() -> list[Tensor]:
            inputs = self.walk.inputs(c, self.weights, self.momenta)  # For their shapes.
            return [*inputs[:-6], *inputs[-5:], self.walk.slots(c), *self.kept(c)]

        def pull() -> list[Tensor]:
            inputs, (y,) = self.walk.inputs(c, self.weights, self.momenta), pieces(self.y, self.walk.chunk, c, 1)
            return [*inputs, self.walk.slots(c), *self.kept(c), y, *self.weights, *self.momenta]

        back = self.walk.native(PULLBACK, pull)
        ahead = self.walk.native(ADVANCE, advance) if back else None
        return (ahead, back) if ahead and back else None

    def chunks(self, low: int, n: int, advance: Native, pullback: Native) -> None:
        """The same as :meth:`chunk` for ``n`` chunks down to ``low``, a row through all of them before the next.

        The states in between are made again for that row; the cotangents of weights and momenta are changed in place.
        """
        walk, count = self.walk, self.count
        first = [x.contiguous() for values in self.start(low) for x in values]
        # A body that is not native may have given views.
        carried, places = owned([*self.weights, *self.momenta]), self._places()
        # Before each chunk the state, and its cotangent; that also after the last. A cotangent lies where the state of the
        # chunk after it lay, which nothing reads any more.
        states: list[list[Tensor | PerThread]] = [[x, *own[: n - 1]] for x, own in zip(first, places, strict=True)]
        ends: list[list[Tensor | PerThread]] = [[x, *own[1:n], x] for x, own in zip(carried, places, strict=True)]
        tokens = walk.runs(low, n)
        kept, y = ([pieces(x, walk.chunk, low, n) for x in values] for values in (self.products, [self.y]))
        before: list[Run] = [*(x[:-1] for x in states), *(x[:-1] for x in (*tokens[1:], *kept))]
        args: list[Run] = [*states, *tokens, *kept, *y, *(x[1:] for x in ends)]
        out: list[Run] = [*(x[:-1] for x in ends), *(x[low : low + n] for x in self.parts)]
        ahead = advance.calls(before, [x[1:] for x in states], n - 1)
        run_parts([ahead, pullback.calls(args, out, n, backward=True)], len(first[0]))
        self.weights, self.momenta = carried[:count], carried[count:]

    def _places(self) -> list[list[PerThread]]:
        """For every weight and momentum: places of what there is of it between two checkpoints."""
        if not self._between:
            most, threads = min(self.every, memory_walk.TOGETHER), threads_for(len(self.weights[0]))
            made = [x.new_empty(most, threads, *x.shape[1:]) for x in (*self.weights, *self.momenta)]
            self._between = [[PerThread(x) for x in places.unbind(0)] for places in made]
        return self._between

    def chunk(self, c: int) -> None:
        """Carry the cotangents from the end of chunk ``c`` to its start."""
        walk, flags, count = self.walk, self.walk.flags[c], self.count
        inputs = walk.inputs(c, *self.start(c))
        (y,) = pieces(self.y, walk.chunk, c, 1)
        if not flags.full:
            y = torch.where(walk.slots(c)[..., None], y, 0.0)
        places = [parts[c] for parts in self.parts]
        state = [None] * (len(inputs) - len(places))
        grads = walk.backward(c, inputs, self.kept(c), [y, *self.weights, *self.momenta], [*state, *places])
        if flags.resumed:
            body_anchor, grads = grads[:count], grads[count:]
            # In rows that begin their chunk here the anchor is the weights.
            self.anchor = added(self.anchor, body_anchor)
        self.weights, self.momenta = grads[:count], grads[count : 2 * count]
        self._to_weights(flags)

    def results(self) -> list[Tensor]:
        """All cotangents in the operator's order, every one a tensor of its own."""
        state = self.anchor, self.weights, self.momenta, self.initial_weights, self.initial_momenta
        zeros = [[torch.zeros_like(x) for x in self.weights] if values is None else values for values in state]
        return [*owned([x for values in zeros for x in values]), *self.tokens]

    def _to_weights(self, flags: Flags) -> None:
        """Where a chunk begins, the anchor was set from the weights, so its cotangent joins theirs."""
        if self.anchor is None:
            return
        self.weights = added(self.weights, self.anchor if flags.all_first else masked(flags.first, self.anchor))
        self.anchor = None if flags.all_first else masked(~flags.first, self.anchor)

    def _to_initial(self, flags: Flags) -> None:
        """Where a row restarts, weights and momenta were set from the initial ones."""
        if not flags.any_restart:
            return
        weights, momenta = self.weights, self.momenta
        if flags.all_restart:
            self.weights, self.momenta = ([torch.zeros_like(x) for x in values] for values in (weights, momenta))
        else:
            self.weights, self.momenta = (masked(~flags.restart, values) for values in (weights, momenta))
            weights, momenta = (masked(flags.restart, values) for values in (weights, momenta))
        self.initial_weights, self.initial_momenta = added(self.initial_weights, weights), added(self.initial_momenta, momenta)
