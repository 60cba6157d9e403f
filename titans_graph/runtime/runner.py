"""Running a program: the driver between regions. Loops over segments and layout stand here, outside compiled code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from titans_graph.ir import Ref
from titans_graph.lowering import Lowered
from titans_graph.lowering.code import local_name
from titans_graph.passes import Compilation, Region
from titans_graph.runtime.layout import pieces
from titans_graph.shapes import Clock, Value

Nodes = Mapping[str, Mapping[str, Tensor]]
Function = Callable[..., tuple[tuple[Any, ...], dict[str, dict[str, Tensor]]]]


class Runner(Protocol):
    """Where a region's function comes from: as generated, or compiled."""

    def function(self, key: str, region: Region) -> Function:
        """The function of a region."""

    def single_tokens(self) -> bool:
        """Whether calls of one token take the token program (else the grid of a longer call, mostly empty)."""

    def begin(self, modules: nn.Module, batch: int) -> None:
        """Called before the regions of a call of more than one token."""

    def prepare(self, region: Region, timed: Sequence[Tensor], growing: Sequence[Tensor], clock: Clock) -> None:
        """Called before each call of a region's function, to mark sizes that vary: of inputs with time, of growing caches."""


class Eager:
    """Runs the generated functions as they are."""

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered

    def function(self, key: str, region: Region) -> Function:
        """The generated function."""
        function: Function = self.lowered.codes[key].forward
        return function

    def single_tokens(self) -> bool:
        """Always."""
        return True

    def begin(self, modules: nn.Module, batch: int) -> None:
        """Nothing to begin."""

    def prepare(self, region: Region, timed: Sequence[Tensor], growing: Sequence[Tensor], clock: Clock) -> None:
        """Nothing to prepare."""


class _Attach(torch.autograd.Function):
    """Identity that makes a tensor part of the graph without asking for its gradient.

    A compiled function is specialised on which inputs need gradients; state would need them from the second segment on
    only, and every region would be compiled twice.
    """

    generate_vmap_rule = True  # torch.func: a memory of ``kernel: reference`` knows its transforms

    @staticmethod
    def forward(x: Tensor, hook: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].view_as(tangents[0])


def attach(nodes: Nodes) -> Nodes:
    """States whose floating-point tensors all take part in gradients; not where nothing asks for any, or they would be kept."""
    hook = torch.empty(0, requires_grad=True)

    def join(t: Tensor) -> Tensor:
        return t if t.requires_grad or not t.is_floating_point() else _Attach.apply(t, hook)  # type: ignore[no-untyped-call]

    return {n: {k: join(t) for k, t in tensors.items()} for n, tensors in nodes.items()}


class Driver:
    """Runs one model's programs. ``records``: whether anything in the call asks for gradients."""

    def __init__(self, compilation: Compilation, modules: nn.Module, runner: Runner, records: bool) -> None:
        self.c = compilation
        self.lowered: Lowered = compilation.lowered
        self.modules = modules
        self.runner = runner
        self.attached: Callable[[Nodes], Nodes] = attach if records else lambda nodes: nodes

    def __call__(self, inputs: Mapping[str, Tensor], nodes: Nodes, clock: Clock, used: int) -> tuple[list[Any], dict[str, Any]]:
        """Outputs (in declared order) and new node states. inputs ``[B, G, ...]``; ``G`` 1 runs the token program.

        used: no row has a token at or after this slot; loops end there.
        """
        single = clock.valid.shape[1] == 1
        program = self.c.token if single else self.c.whole
        assert program is not None
        keys = self.lowered.token if single else self.lowered.whole
        values: dict[Ref, Any] = {Ref(name): x for name, x in inputs.items()}
        nodes = self.attached(nodes)
        if not single:
            self.runner.begin(self.modules, clock.valid.shape[0])
        new: dict[str, Any] = {}
        for region, key in zip(program.regions, keys, strict=True):
            given = [values[ref] for ref in region.inputs]
            own = {n: nodes[n] for n in region.states}
            if region.kind == "loop":
                results, states = self._loop(region, key, given, own, clock, used)
            else:
                results, states = self._call(region, key, given, own, clock)
            values.update(zip(region.outputs, results, strict=True))
            new.update(states)
        return [values[ref] for ref in self.c.outputs.values()], new

    def _call(self, region: Region, key: str, given: list[Any], nodes: Nodes, clock: Clock) -> tuple[Sequence[Any], Nodes]:
        holder = self.modules.get_submodule(region.instance)
        local = {local_name(region, n): dict(state) for n, state in nodes.items()}
        types = [self.c.types[ref] for ref in region.inputs]
        pairs = [pair for value, kind in zip(given, types, strict=True) for pair in _timed(value, kind)]
        growing = [t for n, state in nodes.items() if self.c.nodes[n].component.grows for t in state.values()]
        self.runner.prepare(region, [t for t, timed in pairs if timed], growing, clock)
        outputs, states = self.runner.function(key, region)(holder, *given, local, clock)
        return outputs, {n: states[local_name(region, n)] for n in nodes}

    def _loop(
        self, region: Region, key: str, given: list[Any], nodes: Nodes, clock: Clock, used: int
    ) -> tuple[Sequence[Any], Nodes]:
        """One segment after another; only timed values are cut."""
        size = region.period
        types = [self.c.types[ref] for ref in region.inputs]
        cut = [_cut(value, kind, size) for value, kind in zip(given, types, strict=True)]
        made: list[Sequence[Any]] = []
        for n, part in enumerate(pieces(clock, size, used)):
            here = [_piece(value, kind, n) for value, kind in zip(cut, types, strict=True)]
            outputs, nodes = self._call(region, key, here, self.attached(nodes), part)
            made.append(outputs)
        kinds = [self.c.types[ref] for ref in region.outputs]
        grid = clock.valid.shape[1]
        return [_join([m[i] for m in made], kind, grid) for i, kind in enumerate(kinds)], nodes


def _timed(value: Any, kind: Value) -> list[tuple[Any, bool]]:
    """The tensors of a value with whether each has time; a value of one piece is a bare tensor."""
    parts = (value,) if len(kind.pieces) == 1 else value
    return [(part, piece.timed) for part, piece in zip(parts, kind.pieces, strict=True)]


def _packed(parts: list[Any], kind: Value) -> Any:
    return parts[0] if len(kind.pieces) == 1 else tuple(parts)


def _cut(value: Any, kind: Value, size: int) -> Any:
    """Timed tensors ``[B, G, ...]`` as ``[G / size, B, size, ...]``, contiguous so that every piece has the same strides."""
    parts = [t.unflatten(1, (-1, size)).transpose(0, 1).contiguous() if timed else t for t, timed in _timed(value, kind)]
    return _packed(parts, kind)


def _piece(value: Any, kind: Value, n: int) -> Any:
    return _packed([t[n] if timed else t for t, timed in _timed(value, kind)], kind)


def _join(made: list[Any], kind: Value, grid: int) -> Any:
    """Pieces in a row, filled up with zeros to the grid where the loop ended early."""
    columns = [tuple(m[0] for m in _timed(value, kind)) for value in made]
    parts = []
    for piece, column in zip(kind.pieces, zip(*columns, strict=True), strict=True):
        whole = torch.cat(column, dim=1) if piece.timed else column[-1]
        missing = grid - whole.shape[1] if piece.timed else 0
        if missing:
            whole = torch.cat([whole, whole.new_zeros(whole.shape[0], missing, *whole.shape[2:])], dim=1)
        parts.append(whole)
    return _packed(parts, kind)
