"""Compiled bodies of the neural memory: one chunk forward, and its vector-Jacobian product.

A body is traced to a plain graph of tensor operations (nested differentiation included) and made one C++ function
(:mod:`~titans_graph.kernels.native`), or handed to Inductor as it is. There is no guard to check per call and nothing to
recompile: a body belongs to its static form, its shapes and its dtype, and the number of chunks never enters. Without a C++
compiler on a CPU, bodies run eagerly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from titans_graph.kernels.memory_chunk import Form, memory_chunk, step_scale
from titans_graph.kernels.memory_objectives import REPLACED
from titans_graph.kernels.memory_products import Products
from titans_graph.kernels.native import native, worthwhile
from titans_graph.kernels.native_program import bare, fakes
from titans_graph.kernels.turns import Building

log = logging.getLogger("titans_graph.kernels")

Body = Callable[..., Sequence[Tensor]]

Argument = tuple[torch.dtype, tuple[int, ...]]
Signature = tuple[object, ...]

FORWARD, ADVANCE, PULLBACK = "forward", "advance", "pullback"
"""What is built of a chunk: everything; only the state after it; and the vector-Jacobian product of everything."""

_COMPILED: dict[Signature, Body] = {}
REPLACED.append(_COMPILED.clear)

COMING: dict[Signature, Callable[[], None]] = {}
"""Bodies that another process is building (:mod:`~titans_graph.kernels.memory_prebuild`): call to wait for one."""


def chunk_body(form: Form, count: int, *, kept: bool, given: bool, resumed: bool = False, answer: bool = True) -> Body:
    """The chunk as a flat function ``(anchor.., weights.., momenta.., q, k, v, step, log_momentum, log_keep, valid)``.

    ``count`` is the number of fast weights. Only a ``resumed`` chunk, which began in an earlier call, has an anchor; else
    the anchor is the weights. Returns ``(y, weights'.., momenta'..)``, for a bounded form the scale of the step
    ``[N, C]``, and where products are ``kept`` those (:mod:`~titans_graph.kernels.memory_products`). Where they are
    ``given``, they are the last argument and not returned. Without ``answer`` there is neither q nor y.
    """

    def body(*args: Tensor) -> tuple[Tensor, ...]:
        products, args = (Products(args[-1]), args[:-1]) if given else (Products(), args)
        parts = [list(args[i * count : (i + 1) * count]) for i in range(2 + resumed)]
        anchor, (weights, momenta), tokens = parts[0], parts[-2:], args[(2 + resumed) * count :]
        q, (k, v, step, log_momentum, log_keep, valid) = (tokens[0] if answer else None), tokens[-6:]
        scale = [step_scale(form, anchor, k)] if form.bounded else []
        if scale:
            step = step * scale[0]
        y, new, moving = memory_chunk(
            form, anchor, weights, momenta, q, k, v, step, log_momentum, log_keep, valid, products if kept else torch.bmm
        )
        return *([] if y is None else [y]), *new, *moving, *scale, *products.made()

    return body


def pullback(body: Body, inputs: int, fixed: int) -> Body:
    """The body's vector-Jacobian product, second order included: ``(inputs.., fixed.., cotangents..)`` to cotangents."""

    def pull(*args: Tensor) -> tuple[Tensor, ...]:
        constant, cotangents = args[inputs : inputs + fixed], args[inputs + fixed :]
        back = torch.func.vjp(lambda *x: tuple(body(*x, *constant)), *args[:inputs])[1]
        result: tuple[Tensor, ...] = back(tuple(cotangents))
        return result

    return pull


def body_of(form: Form, kind: str, count: int, *, kept: bool, resumed: bool = False) -> Body:
    """The body of a kind for ``count`` fast weights; ``kept``: forward keeps products, the other kinds are given them."""
    given = kept and kind != FORWARD
    body = chunk_body(form, count, kept=kept, given=given, resumed=resumed, answer=kind != ADVANCE)
    return pullback(body, (2 + resumed) * count + 6, 1 + given) if kind == PULLBACK else body


@lru_cache(maxsize=1)
def compiler_available() -> bool:
    """Whether Inductor can build code for the CPU; said once in the log where it cannot."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as problem:  # The classes Inductor raises here differ between torch versions.
        log.info("memory_scan: no C++ compiler (%s); chunk bodies run eagerly", type(problem).__name__)
        return False
    return True


def compiled(key: tuple[object, ...], body: Body, args: Sequence[Tensor]) -> Body:
    """``body`` compiled for arguments like ``args``, built at the first call for ``key`` and these shapes."""
    if args[0].device.type == "cpu" and not compiler_available():
        return body
    signature = signature_of(key, args[0].device, [(a.dtype, tuple(a.shape)) for a in args])
    if signature not in _COMPILED:
        COMING.pop(signature, lambda: None)()
        with Building():
            if signature not in _COMPILED:
                _COMPILED[signature] = build(body, args)
    return _COMPILED[signature]


def signature_of(key: tuple[object, ...], device: torch.device, args: Sequence[Argument]) -> Signature:
    """What a compiled body belongs to."""
    return *key, device, *args


def build(body: Body, args: Sequence[Tensor]) -> Body:
    """``body`` compiled for arguments like ``args``, from Inductor's cache on disk where it has been built before."""
    if worthwhile(args):
        built: Body | None = native(body, args)
        if built is not None:
            return built
    import torch._inductor

    # Not the arguments: those may be views of tensors that require gradients, and Inductor would look into them.
    examples = [torch.zeros_like(a, memory_format=torch.contiguous_format) for a in args]
    # One C++ file for all kernels of a body: half the compile time of one file each, and the same speed.
    options = {"cpp_wrapper": args[0].device.type == "cpu"}
    with torch.no_grad():
        whole: Body = torch._inductor.compile(bare(make_fx(body)(*examples)), fakes(examples), options=options)
    return whole
