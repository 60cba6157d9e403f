"""Launches the Triton kernels that decode: one token per row, and the writing of the weights after many.

Plain functions on tensors that give new ones; nothing is read on the host. Called by the operators of memory_decode.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_graph.kernels.memory_lazy import SLOTS, slots_of
from titans_graph.kernels.triton_config import Config, Description, Kernel, Sizes, config
from titans_graph.kernels.triton_decode import decode_write_kernel, linear_decode_kernel, mlp_decode_kernel
from titans_graph.kernels.triton_host import Tokens
from titans_graph.kernels.triton_memory import DTYPES

RING = max(16, 1 << (SLOTS - 1).bit_length())
"""Rows of a ring's tiles: a power of 2, and no fewer than a matrix product has at least."""


class Ring(NamedTuple):
    """The tensors of :class:`~titans_graph.kernels.memory_lazy.Lazy`, contiguous; the lists have an entry a layer.

    ``anchor``, ``weights`` and ``momenta``: those, or their copies.
    """

    anchor: list[Tensor]
    weights: list[Tensor]
    momenta: list[Tensor]
    inputs: list[Tensor]
    deltas: list[Tensor]
    shares: Tensor
    ends: Tensor
    slot: Tensor
    norms: Tensor


def decode(sizes: Sizes, parameter: float, ring: Ring, tokens: Tokens) -> list[Tensor]:
    """Write and read one token per row: ``[y, inputs.., deltas.., shares, ends]``, all new.

    ``tokens``: q, k, v ``[B, H, 1, d]`` and gates ``[B, H, 1]`` fp32. ``sizes.chunk``: the slots of the ring; ``parameter``:
    the objective's number.
    """
    old = [*ring.inputs, *ring.deltas, ring.shares, ring.ends]
    new = [torch.empty_like(x) for x in (tokens.q, *old)]
    batch, heads = tokens.q.shape[:2]
    if batch * heads == 0:
        return new
    fast = *ring.anchor, *ring.weights, *ring.momenta
    given = *tokens, ring.slot, *fast, *old
    if sizes.hidden:
        _launch("mlp_decode", mlp_decode_kernel, (batch * heads,), sizes, (*given, ring.norms, *new, heads), parameter)
    else:
        _launch("linear_decode", linear_decode_kernel, (batch * heads,), sizes, (*given, *new, heads), parameter)
    return new


def write(
    weights: list[Tensor],
    momenta: list[Tensor],
    inputs: list[Tensor],
    deltas: list[Tensor],
    shares: Tensor,
    ends: Tensor,
    reads: torch.dtype | None,
) -> list[Tensor]:
    """``[weights.., momenta..]`` of the last token and, where ``reads`` is a type, both again in it; all new."""
    assert reads != torch.float32  # the type of what is copied
    new = [torch.empty_like(x) for x in (*weights, *momenta)]
    copies = new if reads is None else [torch.empty_like(x, dtype=reads) for x in new]
    count = len(weights)
    rows = shares.shape[0] * shares.shape[1]
    for layer in range(count if rows else 0):
        width, out = weights[layer].shape[2:]
        sizes = Sizes(shares.shape[-1], width, out, DTYPES[reads or torch.float32])
        given = weights[layer], momenta[layer], inputs[layer], deltas[layer], shares, ends
        args = (*given, *(x for made in (new, copies) for x in made[layer::count]))
        values = _constants(decode_write_kernel, sizes, config("decode_write", sizes))
        tiles = width // values["TILE_ROWS"] * (out // values["TILE"])
        _launch("decode_write", decode_write_kernel, (rows, tiles), sizes, args, 0.0)
    return new if reads is None else [*new, *copies]


def _launch(name: str, function: Any, grid: tuple[int, ...], sizes: Sizes, args: tuple[Any, ...], parameter: float) -> None:
    """Not autotuned: one token is over before anything could be measured."""
    chosen = config(name, sizes)
    values = _constants(function, sizes, chosen)
    if "PARAMETER" in values:
        values["PARAMETER"] = parameter
    function[grid](*args, **values, num_warps=chosen.num_warps, num_stages=chosen.num_stages)


def tile_of(width: int, most: int) -> int:
    """The largest power of 2 that divides ``width``, at most ``most`` (64 where that is 0)."""
    return min(most or 64, width & -width)


def supports(sizes: Sizes) -> bool:
    """Sizes that the kernels know: keys of a power of 2 from 16, a hidden size that is a multiple of 16, any chunk."""
    power = 16 <= sizes.dim <= (128 if sizes.hidden else 256) and sizes.dim & (sizes.dim - 1) == 0
    return power and sizes.hidden % 16 == 0 and not sizes.resumed


def _constants(function: Any, sizes: Sizes, chosen: Config) -> dict[str, Any]:
    """``sizes``: of a memory, ``dtype`` being what weights are read in; of ``decode_write`` those of one fast weight,
    ``hidden`` being its columns."""
    slots, columns = slots_of(sizes.chunk), sizes.hidden or sizes.dim
    values = {
        "SLOTS": slots,
        "RING": RING,
        "D": sizes.dim,
        "HIDDEN": sizes.hidden,
        "TILE": tile_of(columns, chosen.tile),
        "ACT": sizes.activation,
        "OBJECTIVE": sizes.objective,
        "PARAMETER": 1.0,
        "BOUNDED": sizes.bounded,
        "READ": sizes.read,
        "ROWS": sizes.dim,
        "COLUMNS": columns,
        "TILE_ROWS": tile_of(sizes.dim, 64),
        "COPIED": sizes.dtype != "fp32",
    }
    return {name: values[name] for name in function.arg_names if name in values}


_READ = {f"{kind}{layer}" for kind in ("anchor", "m", "s") for layer in ("", "_one", "_two")}
_COPIES = {"copy_m", "copy_s"}
_OTHERS = {"slots": "*i64", "heads": "i32"}


def _describe(function: Any, sizes: Sizes, chosen: Config) -> Description:
    """What is only read is in the type of ``sizes``; tokens, rings and what is written are fp32, as a running state is."""
    constants = _constants(function, sizes, chosen)
    narrow = _COPIES if "COPIED" in constants else _READ
    names = [name for name in function.arg_names if name not in constants]
    return {name: _OTHERS.get(name, f"*{sizes.dtype}" if name in narrow else "*fp32") for name in names}, constants


def _linear(sizes: Sizes) -> bool:
    return supports(sizes) and not sizes.hidden


def _deep(sizes: Sizes) -> bool:
    return supports(sizes) and sizes.hidden > 0


KERNELS = (
    Kernel("linear_decode", linear_decode_kernel, partial(_describe, linear_decode_kernel), _linear),
    Kernel("mlp_decode", mlp_decode_kernel, partial(_describe, mlp_decode_kernel), _deep),
    Kernel("decode_write", decode_write_kernel, partial(_describe, decode_write_kernel), supports),
)
