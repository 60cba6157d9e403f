"""In which type a memory's running values are kept, and computed where an operator does not see to it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def running(x: Tensor) -> Tensor:
    """``x`` in the type of a memory's weights, momenta and gates while it reads: float32 in place of half precision.

    A token changes a weight by less than bfloat16 tells apart, and a keep of 0.9975 rounds to 0.9961 in it: in half
    precision what single tokens do to a memory would be lost, or forgotten too fast.
    """
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x


def no_autocast(device: str) -> AbstractContextManager[object]:
    """Autocast off on a type of device; on ``meta`` torch knows none."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def without_autocast(run: Callable[P, R]) -> Callable[P, R]:
    """``run`` in the types of its arguments, as the operators for whole chunks are: autocast would round its products.

    The device is that of the first tensor among the positional arguments.
    """

    @wraps(run)
    def inside(*args: P.args, **options: P.kwargs) -> R:
        with no_autocast(next(x for x in args if isinstance(x, Tensor)).device.type):
            return run(*args, **options)

    return inside
