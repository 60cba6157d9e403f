"""Arithmetic of PTX on unsigned integers that hold any type's bits; named by translated code (``translate.py``)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulator.matrix import floats

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64


def to_bf16(x: Any) -> Any:
    """fp32 numbers as the bits of the nearest bf16 (ties to even), ``uint16``."""
    bits = np.asarray(x, f4).view(u4)
    near = (bits + u4(0x7FFF) + (bits >> u4(16) & u4(1))) >> u4(16)
    return np.where(np.isnan(x), u4(0x7FFF), near).astype(u2)


def to_f16(x: Any) -> Any:
    """fp32 numbers as the bits of the nearest fp16."""
    return np.asarray(x, f4).astype(f2).view(u2)


def pair(high: Any, low: Any) -> Any:
    """Two ``uint16`` as one ``uint32``."""
    return np.asarray(high).astype(u4) << u4(16) | np.asarray(low).astype(u4)


def halves(words: Any, kind: str, threads: int) -> Any:
    """Words of two fp16 or bf16 as fp32 numbers, the lower first: ``[threads, 2]``."""
    return floats(np.ascontiguousarray(np.broadcast_to(words, threads), u4).view(u2).reshape(-1, 2), kind)


def fma(a: Any, b: Any, c: Any) -> Any:
    """``a b + c`` of fp32 numbers, the product exact; the sum is rounded in fp64 first, which seldom shows."""
    return (np.asarray(a, f8) * b + c).astype(f4)


def shift_left(a: Any, count: Any, bits: int) -> Any:
    """Zero where ``count`` is ``bits`` or more."""
    kind = u8 if bits == 64 else u4 if bits == 32 else u2
    count = np.asarray(count)
    return np.where(count >= bits, kind(0), a << np.minimum(count, bits - 1).astype(kind))


def shift_right(a: Any, count: Any, bits: int) -> Any:
    """As :func:`shift_left`; of signed numbers the sign is what comes in."""
    kind = np.asarray(a).dtype.type
    count = np.asarray(count)
    shifted = a >> np.minimum(count, bits - 1).astype(kind)
    return shifted if np.issubdtype(kind, np.signedinteger) else np.where(count >= bits, kind(0), shifted)


def extract(a: Any, begin: Any, length: Any, signed: bool) -> Any:
    """``bfe``: bits of a 32-bit number, the highest of them its sign where ``signed``."""
    begin, length = (np.asarray(x).astype(u8) & u8(255) for x in (begin, length))
    wide = np.asarray(a).astype(u4).view(i4).astype(i8).view(u8) if signed else np.asarray(a).astype(u8)
    field = wide >> np.minimum(begin, u8(63)) & (u8(1) << np.minimum(length, u8(63))) - u8(1)
    if signed:
        top = u8(1) << np.maximum(length, u8(1)) - u8(1)
        field = np.where(length == 0, u8(0), (field ^ top) - top)
    return field.astype(u4)


def permute(a: Any, b: Any, selector: Any) -> Any:
    """``prmt``: four bytes, each chosen from the eight of ``b`` and ``a`` (bit 3 of a choice: the byte's sign)."""
    both = np.asarray(b).astype(u8) << u8(32) | np.asarray(a).astype(u8)
    result: Any = u4(0)
    for i in range(4):
        choice = np.asarray(selector).astype(u8) >> u8(4 * i) & u8(15)
        byte = both >> (choice & u8(7)) * u8(8) & u8(255)
        byte = np.where(choice & u8(8), np.where(byte & u8(128), u8(255), u8(0)), byte)
        result = result | byte.astype(u4) << u4(8 * i)
    return result


def high(a: Any, b: Any) -> Any:
    """The upper half of a product of two 32-bit numbers, signed or not as they are."""
    wide = i8 if np.issubdtype(np.asarray(a).dtype, np.signedinteger) else u8
    return (np.asarray(a).astype(wide) * np.asarray(b).astype(wide) >> wide(32)).astype(np.asarray(a).dtype)


def divide(a: Any, b: Any) -> Any:
    """Whole numbers' quotient, towards zero."""
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1))).astype(np.asarray(a).dtype)


def remainder(a: Any, b: Any) -> Any:
    """What :func:`divide` leaves, of the dividend's sign."""
    return (a - divide(a, b) * b).astype(np.asarray(a).dtype)
