"""Chunk bodies as one C++ function each, which runs row after row (a row is a head of one sequence).

Inductor compiles the elementwise loops of a body as ever; this joins them, and our own sums of products, to one function:

    traced graph -> sums of products gathered (native_graph) -> Inductor's program for one row, recorded (native_program)
                 -> its products on a matrix unit where there is one (native_pieces)
                 -> one C++ function (native_source) -> compiled and kept on disk by Inductor

On an Intel Xeon with AVX-512 a chunk's forward is 1.13 to 1.23, its backward 1.22 to 1.27 times as fast as Inductor's own
program (docs/results.md). Where anything is not as expected (another torch, a graph with operations that are not known here,
rows that would leave threads idle) the body is compiled by Inductor as a whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from titans_graph.kernels import native_pieces
from titans_graph.kernels.native_calls import Part, Run, loaded, part, run_once
from titans_graph.kernels.native_graph import gather_products
from titans_graph.kernels.native_pieces import in_pieces
from titans_graph.kernels.native_program import Unsupported, dense_strides, record, written
from titans_graph.kernels.native_source import C_TYPES, Source, source_of

log = logging.getLogger("titans_graph.kernels")

TYPES = {name: kind for kind, name in C_TYPES.items()}

_LOADED: dict[str, Native] = {}

_FILES = (
    "native.py",
    "native_calls.h",
    "native_calls.py",
    "native_graph.py",
    "native_pieces.h",
    "native_pieces.py",
    "native_products.h",
    "native_program.py",
    "native_source.py",
)

CODE = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in _FILES)
"""This code, as it was when it was loaded: what it wrote is not to be found by any other."""


def worthwhile(args: Sequence[Tensor]) -> bool:
    """Whether a body is meant for this: on a CPU, in float32 or float64, and with rows enough for half of the threads."""
    kinds = {a.dtype for a in args if a.is_floating_point()}
    rows = args[0].shape[0]
    single = len(kinds) == 1 and kinds <= {torch.float32, torch.float64} and all(a.shape[:1] == (rows,) for a in args)
    return single and args[0].device.type == "cpu" and 2 * rows >= torch.get_num_threads()


def native(body: Callable[..., Sequence[Tensor]], args: Sequence[Tensor]) -> Native | None:
    """``body`` for arguments like ``args``, ``[N, ...]`` each with any N; None where that is not possible, as the log tells."""
    try:
        ones = [torch.zeros(1, *a.shape[1:], dtype=a.dtype, device="cpu") for a in args]
        graph = gathered(body, ones)
        key = _key(graph, ones)
        if key not in _LOADED:
            source = _read(key)
            if source is None:
                program = record(written(graph, ones), ones)
                source = source_of(in_pieces(program) if native_pieces.available() else program)
                _write(key, source)
            _LOADED[key] = Native(source, ones)
        return _LOADED[key]
    except Exception as problem:  # Inductor's insides differ between versions, and it is not needed.
        # Of what a compiler says, the last line.
        reason = str(problem).strip().rpartition("\n")[2]
        log.info("memory_scan: no native body (%s: %s); Inductor's own", type(problem).__name__, reason)
        return None


def gathered(body: Callable[..., Sequence[Tensor]], args: Sequence[Tensor]) -> torch.fx.GraphModule:
    """The graph of a body with its sums of products gathered; without changes in place, because products are moved."""
    with torch.no_grad():
        graph = make_fx(body)(*args)
        if any(map(_in_place, graph.graph.nodes)):
            # A second tracing: the body's own functions have no rule for this.
            graph = make_fx(torch.func.functionalize(graph, remove="mutations"))(*args)
    for node in graph.graph.nodes:
        if node.op == "get_attr" or _in_place(node):
            raise Unsupported(f"{node.target}: a constant tensor, or a change in place")
    gather_products(graph.graph)
    graph.recompile()
    return graph


def _in_place(node: torch.fx.Node) -> bool:
    schema: Any = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


class Native:
    """A compiled body: call it with tensors ``[N, ...]``.

    ``examples``: arguments of one row, for their shapes.
    """

    def __init__(self, source: Source, examples: Sequence[Tensor]) -> None:
        from torch._inductor.codecache import CppCodeCache

        self.results = [(tuple(s), (prod(s), *dense_strides(s)), TYPES[kind]) for s, kind in source.results]
        self._dense = [(a.stride(), a.stride(0) * a.element_size()) for a in examples]
        rows = [*(a.stride()[1:] for a in examples), *(stride[1:] for _, stride, _ in self.results)]
        self._body = loaded(CppCodeCache.load(source.text), rows, source.space)

    def __call__(self, *args: Tensor, out: Sequence[Tensor | None] = ()) -> list[Tensor]:
        """The results ``[N, ...]``: those of ``out`` where it has a tensor, whose rows are dense, else new ones.

        Rows may lie anywhere; an argument whose rows have gaps in themselves is copied first.
        """
        places: list[int] = []
        rows, held = args[0].shape[0], []
        for a, (strides, step) in zip(args, self._dense, strict=True):
            have = a.stride()
            if have[1:] != strides[1:]:
                a = a.contiguous()
                held.append(a)
            places += a.data_ptr(), step if have == strides else a.stride(0) * a.element_size(), 0
        results = []
        for (shape, strides, dtype), given in zip_longest(self.results, out):
            x = _empty((rows, *shape), strides, dtype) if given is None else given
            places += x.data_ptr(), x.stride(0) * x.element_size(), 0
            results.append(x)
        run_once(self._body, places, rows)
        return results

    def calls(self, args: Sequence[Run], out: Sequence[Run], number: int, *, backward: bool = False) -> Part:
        """A number of calls for :func:`~titans_graph.kernels.native_calls.run_parts`; ``out`` takes the results of ``args``."""
        return part(self._body, [*args, *out], number, backward=backward)


def run_into(body: Callable[..., Sequence[Tensor]], args: Sequence[Tensor], out: Sequence[Tensor | None]) -> list[Tensor]:
    """The results of any body, written to the tensors of ``out`` where it has one; what it has no entry for is new."""
    if isinstance(body, Native):
        return body(*args, out=out)
    # Inductor's own programs take arguments as dense as their examples.
    results = list(body(*[a.contiguous() for a in args]))
    for i, target in enumerate(out):
        if target is not None:
            results[i] = target.copy_(results[i])
    return results


def _allocator() -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """What Inductor's programs allocate with, in a fraction of the time of ``torch.empty``; (size, stride, dtype)."""
    quick: Any = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None)
    return quick or (lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


_empty = _allocator()


def _key(graph: torch.fx.GraphModule, args: Sequence[Tensor]) -> str:
    """What a source depends on: the graph, the arguments, torch, the processor's instructions, and this code."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    kinds = [(str(a.dtype), tuple(a.shape)) for a in args]
    parts = [torch.__version__, str(pick_vec_isa()), str(native_pieces.available()), graph.code, repr(kinds), CODE]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def _place(key: str) -> Path | None:
    """The file that keeps a source; None where nothing is to be kept."""
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return None if config.force_disable_caches else Path(cache_dir()) / f"titans_graph-native-{key}.json"


def _read(key: str) -> Source | None:
    place = _place(key)
    if place is None:
        return None
    try:
        return Source(**json.loads(place.read_text()))
    except (OSError, ValueError, TypeError):  # Not there, cut off or damaged: written anew.
        return None


def _write(key: str, source: Source) -> None:
    place = _place(key)
    if place is None:
        return
    try:
        from torch._inductor.codecache import write_atomic

        write_atomic(str(place), json.dumps(source._asdict()), make_dirs=True)
    except OSError as problem:
        log.info("memory_scan: a native body cannot be kept on disk (%s)", problem)
