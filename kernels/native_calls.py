"""Calls of native bodies: several of one body in a row, and of several bodies, before the next row begins.

A row (a head of one sequence) goes through all calls of all parts (native_calls.h) before the next row does. What one call
leaves for the next is still in the caches, what no row keeps has a place of the thread, and threads wait for each other once.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PerThread(NamedTuple):
    """``[threads, ...]``: a place for every thread, where a row leaves something for its own later calls alone."""

    places: Tensor


Run = Tensor | Sequence[Tensor | PerThread]
"""An argument or a result of several calls: ``[calls, N, ...]``, or one ``[N, ...]`` or :class:`PerThread` for every call."""


class Body(NamedTuple):
    """A loaded body: its function, ``run_parts`` and ``run_once``, the strides of a row of every argument and result, and
    bytes of work space.
    """

    function: int
    run: Callable[..., None]
    once: Callable[..., None]
    strides: Sequence[tuple[int, ...]]
    space: int


class _Part(ctypes.Structure):
    _fields_ = (("body", ctypes.c_void_p), ("table", ctypes.c_void_p), ("calls", ctypes.c_int64))


class Part(NamedTuple):
    """``calls`` calls of a body, as :func:`part` makes them: addresses of tensors that whoever made it keeps alive.

    ``threads``: how many have a place wherever there is one for each.
    """

    body: Body
    table: array[int]
    calls: int
    threads: int


def loaded(library: Any, strides: Sequence[tuple[int, ...]], space: int) -> Body:
    """A body from its library."""
    address, number = ctypes.c_void_p, ctypes.c_int64
    run, once = library.run, library.once
    run.argtypes, run.restype = [address, number, number, number, address, number], None
    once.argtypes, once.restype = [address, number, number, address, number], None
    function = ctypes.cast(library.body, address).value
    assert function is not None
    return Body(function, run, once, strides, space)


def part(body: Body, runs: Sequence[Run], calls: int, *, backward: bool = False) -> Part:
    """``calls`` calls of a body, from the first to the last or ``backward``; ``runs``: its arguments and results.

    The results of a call may be arguments of the next. Raises ValueError where rows have gaps in themselves.
    """
    width = 3 * len(runs)
    table = [0] * (width * calls)
    for i, (run, row) in enumerate(zip(runs, body.strides, strict=True)):
        columns = _places(run, row)
        if len(columns[0]) != calls:
            raise ValueError(f"{calls} calls, and {len(columns[0])} places of an argument or a result")
        for j, column in enumerate(columns, 3 * i):
            table[j::width] = reversed(column) if backward else column
    places = [x.places for run in runs if not isinstance(run, Tensor) for x in run if isinstance(x, PerThread)]
    return Part(body, array("q", table), calls, min((len(x) for x in places), default=sys.maxsize))


def run_parts(parts: Sequence[Part], rows: int) -> None:
    """All parts, row after row."""
    structure = (_Part * len(parts))(*[_Part(p.body.function, p.table.buffer_info()[0], p.calls) for p in parts])
    threads, space = min(threads_for(rows), *(p.threads for p in parts)), max(p.body.space for p in parts)
    parts[0].body.run(structure, len(parts), rows, threads, _space(threads * space), space)


def run_once(body: Body, places: Sequence[int], rows: int) -> None:
    """One call, without the work of :func:`part`, which is a quarter of a token's time in decoding.

    ``places``: of every argument and result its address, bytes from row to row, and 0.
    """
    table, threads = array("q", places), threads_for(rows)
    body.once(table.buffer_info()[0], rows, threads, _space(threads * body.space), body.space)


def threads_for(rows: int) -> int:
    """How many threads work on so many rows."""
    return max(1, min(rows, torch.get_num_threads()))


def _places(run: Run, row: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
    """Start, and bytes from row to row and from thread to thread, of every call; ``row``: the strides of one."""
    if isinstance(run, Tensor):
        have, size, start, calls = run.stride(), run.element_size(), run.data_ptr(), len(run)
        _check(have[2:], row, run.shape[2:])
        between, step = have[0] * size, have[1] * size
        return [start + i * between for i in range(calls)], [step] * calls, [0] * calls
    tensors = [x.places if isinstance(x, PerThread) else x for x in run]
    size, strides = tensors[0].element_size(), [x.stride() for x in tensors]
    for have in set(strides):
        _check(have[1:], row, tensors[0].shape[1:])
    shared = [isinstance(x, PerThread) for x in run]
    steps = [0 if own else have[0] * size for own, have in zip(shared, strides, strict=True)]
    threads = [have[0] * size if own else 0 for own, have in zip(shared, strides, strict=True)]
    return [x.data_ptr() for x in tensors], steps, threads


def _check(have: tuple[int, ...], wanted: tuple[int, ...], shape: Sequence[int]) -> None:
    """Strides are those wanted, as far as there is more than one entry along a dimension."""
    if have != wanted and not all(s == h or n == 1 for s, h, n in zip(wanted, have, shape, strict=True)):
        raise ValueError(f"every call needs rows with strides {wanted}; got {have}")


_SPACES = threading.local()


def _space(size: int) -> int:
    """The address of a work space of this thread, kept for the next call: then it is still in the caches."""
    space: Tensor | None = getattr(_SPACES, "space", None)
    if space is None or space.numel() < size:
        space = _SPACES.space = torch.empty(size, dtype=torch.uint8, device="cpu")
    return space.data_ptr()
