"""What Inductor would run for a graph, as a list of steps: taken down from the program it writes, without running it.

Inductor writes its elementwise loops as C++ functions and a Python program that calls them and everything else. That program
runs here on stand-ins: its kernels and operations note what they would read and write. What is unknown raises
:class:`Unsupported`, and the graph is compiled in the ordinary way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule

HEAD = 'extern "C"  void  kernel('
"""How a kernel of Inductor begins."""


class Unsupported(Exception):
    """A graph needs something that is not known here."""


class Value(NamedTuple):
    """A strided view of a ``slot``: an argument's storage, or one of the program's own; sizes in entries."""

    slot: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def dense(self) -> bool:
        """Whether its entries lie one after the other in the order of its indices."""
        expected = 1
        for size, stride in zip(reversed(self.size), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


def dense_strides(size: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor of this size without gaps."""
    return tuple(prod(size[i + 1 :]) for i in range(len(size)))


class Call(NamedTuple):
    """A call of the kernel with this number."""

    kernel: int
    values: tuple[Value, ...]


class Sum(NamedTuple):
    """``out = sum of sign * left @ right``."""

    left: tuple[Value, ...]
    right: tuple[Value, ...]
    signs: tuple[int, ...]
    out: Value

    @property
    def values(self) -> tuple[Value, ...]:
        """All that it reads and writes."""
        return *self.left, *self.right, self.out


class RunningSum(NamedTuple):
    """``out = x.cumsum(-2)``."""

    x: Value
    out: Value

    @property
    def values(self) -> tuple[Value, ...]:
        """All that it reads and writes."""
        return self


class Pack(NamedTuple):
    """``out`` = the pieces of ``x``, or of its negative, one side of a product, as native_pieces.h packs them.

    ``along``: whether the inner index runs along the rows in memory, which are ``stride`` entries apart.
    """

    x: Value
    out: Value
    left: bool
    minus: bool
    along: bool
    stride: int
    outer: int
    inner: int

    @property
    def values(self) -> tuple[Value, ...]:
        """All that it reads and writes."""
        return self.x, self.out


class PackedSum(NamedTuple):
    """``out = sum of left @ right``, both packed; ``deep``: tiles along the inner index of each."""

    left: tuple[Value, ...]
    right: tuple[Value, ...]
    deep: tuple[int, ...]
    out: Value

    @property
    def values(self) -> tuple[Value, ...]:
        """All that it reads and writes."""
        return *self.left, *self.right, self.out


Step = Call | Sum | RunningSum | Pack | PackedSum


@dataclass
class Program:
    """``slots``: number of entries and type of every storage, the ``arguments`` first. ``kernels``: C++ texts."""

    arguments: int
    slots: list[tuple[int, torch.dtype]]
    kernels: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    results: tuple[Value, ...] = ()

    def new(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Value:
        """A value in a storage of its own."""
        self.slots.append((1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)), dtype))
        return Value(len(self.slots) - 1, 0, tuple(size), tuple(stride), dtype)

    def dense(self, size: Sequence[int], dtype: torch.dtype) -> Value:
        """A value without gaps in a storage of its own."""
        return self.new(size, dense_strides(size), dtype)

    def written_by(self, step: Step) -> set[int]:
        """The slots that a step changes."""
        if not isinstance(step, Call):
            return {step.out.slot}
        parameters = self.kernels[step.kernel].partition(HEAD)[2].partition(")")[0].split(",")
        if len(parameters) != len(step.values):
            return {v.slot for v in step.values}
        constant = (p.strip().startswith("const ") for p in parameters)
        return {v.slot for v, fixed in zip(step.values, constant, strict=True) if not fixed}


def record(source: str, arguments: Sequence[Tensor]) -> Program:
    """The steps of the Python program ``source`` of Inductor for dense ``arguments`` like these."""
    program = Program(len(arguments), [(a.numel(), a.dtype) for a in arguments])
    names: dict[str, Any] = {}
    with _kernels_taken_by(lambda text: _kernel(program, text)):
        exec(source, names)
    names.update(_stand_ins(program))
    values = [Value(i, 0, tuple(a.shape), a.stride(), a.dtype) for i, a in enumerate(arguments)]
    program.results = tuple(names["call"](values))
    if not all(isinstance(v, Value) for v in program.results):
        raise Unsupported("a result that is no tensor")
    return program


