"""Which thread holds what of a matrix operand, and where shared memory holds it: the tables of the PTX manual."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.emulator.memory import Array
from tests.emulator.program import EmulationError


def split(words: Array) -> Array:
    """32-bit words ``[..]`` as two halves ``[.., 2]``, the lower first."""
    return np.ascontiguousarray(words, np.uint32)[..., None].view(np.uint16)


def joined(halves: Array) -> Array:
    """The reverse of :func:`split`."""
    return np.ascontiguousarray(halves, np.uint16).view(np.uint32)[..., 0]


def floats(halves: Array, kind: str) -> Array:
    """16-bit numbers, bf16 or f16, as fp32."""
    if kind == "bf16":
        return (halves.astype(np.uint32) << 16).view(np.float32)
    return halves.view(np.float16).astype(np.float32)


def fragment_a(registers: Sequence[Array], kind: str) -> Array:
    """Four registers a thread as a matrix ``[warps, 16, 16]`` of every warp.

    Lane ``4 g + t`` holds row ``g`` (registers 0, 2) and ``g + 8`` (1, 3), columns ``2 t`` and ``2 t + 1`` (0, 1) and those
    plus 8 (2, 3). An operand of 8 columns is one transposed, whose rows 8 to 15 are not used.
    """
    halves = split(np.stack(registers)).reshape(2, 2, -1, 8, 4, 2)
    return floats(np.ascontiguousarray(halves.transpose(2, 1, 3, 0, 4, 5)).reshape(-1, 16, 16), kind)


def fragment_c(registers: Sequence[Array]) -> Array:
    """Accumulators, four a thread for every 8 columns, as ``[warps, 16, columns]``.

    Lane ``4 g + t`` holds row ``g`` (registers 0, 1) and ``g + 8`` (2, 3), columns ``2 t`` and ``2 t + 1``.
    """
    parts = np.stack(registers).view(np.float32).reshape(-1, 2, 2, registers[0].size // 32, 8, 4)
    return parts.transpose(3, 1, 4, 0, 5, 2).reshape(-1, 16, len(registers) * 2)


def into_fragment_c(matrix: Array) -> list[Array]:
    """The reverse of :func:`fragment_c`."""
    warps, _, columns = matrix.shape
    parts = matrix.reshape(warps, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return list(np.ascontiguousarray(parts, np.float32).reshape(columns // 2, warps * 32).view(np.uint32))


def descriptor_offsets(descriptor: int, rows: int, transposed: bool) -> Array:
    """Byte offsets in shared memory of an operand of 16-bit numbers, ``[rows, 16]``; 16 is the inner size of a product.

    ``transposed``: rows lie together, not the inner size. The descriptor holds where it begins, the offsets of leading
    and strided dimension (in 16 bytes), and a swizzle: of 128, 64 or 32 bytes, which XORs address bits 4-6, 4-5 or 4
    with bits 7-9, 7-8 or 7.
    """
    begin, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = descriptor >> 62
    if mode == 0 or descriptor >> 49 & 7:
        raise EmulationError("an operand without a swizzle, or with a base offset, is not emulated")
    width = {1: 128, 2: 64, 3: 32}[mode]
    row, inner = np.arange(rows)[:, None], np.arange(16)[None, :]
    if transposed:
        across, within = np.divmod(row * 2, width)
        place = begin + across * leading + within + inner // 8 * stride + inner % 8 * width
    else:
        place = begin + row // 8 * stride + row % 8 * width + inner * 2
    place = place ^ (place >> 3 & width - 16)
    return np.asarray(place)
