"""Sums of float32 products on a processor's matrix unit (AMX): each operand packed as three bfloat16 pieces, once.

native_pieces.h says why the result is as exact as in float32. Packing an operand costs about half of a product, so what several
sums read on the same side is packed once and kept while it is needed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import cache

import torch

from titans_graph.kernels.native_program import Pack, PackedSum, Program, Step, Sum, Value

TILE, DEEP, PIECES = 16, 32, 3
"""Rows of a left side (columns of a right one) and inner entries of a tile; pieces of a number."""

PLAIN, TILED, PACKING = 1 / 75, 1 / 155, 0.22
"""Nanoseconds of a multiplication in native_products.h, of one on the matrix unit, and of an entry packed (measured on one core
of an Intel Xeon at 2.6 GHz): a sum goes to the unit where that saves more than its packing costs."""


@cache
def available() -> bool:
    """Whether this process may use the matrix unit, and Inductor compiles for it; ``TITANS_GRAPH_AMX=0`` forbids it."""
    if os.environ.get("TITANS_GRAPH_AMX") == "0":
        return False
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    # The system lets a process use the unit when it has asked; not every version of torch can.
    ask: Callable[[], bool] = getattr(torch.cpu, "_init_amx", lambda: False)
    return "amx_tile" in str(pick_vec_isa()) and ask()


def in_pieces(program: Program) -> Program:
    """The same program with its sums of float32 products on the matrix unit, where they fill it."""
    return _Packing(program).program


class _Side:
    """One side of a term: ``x`` as the product reads it, ``[1, M, K]`` of the left and ``[1, K, P]`` of the right."""

    def __init__(self, x: Value, *, left: bool) -> None:
        self.x, self.left = x, left
        _, rows, columns = x.size
        (self.outer, outer_step), (self.inner, inner_step) = (
            ((rows, x.stride[1]), (columns, x.stride[2])) if left else ((columns, x.stride[2]), (rows, x.stride[1]))
        )
        # Rows of one entry have any stride.
        self.along = inner_step == 1 or self.inner == 1
        self.stride = outer_step if self.along else inner_step
        self.readable = self.along or outer_step == 1 or self.outer == 1

    @property
    def tiles(self) -> int:
        return -(-self.outer // TILE) * self.deep

    @property
    def deep(self) -> int:
        return -(-self.inner // DEEP)


class _Packing:
    def __init__(self, program: Program) -> None:
        self.program = Program(program.arguments, list(program.slots), program.kernels, [], program.results)
        self._packed: dict[tuple[Value, bool, bool], Value] = {}
        sums = [step for step in program.steps if isinstance(step, Sum) and _possible(step)]
        self._uses = Counter((side.x, side.left, sign) for step in sums for a, b, sign in _terms(step) for side in (a, b))
        for step in program.steps:
            if isinstance(step, Sum) and _possible(step) and self._worthwhile(step):
                self._add_sum(step)
            else:
                self.program.steps.append(step)
            self._forget(step)

    def _worthwhile(self, step: Sum) -> bool:
        """Whether the unit saves more time than packing costs, which all sums that read an operand share."""
        _, rows, columns = step.out.size
        saved = 0.0
        for a, b, sign in _terms(step):
            tiles = -(-rows // TILE) * -(-columns // TILE) * a.deep
            saved += PLAIN * rows * columns * a.inner - TILED * tiles * TILE * TILE * DEEP
            saved -= sum(PACKING * s.tiles * TILE * DEEP / self._uses[s.x, s.left, sign] for s in (a, b))
        return saved > 0

    def _forget(self, step: Step) -> None:
        """What a step writes is no longer what was packed."""
        written = self.program.written_by(step)
        self._packed = {key: pack for key, pack in self._packed.items() if key[0].slot not in written}

    def _add_sum(self, step: Sum) -> None:
        left, right, deep = [], [], []
        for a, b, sign in _terms(step):
            negated = None if sign > 0 else min((a, b), key=self._wanted)
            left.append(self._pack(a, minus=negated is a))
            right.append(self._pack(b, minus=negated is b))
            deep.append(a.deep)
        self.program.steps.append(PackedSum(tuple(left), tuple(right), tuple(deep), step.out))

    def _wanted(self, side: _Side) -> tuple[int, int]:
        """First the side that is read with its own sign least often, and negated most often."""
        return self._uses[side.x, side.left, 1], -self._uses[side.x, side.left, -1]

    def _pack(self, side: _Side, *, minus: bool) -> Value:
        key = side.x, side.left, minus
        if key not in self._packed:
            entries = side.tiles * TILE * DEEP * PIECES
            pack = self._packed[key] = self.program.dense((1, entries), torch.bfloat16)
            shape = side.along, side.stride, side.outer, side.inner
            self.program.steps.append(Pack(side.x, pack, side.left, minus, *shape))
        return self._packed[key]


def _terms(step: Sum) -> list[tuple[_Side, _Side, int]]:
    sides = zip(step.left, step.right, step.signs, strict=True)
    return [(_Side(a, left=True), _Side(b, left=False), sign) for a, b, sign in sides]


def _possible(step: Sum) -> bool:
    """Whether a sum can use the matrix unit: of one matrix each, in float32, with rows or columns without gaps."""
    if step.out.size[0] != 1 or any(v.dtype != torch.float32 for v in step.values):
        return False
    return all(side.readable for a, b, _ in _terms(step) for side in (a, b))