def _kernel(program: Program, text: str) -> Callable[..., None]:
    number = len(program.kernels)
    program.kernels.append(text)
    return lambda *values: program.steps.append(Call(number, values))


def _stand_ins(program: Program) -> dict[str, Any]:
    """What Inductor's program finds under the names of torch's functions."""

    def view(x: Value, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Value:
        return Value(x.slot, x.offset + offset, size, stride, x.dtype)

    def sum_of_products(left: list[Value], right: list[Value], signs: list[int]) -> Value:
        out = program.dense((left[0].size[0], left[0].size[1], right[0].size[2]), left[0].dtype)
        program.steps.append(Sum(tuple(left), tuple(right), tuple(signs), out))
        return out

    def cumsum(x: Value, dim: int, dtype: torch.dtype | None = None) -> Value:
        if dim % len(x.size) != len(x.size) - 2 or dtype is not None:
            raise Unsupported("a cumulative sum over another dimension than the last but one")
        out = program.dense(x.size, x.dtype)
        program.steps.append(RunningSum(x, out))
        return out

    def check_layout(x: Value, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> None:
        expected = zip(x.size, x.stride, size, stride, strict=True)
        if any(have != n or (n != 1 and step != s) for have, step, n, s in expected):
            raise Unsupported(f"a value of size {x.size} and stride {x.stride} where {size} and {stride} were expected")

    def nothing(*_: object) -> None:
        """Addresses are no concern of stand-ins."""

    own = SimpleNamespace(sum_of_products=SimpleNamespace(default=sum_of_products))
    aten = SimpleNamespace(cumsum=SimpleNamespace(default=cumsum))
    kinds = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.bool, torch.int64)}
    return {
        "torch": SimpleNamespace(ops=SimpleNamespace(titans_graph=own, aten=aten), **kinds),
        "empty_strided_cpu": program.new,
        "reinterpret_tensor": view,
        "assert_size_stride": check_layout,
        "assert_alignment": nothing,
        "extern_kernels": None,
    }


@contextmanager
def _kernels_taken_by(take: Callable[[str], Any]) -> Iterator[None]:
    """C++ kernels of Inductor's programs that this thread loads are given to ``take`` instead of being compiled."""
    from torch._inductor.async_compile import AsyncCompile

    me = threading.get_ident()
    compiled: Callable[..., Any] = AsyncCompile.cpp_pybinding

    def cpp_pybinding(self: Any, kinds: list[str], text: str) -> Any:
        return take(text) if threading.get_ident() == me else compiled(self, kinds, text)

    with mock.patch.object(AsyncCompile, "cpp_pybinding", cpp_pybinding):
        yield


def bare(graph: GraphModule) -> GraphModule:
    """Inductor makes its own fake tensors and refuses those of another tracing."""
    for node in graph.graph.nodes:
        node.meta.clear()
    return graph


def fakes(examples: Sequence[Tensor]) -> list[Any]:
    """Inductor caches on disk only what it compiles for fake tensors of a mode with a shape environment."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    return [mode.from_tensor(e, static_shapes=True) for e in examples]


def written(graph: GraphModule, examples: Sequence[Tensor]) -> str:
    """The Python program that Inductor writes for a graph and ``examples`` on a CPU, for one thread."""
    import torch._functorch.config
    from torch._inductor.graph import GraphLowering

    me = threading.get_ident()
    save: Callable[[str], None] | None = GraphLowering.save_output_code
    texts: list[str] = []

    def keep(text: str) -> None:
        if threading.get_ident() == me:
            texts.append(text)
        elif save is not None:
            save(text)

    options = {"fx_graph_cache": False, "cpp_wrapper": False, "cpp.threads": 1}
    with (
        torch.no_grad(),
        # A program that is found in a cache is not written.
        torch._functorch.config.patch(enable_autograd_cache=False),
        mock.patch.object(GraphLowering, "save_output_code", staticmethod(keep)),
        _kernels_taken_by(lambda text: lambda *_: None),
    ):
        torch._inductor.compile(bare(graph), fakes(examples), options=options)
    if len(texts) != 1:
        raise Unsupported(f"{len(texts)} programs for one graph")
    return texts[0]
