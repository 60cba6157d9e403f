"""Memory of an emulated GPU: bytes, and for every two of them who touched them last, so that races are found.

Threads of a program are ordered by barriers alone: between two barriers (an *epoch*) nothing orders two warps. So it is an
error when two warps touch the same bytes in one epoch and one of them changes them, when two programs of a launch do so at
any time, and when bytes are touched while an asynchronous copy or matrix product still uses them.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.emulator.program import EmulationError

Array = NDArray[Any]

CELL = 2
"""Bytes that are watched together: the smallest that kernels write."""

MANY = -1
"""In place of a warp or a program: several."""

UNSIGNED: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}


@dataclass
class Clock:
    """Where a launch is: the ``program`` that runs, the ``epoch`` (both from 1; epochs go on through all programs).

    ``warps``: of every thread, or its lane where a program is one warp; ``places`` of the instructions in the source.
    """

    warps: Array
    program: int = 0
    epoch: int = 0
    places: Sequence[str] = ()

    def place(self, site: int) -> str:
        """The source line of an instruction."""
        return self.places[site]


@dataclass(frozen=True)
class Touch:
    """One instruction's access: byte offsets ``[threads]`` and warps of the threads that take part, bytes a thread."""

    offsets: Array
    warps: Array
    size: int
    site: int

    @property
    def cells(self) -> Array:
        """``[threads, cells a thread]``."""
        count = max(self.size // CELL, 1)
        return (self.offsets // CELL)[:, None] + np.arange(count)


@dataclass
class Space:
    """Bytes that lie together; ``shared``: of one program, otherwise of all of a launch."""

    name: str
    data: NDArray[np.uint8]
    clock: Clock
    shared: bool
    copied: Array = field(init=False)
    multiplied: Array = field(init=False)
    fenced: Array = field(init=False)

    def __post_init__(self) -> None:
        cells = -(-len(self.data) // CELL)
        self._wrote, self._read = (np.zeros(cells, np.int32) for _ in range(2))
        self._writer, self._reader = (np.zeros(cells, np.int32) for _ in range(2))
        self._wrote_program, self._read_program = (np.zeros(cells, np.int32) for _ in range(2))
        # How many copies to a cell and matrix products from it are under way; whether products may read what was written.
        self.copied, self.multiplied = (np.zeros(cells, np.int32) for _ in range(2))
        self.fenced = np.ones(cells, bool)
        self._views = {size: self.data[: len(self.data) // size * size].view(kind) for size, kind in UNSIGNED.items()}

    def gather(self, offsets: Array, size: int, count: int) -> Array:
        """``count`` numbers of ``size`` bytes each at every offset: ``[threads, count]``."""
        found: Array = self._views[size][(offsets // size)[:, None] + np.arange(count)]
        return found

    def scatter(self, offsets: Array, values: Array, touch: Touch) -> None:
        """Write ``[threads, count]``; it is an error when two warps write different numbers to one place.

        Of two lanes of one warp the last wins, as on the chips we know. Triton makes such stores: what several lanes hold
        after a reduction over lanes may differ in the last bit, where the first sum was fused with a product.
        """
        where = (offsets // values.itemsize)[:, None] + np.arange(values.shape[1])
        view = self._views[values.itemsize]
        view[where] = values
        if not np.array_equal(view[where], values):
            warps = touch.warps if len(self.clock.warps) > self.clock.warps.max() + 1 else touch.warps * 0
            places = warps.astype(np.int64)[:, None] * len(view) + where
            _, last = np.unique(places.ravel()[::-1], return_index=True)
            wins = np.zeros(places.size, bool)
            wins[places.size - 1 - last] = True
            if ((view[where] != values) & wins.reshape(where.shape)).any():
                raise self.error("two warps write different numbers to one place in one store", touch)

    def note_read(self, touch: Touch, *, everyone: bool = False) -> None:
        """Check and remember a read; ``everyone``: by all warps, whatever ``touch`` says (a matrix unit)."""
        cells, warps, clock = touch.cells, touch.warps[:, None], self.clock
        if self.copied[cells].any():
            raise self.error("read while a copy to it is under way", touch, self.copied[cells] > 0)
        same = self._wrote[cells] == clock.epoch
        raced = same if everyone else same & (self._writer[cells] != warps)
        if not self.shared:
            raced = raced | ((self._wrote_program[cells] > 0) & (self._wrote_program[cells] != clock.program))
        if raced.any():
            raise self.error("read without a barrier after another warp's write", touch, raced)
        again = self._read[cells] == clock.epoch
        kept = np.where(again & (self._reader[cells] != warps), MANY, np.broadcast_to(warps, cells.shape))
        self._reader[cells] = MANY if everyone else kept
        # Threads of different warps may read one cell in one instruction, of which the last was remembered.
        self._reader[cells[self._reader[cells] != kept]] = MANY
        self._read[cells] = clock.epoch
        others = (self._read_program[cells] > 0) & (self._read_program[cells] != clock.program)
        self._read_program[cells] = np.where(others, MANY, clock.program)

    def note_use(self, cells: Array) -> None:
        """Remember that all warps may have read cells until now."""
        self._read[cells], self._reader[cells] = self.clock.epoch, MANY

    def note_write(self, touch: Touch, changed: Array | None = None, *, fenced: bool = False) -> None:
        """Check and remember a write; ``changed`` ``[threads, cells]``: where it changes anything (None: everywhere).

        ``fenced``: matrix products may read it without a fence.
        """
        cells, warps, clock = touch.cells, touch.warps[:, None], self.clock
        busy = self.copied[cells] + self.multiplied[cells] > 0
        if busy.any():
            raise self.error("written while a copy or a matrix product still uses it", touch, busy)
        raced = (self._wrote[cells] == clock.epoch) & (self._writer[cells] != warps)
        raced = raced | ((self._read[cells] == clock.epoch) & (self._reader[cells] != warps))
        if not self.shared:
            for programs in (self._wrote_program[cells], self._read_program[cells]):
                raced = raced | ((programs != 0) & (programs != clock.program))
        if changed is not None:
            raced = raced & changed
        if raced.any():
            raise self.error("written without a barrier after another warp's access", touch, raced)
        self._wrote[cells], self._writer[cells] = clock.epoch, np.broadcast_to(warps, cells.shape)
        self._wrote_program[cells] = clock.program
        self.fenced[cells] = fenced

    def fresh(self) -> None:
        """A new program's memory: bytes that are no number, untouched."""
        self.data[:] = 0xFF
        self.copied[:] = 0
        self.multiplied[:] = 0
        self.fenced[:] = True

    def error(self, what: str, touch: Touch, where: Array | None = None) -> EmulationError:
        """An error that names the place of this access."""
        row = 0 if where is None else int(np.argmax(np.broadcast_to(where, touch.cells.shape).any(1)))
        about = f"byte {int(touch.offsets[row])} of {self.name}, warp {int(touch.warps[row])}, program {self.clock.program}"
        return EmulationError(f"{self.clock.place(touch.site)}: {about}: {what}")


class Memory:
    """All tensors of a launch, addressed as the processor addresses them, or the one space of shared memory."""

    def __init__(self, spaces: Iterable[tuple[int, Space]], clock: Clock) -> None:
        """``spaces`` with their addresses."""
        placed = sorted(spaces, key=lambda x: x[0])
        self._bases = [base for base, _ in placed]
        self._spaces = [space for _, space in placed]
        self._clock = clock

    def load(self, address: Any, size: int, count: int, mask: Any, site: int) -> list[Array]:
        """``count`` numbers of ``size`` bytes per thread, as unsigned integers; 0 where ``mask`` is false."""
        found = np.zeros((len(self._clock.warps), count), UNSIGNED[size])
        for lanes, space, touch in self.touches(address, size, count, mask, site):
            space.note_read(touch)
            found[lanes] = space.gather(touch.offsets, size, count)
        return list(found.T)

    def store(self, address: Any, size: int, values: Sequence[Any], mask: Any, site: int) -> None:
        """Write one number of ``size`` bytes per thread and entry of ``values``."""
        threads = len(self._clock.warps)
        given = np.stack([np.broadcast_to(x, threads) for x in values], 1).astype(UNSIGNED[size])
        for lanes, space, touch in self.touches(address, size, len(values), mask, site):
            changed = None
            if size >= CELL:
                differs = space.gather(touch.offsets, size, len(values)) != given[lanes]
                changed = np.repeat(differs, size // CELL, 1)
            space.note_write(touch, changed)
            space.scatter(touch.offsets, given[lanes], touch)

    def touches(self, address: Any, size: int, count: int, mask: Any, site: int) -> Iterable[tuple[Array, Space, Touch]]:
        """The threads that take part, space by space."""
        threads = len(self._clock.warps)
        addresses = np.broadcast_to(address, threads).astype(np.int64)
        left = np.ones(threads, bool) if mask is None else np.broadcast_to(mask, threads).copy()
        while left.any():
            first = int(addresses[np.argmax(left)])
            number = bisect_right(self._bases, first) - 1
            space, base = self._spaces[max(number, 0)], self._bases[max(number, 0)]
            offsets = addresses - base
            lanes = left & (offsets >= 0) & (offsets + size * count <= len(space.data))
            if not lanes[np.argmax(left)]:
                where = f"{offsets[np.argmax(left)]} of {space.name} ({len(space.data)} bytes)"
                raise EmulationError(f"{self._clock.place(site)}: out of bounds: byte {where}")
            if (addresses[lanes] % (size * count)).any():
                raise EmulationError(f"{self._clock.place(site)}: address not a multiple of {size * count}")
            yield lanes, space, Touch(offsets[lanes], self._clock.warps[lanes], size * count, site)
            left &= ~lanes


def host_bytes(address: int, size: int) -> NDArray[np.uint8]:
    """The bytes of this process at an address."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
