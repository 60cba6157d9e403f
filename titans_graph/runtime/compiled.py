"""Regions through ``torch.compile``: every one fullgraph, few variants, all counted."""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from titans_graph.kernels.turns import Building, OutOfTurn, Running
from titans_graph.lowering import Lowered
from titans_graph.passes import Region
from titans_graph.registry import Component
from titans_graph.runtime.runner import Function
from titans_graph.shapes import Clock

if TYPE_CHECKING:
    from titans_graph.runtime.model import Compiled


@dataclass
class Variant:
    """One compilation of one region's function: for ``token`` or longer calls, with or without gradients."""

    seconds: float
    after_warm_up: bool


@dataclass
class RegionReport:
    """Compilations of one function: the regions it serves and the variants built."""

    regions: tuple[str, ...]
    kind: str
    variants: list[Variant] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """Counters of a compiled model. ``breaks`` is 0 by construction (regions are fullgraph: a break would be an error)."""

    compiled: bool
    functions: dict[str, RegionReport]
    breaks: int

    @property
    def variants(self) -> int:
        """How many compilations there were in all."""
        return sum(len(r.variants) for r in self.functions.values())

    @property
    def recompiles(self) -> int:
        """Compilations after :meth:`Compiled.warm_up` had finished."""
        return sum(v.after_warm_up for r in self.functions.values() for v in r.variants)

    @property
    def seconds(self) -> float:
        """Seconds spent compiling."""
        return sum(v.seconds for r in self.functions.values() for v in r.variants)

    def text(self) -> str:
        """A table for people."""
        if not self.compiled:
            return "not compiled: no C++ compiler was found\n"
        lines = [f"{'function':<28} {'serves':>6} {'variants':>8} {'seconds':>8}"]
        for key, r in self.functions.items():
            lines.append(f"{key:<28} {len(r.regions):>6} {len(r.variants):>8} {sum(v.seconds for v in r.variants):>8.1f}")
        lines.append(f"graph breaks {self.breaks}, recompiles after warm-up {self.recompiles}, {self.seconds:.1f} s in all")
        return "\n".join(lines) + "\n"


@functools.cache
def compiler_works() -> bool:
    """Whether a C++ compiler builds a trivial shared library; on a GPU machine Triton needs none of our own testing."""
    if torch.cuda.is_available():
        return True
    from torch._inductor import config

    candidates = [c for c in config.cpp.cxx if c] or ["g++"]
    compiler = next((c for c in candidates if shutil.which(c)), None)
    if compiler is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <cmath>\nint main() { return 0; }\n")
        command = [compiler, "-shared", "-fPIC", "-o", str(Path(folder) / "probe.so"), str(source)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


class CompiledRunner:
    """Hands out compiled functions: one ``torch.compile`` per generated function, whatever the number of layers."""

    def __init__(self, lowered: Lowered, options: dict[str, Any]) -> None:
        self.lowered = lowered
        self.options = options
        self.warm = False
        self.reports: dict[str, RegionReport] = {}
        self.functions: dict[str, Function] = {}
        self.begun: set[tuple[int, bool]] = set()
        self.lock = threading.Lock()
        self.works = compiler_works()
        if not self.works:
            _warn_once()

    def function(self, key: str, region: Region) -> Function:
        """The compiled function of a region (the generated one where nothing can or shall be compiled)."""
        if key not in self.functions:
            with self.lock:  # two threads must not compile two functions for one key
                if key not in self.functions:
                    self.functions[key] = self._made(key, region)
        return self.functions[key]

    def _made(self, key: str, region: Region) -> Function:
        code = self.lowered.codes[key]
        self.reports[key] = RegionReport(code.regions, region.kind)
        modules = (self.lowered.modules.get_submodule(step.node) for step in region.steps)
        if not self.works or not all(module.compiles for module in modules):
            function: Function = code.forward
            return function
        return _in_turn(torch.compile(code.forward, fullgraph=True, backend=self._backend(key)))

    def _backend(self, key: str) -> Callable[[fx.GraphModule, list[Tensor]], Any]:
        """Inductor with a stop-watch and a counter. The backward pass is built at once, in the same turn."""
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        def compile_region(module: fx.GraphModule, examples: list[Tensor]) -> Any:
            with Building(at_once=True):
                start = time.perf_counter()
                with _unguarded_sums(), config.patch(force_non_lazy_backward_lowering=True):
                    compiled = compile_fx(module, examples, config_patches=self.options or None)
                self.reports[key].variants.append(Variant(time.perf_counter() - start, self.warm))
            return compiled

        return compile_region

    def single_tokens(self) -> bool:
        """Without gradients only: training on single tokens is rare and not worth the compilation of a second program."""
        return not torch.is_grad_enabled() or not self.works

    def begin(self, modules: nn.Module, batch: int) -> None:
        """Let components build what they compile for themselves, once for each batch size."""
        key = batch, torch.is_grad_enabled()
        if not self.works or key in self.begun:
            return
        self.begun.add(key)
        for module in modules.modules():
            if isinstance(module, Component):
                module.prebuild(*key)

    def prepare(self, region: Region, timed: Sequence[Tensor], growing: Sequence[Tensor], clock: Clock) -> None:
        """Mark the sizes that vary: the grid's slots, and the capacity of growing caches.

        Not strictly: shapes such as a number of blocks give guards that hold for every length, which torch cannot prove.
        """
        if not self.works:
            return
        if region.kind == "whole":
            for tensor in [*timed, clock.valid, clock.position]:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        for tensor in growing:
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        torch._dynamo.maybe_mark_dynamic(clock.room, 0)

    def report(self) -> Report:
        """The counters so far."""
        return Report(self.works, self.reports, 0)


def _in_turn(function: Function) -> Function:
    """The function beside others that run; where it has to be compiled while others run, called again with the turn to."""
    from torch._dynamo.exc import BackendCompilerFailed

    def call(*args: Any) -> Any:
        try:
            with Running():
                return function(*args)
        except BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, OutOfTurn):
                raise
        with Building():
            return function(*args)

    return call


