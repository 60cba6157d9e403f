"""The short convolution of a stream on a processor: native_convolution.h, built once for all shapes.

Inductor makes several passes over a stream of it, reads every tap through an index, and keeps or writes out a dozen streams in
backward; this makes one pass each way and keeps the input alone (docs/results.md).
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_graph.kernels.memory_compile import compiler_available
from titans_graph.kernels.native_source import PREFIX, header

log = logging.getLogger("titans_graph.kernels")

WIDTH, MOST = 64, 64
"""Columns of a task where no norm ties a head's together; taps, as in the header."""

_POINTERS = ("x", "tail", "taps", "bias", "lead", "end", "position", "y", "tail_out", "gy", "gtail_out", "gx", "gtail", "gtaps")
_NUMBERS = ("batch", "slots", "heads", "dim", "kernel", "activated", "unit", "width", "threads")


class _Streams(ctypes.Structure):
    _fields_ = tuple([(n, ctypes.c_void_p) for n in _POINTERS] + [(n, ctypes.c_int64) for n in _NUMBERS])


class Library(NamedTuple):
    """The two passes, each for every type of number."""

    forward: Mapping[torch.dtype, Callable[[Any], None]]
    backward: Mapping[torch.dtype, Callable[[Any], None]]


_LOADING = threading.Lock()


def library(taps: int) -> Library | None:
    """The library; None for more taps than it takes, and where it cannot be built, as the log tells."""
    with _LOADING:
        return _loaded() if taps <= MOST and compiler_available() else None


@cache
def _loaded() -> Library | None:
    try:
        from torch._inductor.codecache import CppCodeCache

        found = CppCodeCache.load(
            f"{PREFIX}\n#include <algorithm>\n#include <cmath>\n#include <vector>\n{header('convolution')}"
        )
        kinds = {torch.float32: "float", torch.float64: "double"}
        return Library(*({t: getattr(found, f"{name}_{n}") for t, n in kinds.items()} for name in Library._fields))
    except Exception as problem:  # Whatever a compiler or a version of torch says: it is not needed.
        log.info("short convolution: no native code (%s); tensor operations", type(problem).__name__)
        return None


def prepare() -> None:
    """Begin to build it, in the background."""
    # Here, and not by two threads at a time: modules that import each other would be half there for one of them.
    with suppress(ImportError):  # Then there is no library, as the log will tell.
        from torch._inductor import codecache, cpp_builder  # noqa: F401
    threading.Thread(target=library, args=(1,), daemon=True).start()


def run(
    passes: Mapping[torch.dtype, Callable[[Any], None]],
    tensors: Mapping[str, Tensor],
    heads: int,
    *,
    activated: bool,
    unit: bool,
) -> None:
    """One of the passes over contiguous ``tensors``, by their names in the header."""
    (batch, slots, dim), kernel = tensors["x"].shape, len(tensors["taps"])
    width = dim // heads if unit else WIDTH
    threads = max(1, min(torch.get_num_threads(), batch * heads * -(-dim // heads // width)))
    numbers = batch, slots, heads, dim, kernel, int(activated), int(unit), width, threads
    places = [tensors[n].data_ptr() if n in tensors else None for n in _POINTERS]
    passes[tensors["x"].dtype](ctypes.byref(_Streams(*places, *numbers)))
