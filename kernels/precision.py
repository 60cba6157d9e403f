"""In which type a memory's running values are kept."""

from __future__ import annotations

from torch import Tensor


def running(x: Tensor) -> Tensor:
    """``x`` in the type of a memory's weights, momenta and gates while it reads: float32 in place of half precision.

    A token changes a weight by less than bfloat16 tells apart, and a keep of 0.9975 rounds to 0.9961 in it: in half
    precision what single tokens do to a memory would be lost, or forgotten too fast.
    """
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x
