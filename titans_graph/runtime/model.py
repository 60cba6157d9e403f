"""The model: a sound graph as an ``nn.Module`` with explicit state."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from titans_graph.errors import InputError, StateError, UsageError
from titans_graph.ir import Graph
from titans_graph.kernels.precision import no_autocast
from titans_graph.lowering import Holder, Lowered
from titans_graph.lowering.demand import demand
from titans_graph.passes import Compilation
from titans_graph.registry import Component
from titans_graph.runtime.layout import Layout, grid_layout, room_for, token_layout
from titans_graph.runtime.runner import Driver, Eager, Nodes, Runner
from titans_graph.runtime.state import State, Stepping
from titans_graph.spec import to_yaml

if TYPE_CHECKING:
    from titans_graph.runtime.compiled import Report


@dataclass(frozen=True)
class Summary:
    """Size and cost of a model: parameter count, bytes of state a row, FLOPs a token forward, whether state grows."""

    parameters: int
    state_bytes: int
    flops: float
    grows: bool

    def text(self) -> str:
        """One line for people."""
        grows = " and grows with the tokens read (full attention)" if self.grows else ", constant"
        return (
            f"{self.parameters:,} parameters; state {self.state_bytes:,} bytes a row{grows}; "
            f"{self.flops / 1e6:,.2f} MFLOP a token forward"
        )


class Model(nn.Module):
    """A compiled graph. Call it with the input and a state; it returns the output and the next state.

    ``y, state = model(x, state=None, *, document=None)`` with x ``[B, T]`` int64 (a language model) or ``[B, T, dim]`` (a
    block), y ``[B, T, vocab]`` or ``[B, T, dim]``. For every way to cut the input into parts, calling the model part by
    part with the state handed on gives the same result as one call.

    A model can be pickled, for workers and copies; a compiled one becomes an eager one, to be compiled where it arrives. For
    files that last, save ``model.spec`` and the tensors of ``state_dict`` as safetensors.
    """

    def __init__(self, compilation: Compilation) -> None:
        super().__init__()
        lowered: Lowered = compilation.lowered
        self.compilation = compilation
        self.body = lowered.modules
        self._runner: Runner = Eager(lowered)
        self.fingerprint = fingerprint(compilation.graph)
        self.growing = frozenset(
            f"nodes/{n}/{k}" for n in self._stateful() if compilation.nodes[n].component.grows for k in self._part(n, 1)
        )

    @property
    def name(self) -> str:
        """The graph's name."""
        return self.compilation.graph.name

    @property
    def graph(self) -> Graph:
        """The declared graph."""
        return self.compilation.graph

    @property
    def spec(self) -> str:
        """The resolved spec as YAML; building it again gives the same architecture."""
        return to_yaml(self.compilation.graph)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def _stateful(self) -> list[str]:
        return [n for n, node in self.compilation.nodes.items() if node.component.stateful]

    def _part(self, node: str, batch: int) -> dict[str, Tensor]:
        return self._module(node).initial_state(batch)

    def _fresh(self, batch: int) -> dict[str, dict[str, Tensor]]:
        with torch.no_grad():
            return {n: self._part(n, batch) for n in self._stateful()}

    def initial_state(self, batch: int) -> State:
        """The state of ``batch`` rows before their first token; UsageError where no machine has room for so many."""
        if type(batch) is not int or batch < 0:
            raise UsageError(f"a state has a number of rows, 0 or more, not {batch!r:.60}")
        if self.device.type == "cpu":
            demand(batch * self.compilation.lowered.row, f"the state of {batch} rows", "fewer rows, or a smaller model")
        position = torch.zeros(batch, dtype=torch.int64)
        return State(position, torch.full((batch,), -1), self._fresh(batch), self.fingerprint, self._fresh)

    def summary(self) -> Summary:
        """Parameters, state bytes a row, FLOPs a token."""
        c = self.compilation
        return Summary(
            parameters=sum(p.numel() for p in self.parameters()),
            state_bytes=self.initial_state(1).bytes,
            flops=sum(c.nodes[n].component.flops(c.sites[n]) for n in c.nodes),
            grows=any(c.nodes[n].component.grows for n in self._stateful()),
        )

    def forward(self, x: Tensor, state: State | None = None, *, document: Tensor | None = None) -> tuple[Any, State]:
        """Read ``T`` more tokens.

        x: ``[B, T]`` int64 ids or ``[B, T, dim]``; T may be 0. state: where the rows stand (None: nothing read yet).
        document: ``[B, T]`` int64 ids >= 0; a token whose id differs from the one before starts a new document, which sees
        nothing of the others. None: every row goes on with its document.

        Returns the output (a mapping of outputs if the graph declares several) and the state after the last token.
        Raises InputError and StateError where x, document or state do not fit the model.
        """
        self._check_input(x, document)
        state = self._check_state(x, state)
        if x.shape[1] == 0:
            return self._empty(x, state)
        layout = self._layout(x, state, document)
        records = self._records(x, state)
        steps = layout.clock.valid.shape[1] == 1 and not records
        with torch.set_grad_enabled(torch.is_grad_enabled() and not steps):
            nodes = self._with_room(self._stepping(state, layout) if steps else state.nodes, layout)
            driver = Driver(self.compilation, self.body, self._runner, records)
            (name,) = self.compilation.inputs
            outputs, new = driver({name: layout.spread(x)}, nodes, layout.clock, layout.used)
        collected = [layout.collect(y) for y in outputs]
        held: Nodes = Stepping({n: {**t, **new[n]} for n, t in nodes.items()}, self._settled) if steps else new
        return self._result(collected), State(layout.position, layout.document, held, self.fingerprint, self._fresh)

    def _records(self, x: Tensor, state: State) -> bool:
        """Whether anything in this call asks for gradients."""
        if not torch.is_grad_enabled():
            return False
        held = state.nodes.held if isinstance(state.nodes, Stepping) else state.nodes
        tensors = (t for node in held.values() for t in node.values())
        return any(t.requires_grad for t in itertools.chain([x], self.parameters(), tensors))

    def _stepping(self, state: State, layout: Layout) -> Nodes:
        """Node states in the form in which single tokens are read without gradients."""
        held = state.nodes.held if isinstance(state.nodes, Stepping) else state.nodes
        position = layout.position - 1
        with no_autocast(self.device.type):
            return {n: self._module(n).stepping(tensors, position) for n, tensors in held.items()}

    def _settled(self, node: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with no_autocast(self.device.type):
            return self._module(node).settled(tensors)

    def _module(self, node: str) -> Component:
        return cast(Component, self.body.get_submodule(node))

    def _result(self, outputs: list[Any]) -> Any:
        return outputs[0] if len(outputs) == 1 else dict(zip(self.compilation.outputs, outputs, strict=True))

    def _empty(self, x: Tensor, state: State) -> tuple[Any, State]:
        types = [self.compilation.types[ref] for ref in self.compilation.outputs.values()]
        reference = next(self.parameters(), torch.zeros(()))
        outputs = [reference.new_zeros(x.shape[0], 0, *(() if t.dim is None else (t.dim,))) for t in types]
        return self._result(outputs), state

    def _layout(self, x: Tensor, state: State, document: Tensor | None) -> Layout:
        tokens, grows = x.shape[1], bool(self.growing)
        ids = document.to("cpu", torch.int64) if document is not None else None
        if tokens == 1 and self._runner.single_tokens():
            layout = token_layout(state.position, state.document, ids, grows=grows)
        else:
            layout = grid_layout(state.position, state.document, ids, tokens, self.compilation.period, grows=grows)
        return layout.to(x.device)

    def _with_room(self, nodes: Mapping[str, Mapping[str, Tensor]], layout: Layout) -> Mapping[str, Mapping[str, Tensor]]:
        """Growing caches get their new capacity before calls that keep it: single tokens, and segments of a loop."""
        if not self.growing:
            return nodes
        looped = {n for loop in self.compilation.loops for n in loop.nodes}
        single = layout.clock.valid.shape[1] == 1
        room = room_for(layout.position)
        return {
            n: {
                k: _grow(t, room) if f"nodes/{n}/{k}" in self.growing and (single or n in looped) else t
                for k, t in tensors.items()
            }
            for n, tensors in nodes.items()
        }

    def _check_input(self, x: Tensor, document: Tensor | None) -> None:
        ((name, kind),) = self.compilation.inputs.items()
        _check_plain(f"input {name!r}", x, kind.text())
        if kind.dim is None:
            self._check_ids(name, x)
        elif x.dim() != 3 or x.shape[2] != kind.dim or not x.is_floating_point():
            raise InputError(f"input {name!r} must be floating point {kind.text()}, got {list(x.shape)} {x.dtype}")
        reference = next(self.parameters(), None)
        if reference is not None and x.device != reference.device:
            raise InputError(f"input {name!r} is on {x.device}, the model on {reference.device}; move one of them")
        if reference is not None and kind.dim is not None and x.dtype != reference.dtype and not _autocast(x):
            raise InputError(f"input {name!r} is {x.dtype}, the model {reference.dtype}; convert one of them")
        if document is not None:
            _check_document(x, document)

    def _check_ids(self, name: str, x: Tensor) -> None:
        if x.dim() != 2 or x.dtype not in (torch.int64, torch.int32):
            raise InputError(f"input {name!r} must be ids [B, T] int64, got {list(x.shape)} {x.dtype}")
        vocab = self._vocabulary()
        if vocab is not None and x.numel() and x.device.type == "cpu":
            low, high = int(x.min()), int(x.max())
            if low < 0 or high >= vocab:
                raise InputError(f"ids must be in 0..{vocab - 1} (the vocabulary), got {low}..{high}")

    def _vocabulary(self) -> int | None:
        c = self.compilation
        sizes = [c.sites[n].parameters.vocab for n, node in c.nodes.items() if node.use == "embedding"]
        return min(sizes) if sizes else None

    def _check_state(self, x: Tensor, state: State | None) -> State:
        if state is None:
            return self.initial_state(x.shape[0])
        if not isinstance(state, State):
            raise StateError(f"state must be a titans_graph.State, got {type(state).__name__}")
        if state.fingerprint != self.fingerprint:
            raise StateError(f"this state belongs to another spec than {self.name!r}")
        if state.batch != x.shape[0]:
            raise StateError(f"the state has {state.batch} rows, the input {x.shape[0]}; use state.reorder(rows)")
        self._check_tensors(x, state)
        return state

    def _check_tensors(self, x: Tensor, state: State) -> None:
        """What a state holds is of the model's type and device: :meth:`State.map` may have changed that."""
        clock = (state.position, state.document)
        if any(t.dtype != torch.int64 or t.device.type != "cpu" or t.shape != (x.shape[0],) for t in clock):
            raise StateError("position and document of a state are int64 [B] on the CPU; move and convert state.nodes alone")
        reference = next(self.parameters(), None)
        if reference is None:
            return
        # Not settled for the look: that would be the work which single tokens put off.
        held = state.nodes.held if isinstance(state.nodes, Stepping) else state.nodes
        for node, tensors in held.items():
            precise = self._module(node).precise
            for key, t in tensors.items():
                wanted = torch.promote_types(reference.dtype, torch.float32) if key.startswith(precise) else reference.dtype
                same = t.dtype == wanted or not t.is_floating_point() or _autocast(x)
                if t.device != reference.device or not same:
                    keeps = "" if wanted == reference.dtype else f", which keeps this in {wanted}"
                    raise StateError(
                        f"{key} of {node!r} is {t.dtype} on {t.device}, "
                        f"the model {reference.dtype} on {reference.device}{keeps}; "
                        "make the state after model.to(...), or convert it with state.map"
                    )

    def compile(self, **options: Any) -> Compiled:  # type: ignore[override]
        """A model that shares these parameters and runs regions through ``torch.compile`` (every region fullgraph).

        Where no C++ compiler is found on a CPU machine it runs uncompiled and says so once. options go to
        ``torch.compile`` (``mode``, ``options``).
        """
        from titans_graph.runtime.compiled import CompiledRunner

        twin = Compiled.__new__(Compiled)
        twin.__dict__ = copy.copy(self.__dict__)
        twin._runner = CompiledRunner(self.compilation.lowered, options)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickles: the graph's text and the modules; the program is made again from them (runtime/pickling.py)."""
        from titans_graph.runtime.pickling import bare, packed

        cls = Model if isinstance(self, Compiled) else type(self)
        return bare, (cls,), packed(self)

    def __setstate__(self, content: dict[str, Any]) -> None:
        """From a pickle."""
        from titans_graph.runtime.pickling import unpack

        unpack(self, content)

    def __copy__(self) -> Model:
        """A model that shares everything."""
        twin = type(self).__new__(type(self))
        twin.__dict__ = copy.copy(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Model:
        """A model with parameters of its own."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        shared = {"compilation", "_runner"}
        twin.__dict__ = {k: v if k in shared else copy.deepcopy(v, memo) for k, v in self.__dict__.items()}
        return twin


class Compiled(Model):
    """A model whose regions run compiled; made by :meth:`Model.compile`."""

    _runner: Any

    def report(self) -> Report:
        """What was compiled: variants of each region, graph breaks, recompiles, seconds."""
        report: Report = self._runner.report()
        return report

    def warm_up(self, batch: int, *, training: bool = False) -> Report:
        """Build every variant for this batch size now: one token, and a longer call; with gradients if ``training``."""
        from titans_graph.runtime.compiled import warm_up

        return warm_up(self, batch, training)


def _check_plain(what: str, x: object, wanted: str) -> None:
    """A plain dense tensor, whose shape and type can be asked for."""
    if not isinstance(x, Tensor):
        raise InputError(f"{what} must be a tensor {wanted}, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        raise InputError(f"{what} must be a dense tensor {wanted}, got one of layout {x.layout}")


def _check_document(x: Tensor, document: Tensor) -> None:
    _check_plain("document", document, f"{list(x.shape[:2])} int64")
    if document.shape != x.shape[:2] or document.dtype not in (torch.int64, torch.int32):
        raise InputError(f"document must be ids {list(x.shape[:2])} int64, got {list(document.shape)} {document.dtype}")
    if document.device.type == "meta":
        raise InputError("document is on meta, and its ids are read to lay the tokens out; give one with data")
    if document.numel() and int(document.min()) < 0:
        raise InputError("document ids must be 0 or more")


def _grow(cache: Tensor, room: int) -> Tensor:
    if cache.shape[1] >= room:
        return cache
    return torch.cat([cache, cache.new_zeros(cache.shape[0], room - cache.shape[1], *cache.shape[2:])], dim=1)


def _autocast(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def fingerprint(graph: Graph) -> str:
    """A name for the architecture: equal for equal graphs, whatever the file is called and its blocks' order."""
    blocks = {name: graph.blocks[name] for name in _by_first_use(graph)}
    return hashlib.sha256(replace(graph, name="", blocks=blocks).text().encode()).hexdigest()


def _by_first_use(graph: Graph) -> list[str]:
    """The names of the blocks in the order in which a spec that is read makes them: by first use, the outer ones first."""
    found: dict[str, None] = {}
    waiting = [graph.main]
    for block in waiting:
        new = dict.fromkeys(node.use for node in block.nodes if node.use in graph.blocks and node.use not in found)
        found |= new
        waiting.extend(graph.blocks[name] for name in new)
    return list(found)


__all__ = ["Compiled", "Holder", "Model", "Summary", "fingerprint"]
