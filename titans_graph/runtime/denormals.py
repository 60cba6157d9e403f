"""Numbers too small for full precision, and the switch that makes processors take them for zero."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """While entered, this thread, and threads started meanwhile, take denormal floats for zero.

    Memory that decays ends in denormals, with which many processors are several times slower. The switch belongs to
    the whole thread, Python's own floats included, so it is put back.
    """
    before = sys.float_info.min / 2 == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