@contextlib.contextmanager
def _unguarded_sums() -> Iterator[None]:
    """Keep Inductor from specialising on the size of a sum.

    Its CPU backend picks a more precise summation for long sums and pins that choice with a guard (at most, or more than,
    4096 terms), so that the gradient of every learned vector would be compiled twice. Both choices are right for every
    size; here the first one is kept.
    """
    from torch._inductor.codegen import cpp

    original = getattr(cpp.CppKernel, "need_use_acc_helper", None)
    if original is None:
        yield
        return

    def choose(kernel: Any, *args: Any, **kwargs: Any) -> bool:
        from torch._inductor.virtualized import V

        with V.graph.sizevars.shape_env.suppress_guards():
            return bool(original(kernel, *args, **kwargs))

    cpp.CppKernel.need_use_acc_helper = choose  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        cpp.CppKernel.need_use_acc_helper = original  # type: ignore[method-assign]


@functools.cache
def _warn_once() -> None:
    warnings.warn("no C++ compiler found: the model runs uncompiled", stacklevel=4)


def warm_up(model: Compiled, batch: int, training: bool) -> Report:
    """Run calls of one token and of several, twice, so that every variant exists; see :meth:`Compiled.warm_up`."""
    runner: CompiledRunner = model._runner
    length = max(2, 2 * model.compilation.period)
    with torch.set_grad_enabled(training):
        # With gradients single tokens take the grid of longer calls: there is no program of their own to build.
        for tokens in (length, length + 1) if training else (length, 1, length + 1, 1):
            y, _ = model(example(model, batch, tokens))
            if training:
                outputs = y.values() if isinstance(y, dict) else [y]
                # Not backward(): gradients that are being collected stay as they are.
                parameters = [p for p in model.parameters() if p.requires_grad]
                torch.autograd.grad(sum(o.sum() for o in outputs), parameters, allow_unused=True)
    runner.warm = True
    return runner.report()


def example(model: Compiled, batch: int, tokens: int) -> Tensor:
    """An input of the right shape: zeros."""
    (kind,) = model.compilation.inputs.values()
    if kind.dim is None:
        return torch.zeros(batch, tokens, dtype=torch.int64, device=model.device)
    reference = next(model.parameters())
    return torch.zeros(batch, tokens, kind.dim, dtype=reference.dtype, device=model.device)
