"""One program of a launch at work: its memories, barriers, asynchronous copies and matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.emulator.matrix import descriptor_offsets, floats, fragment_a, fragment_c, into_fragment_c, joined, split
from tests.emulator.memory import Array, Clock, Memory, Space, Touch
from tests.emulator.program import EmulationError

WARP = 32


@dataclass
class Copy:
    """An asynchronous copy under way: what was read when it began, and how to read it again when it ends."""

    lanes: Array
    target: Any
    source: Any
    size: int
    taken: Any
    seen: Array
    site: int


@dataclass
class Core:
    """What the instructions of a translated kernel call; threads all at once, ``[threads]`` in every array.

    ``ran``: how often every block of instructions ran.
    """

    clock: Clock
    tensors: Memory
    memory: Space
    ran: list[int]
    copies: list[list[Copy]] = field(default_factory=lambda: [[]])
    products: list[list[Array]] = field(default_factory=lambda: [[]])

    def __post_init__(self) -> None:
        self.shared = Memory([(0, self.memory)], self.clock)
        self.threads = len(self.clock.warps)
        self._at = np.zeros(self.threads, np.int64)

    def begin(self) -> None:
        """A new program."""
        self.memory.fresh()
        self.copies, self.products = [[]], [[]]
        self.clock.program += 1
        self.clock.epoch += 1

    def end(self) -> None:
        """After a program's last instruction."""
        if any(self.products):
            raise EmulationError("a matrix product was never waited for")
        if any(self.copies):
            raise EmulationError("an asynchronous copy was never waited for")

    def barrier(self) -> None:
        """All threads wait for each other."""
        self.clock.epoch += 1

    def part(self, taken: Any, target: int, beyond: int) -> tuple[int, Any]:
        """Where threads are after a branch: the block that comes next, and which of them are there (None: all).

        Those who are furthest behind go first, so that threads who parted meet again where their ways do.
        """
        return self.go(None, np.where(np.broadcast_to(taken, self.threads), target, beyond))

    def go(self, active: Any, target: Any) -> tuple[int, Any]:
        """As :meth:`part`, for the threads that are ``active``: to the block ``target`` each."""
        self._at = np.where(True if active is None else active, target, 0 if active is None else self._at)
        first = int(self._at.min())
        now = self._at == first
        return first, None if now.all() else now

    def refuse(self, site: int) -> None:
        """An instruction that all threads of a warp must run together."""
        raise EmulationError(f"{self.clock.place(site)}: threads that parted run what needs all of them")

    def meet(self) -> None:
        """The lanes of every warp wait for each other."""
        if self.threads == WARP:
            self.clock.epoch += 1

    def same(self, predicate: Any, site: int) -> bool:
        """A predicate that must be the same for all threads."""
        taken = np.asarray(predicate)
        if taken.ndim and taken.any() != taken.all():
            raise EmulationError(f"{self.clock.place(site)}: not the same for all threads")
        return bool(taken.any())

    def copy(self, target: Any, source: Any, size: int, taken: Any, mask: Any, site: int) -> None:
        """``cp.async``: ``taken`` bytes a thread are read, the rest of ``size`` is zero."""
        lanes = np.ones(self.threads, bool) if mask is None else np.broadcast_to(mask, self.threads).copy()
        taken = np.broadcast_to(taken, self.threads)
        if not np.isin(taken[lanes], (0, size)).all():
            raise EmulationError(f"{self.clock.place(site)}: an asynchronous copy of a part is not emulated")
        one = Copy(lanes, target, source, size, taken, self._source(lanes, source, size, taken, site), site)
        for _, space, touch in self.shared.touches(target, size, 1, lanes, site):
            space.note_write(touch)
            space.copied[touch.cells] += 1
            space.data[touch.offsets[:, None] + np.arange(size)] = 0xFF
        self.copies[-1].append(one)

    def _source(self, lanes: Array, source: Any, size: int, taken: Array, site: int) -> Array:
        words = self.tensors.load(source, min(size, 8), size // min(size, 8), lanes & (taken > 0), site)
        return np.stack(words, 1)

    def commit(self) -> None:
        """``cp.async.commit_group``."""
        self.copies.append([])

    def wait(self, left: int) -> None:
        """``cp.async.wait_group``: all but the last ``left`` groups have ended."""
        while len(self.copies) - 1 > left:
            for one in self.copies.pop(0):
                self._arrive(one)

    def _arrive(self, one: Copy) -> None:
        if not np.array_equal(self._source(one.lanes, one.source, one.size, one.taken, one.site), one.seen):
            raise EmulationError(f"{self.clock.place(one.site)}: what is copied changed while it was copied")
        for lanes, space, touch in self.shared.touches(one.target, one.size, 1, one.lanes, one.site):
            space.copied[touch.cells] -= 1
            # Triton fences what threads store, not what ``cp.async`` brings, in all its kernels for this chip.
            space.note_write(touch, fenced=True)
            space.scatter(touch.offsets, one.seen[lanes], touch)

    def fence(self) -> None:
        """``fence.proxy.async``: matrix products may read what was written to shared memory before."""
        self.memory.fenced[:] = True

    def shuffle(self, values: Any, lane: Any, kind: str) -> Array:
        """``shfl.sync``: every thread's value of another lane of its warp."""
        lanes = np.arange(self.threads) % WARP
        lane = np.broadcast_to(lane, self.threads).astype(np.int64)
        wanted = {"bfly": lanes ^ lane, "idx": lane % WARP, "up": lanes - lane, "down": lanes + lane}[kind]
        wanted = np.where((wanted < 0) | (wanted >= WARP), lanes, wanted)
        found: Array = np.broadcast_to(values, self.threads)[np.arange(self.threads) // WARP * WARP + wanted]
        return found

    def load_matrix(self, address: Any, count: int, transposed: bool, mask: Any, site: int) -> list[Array]:
        """``ldmatrix``: ``count`` matrices of 8 rows of 16 bytes, whose addresses the first lanes hold."""
        rows = self._rows(address, count, mask)
        words = np.stack(self.shared.load(address, 4, 4, rows, site), 1)
        halves = split(words.reshape(-1, WARP, 4)[:, : 8 * count]).reshape(-1, count, 8, 8)
        if transposed:
            halves = halves.swapaxes(2, 3)
        loaded = joined(halves.reshape(-1, count, WARP, 2))
        return [np.ascontiguousarray(loaded[:, i]).reshape(-1) for i in range(count)]

    def store_matrix(self, address: Any, values: Sequence[Any], transposed: bool, mask: Any, site: int) -> None:
        """``stmatrix``: the reverse of :meth:`load_matrix`."""
        count = len(values)
        words = np.stack([np.broadcast_to(x, self.threads) for x in values]).reshape(count, -1, WARP)
        halves = split(words).reshape(count, -1, 8, 8)
        if transposed:
            halves = halves.swapaxes(2, 3)
        given = np.zeros((self.threads // WARP, WARP, 4), np.uint32)
        given[:, : 8 * count] = joined(halves.reshape(count, -1, 8, 4, 2)).swapaxes(0, 1).reshape(-1, 8 * count, 4)
        self.shared.store(address, 4, list(given.reshape(-1, 4).T), self._rows(address, count, mask), site)

    def _rows(self, address: Any, count: int, mask: Any) -> Array:
        rows = np.arange(self.threads) % WARP < 8 * count
        return rows if mask is None else rows & np.broadcast_to(mask, self.threads)

    def multiply(self, a: Sequence[Any], b: Sequence[Any], c: Sequence[Any], kind: str) -> list[Array]:
        """``mma.m16n8k16``: ``a @ b + c`` of every warp, 16 x 16 times 16 x 8, sums in fp32."""
        left = fragment_a([np.broadcast_to(x, self.threads) for x in a], kind)
        right = fragment_a([np.broadcast_to(x, self.threads) for x in (b[0], b[0], b[1], b[1])], kind)[:, :8]
        total = left @ right.swapaxes(1, 2) + fragment_c([np.broadcast_to(x, self.threads) for x in c])
        return into_fragment_c(total)

    def group_multiply(
        self, a: Any, b: Any, c: Sequence[Any], columns: int, kept: Any, transposed: tuple[bool, bool],
        kind: str, site: int,
    ) -> list[Array]:  # fmt: skip
        """``wgmma.m64nNk16``: of every four warps; ``a`` in registers or, like ``b``, the descriptor of shared memory."""
        groups = self.threads // (4 * WARP)
        right = self._operand(b, columns, transposed[1], kind, site)
        if isinstance(a, Sequence):
            left = fragment_a([np.broadcast_to(x, self.threads) for x in a], kind).reshape(groups, 64, 16)
        else:
            left = self._operand(a, 64, transposed[0], kind, site)
        product = (left @ right.swapaxes(1, 2)).reshape(groups * 4, 16, columns)
        if self.same(kept, site):
            product = product + fragment_c([np.broadcast_to(x, self.threads) for x in c])
        return into_fragment_c(product)

    def _operand(self, descriptor: Any, rows: int, transposed: bool, kind: str, site: int) -> Array:
        """An operand in shared memory as ``[groups, rows, 16]``."""
        words = np.broadcast_to(descriptor, self.threads).reshape(-1, 4 * WARP)
        if (words != words[:, :1]).any():
            raise EmulationError(f"{self.clock.place(site)}: threads of a group give different descriptors")
        found = []
        for number, word in enumerate(words[:, 0]):
            offsets = descriptor_offsets(int(word), rows, transposed)
            if offsets.max() + 2 > len(self.memory.data):
                raise EmulationError(f"{self.clock.place(site)}: a matrix product reads beyond shared memory")
            touch = Touch(offsets.reshape(-1), np.full(offsets.size, 4 * number), 2, site)
            if not self.memory.fenced[touch.cells].all():
                raise self.memory.error("multiplied without a fence after it was written", touch)
            self.memory.note_read(touch, everyone=True)
            np.add.at(self.memory.multiplied, touch.cells, 1)
            self.products[-1].append(touch.cells)
            found.append(self.memory.gather(touch.offsets, 2, 1).reshape(offsets.shape))
        return floats(np.stack(found), kind)

    def commit_products(self) -> None:
        """``wgmma.commit_group``."""
        self.products.append([])

    def wait_products(self, left: int) -> None:
        """``wgmma.wait_group``."""
        while len(self.products) - 1 > left:
            for cells in self.products.pop(0):
                np.subtract.at(self.memory.multiplied, cells, 1)
                self.memory.note_use(cells)
