"""The registry: which components exist, what their ports and parameters are, and the contract they fulfil.

Stands after :mod:`titans_graph.parameters`; imports no torch. A component's own file is imported when it is first looked up.
Others' packages add components through the entry-point group ``titans_graph.components`` (name = component id, value =
``module:Class``), a program or notebook through :func:`register`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from titans_graph.errors import PluginError, UsageError, shortened, suggest
from titans_graph.parameters import ParameterProblem, SiteError, parameter, parameter_types, parse_parameters, stand_ins
from titans_graph.shapes import Dependence, Stage, Value

if TYPE_CHECKING:
    from torch import Tensor

# id -> "module:Class"; one line per component.
TABLE: dict[str, str] = {
    "add": "titans_graph.components.add:Add",
    "attention.full": "titans_graph.components.attention:FullAttention",
    "attention.segment": "titans_graph.components.attention:SegmentAttention",
    "attention.window": "titans_graph.components.attention:WindowAttention",
    "conv.causal": "titans_graph.components.conv_causal:CausalConv",
    "embedding": "titans_graph.components.embedding:Embedding",
    "gate.product": "titans_graph.components.gate_product:ProductGate",
    "gate.residual": "titans_graph.components.gate_residual:ResidualGate",
    "gate.sigmoid": "titans_graph.components.gate_sigmoid:SigmoidGate",
    "head.linear": "titans_graph.components.head_linear:LinearHead",
    "head.tied": "titans_graph.components.head_tied:TiedHead",
    "linear": "titans_graph.components.linear:Linear",
    "memory.neural": "titans_graph.components.memory_neural:NeuralMemory",
    "mlp.swiglu": "titans_graph.components.mlp_swiglu:SwiGLU",
    "norm.rms": "titans_graph.components.norm_rms:RMSNorm",
    "sequence.concat": "titans_graph.components.sequence_concat:Concat",
    "sequence.slice": "titans_graph.components.sequence_slice:Slice",
    "tokens.persistent": "titans_graph.components.tokens_persistent:PersistentTokens",
}

ENTRY_POINTS = "titans_graph.components"
_NAME = re.compile(r"[a-z]\w*(\.\w+)*", re.ASCII)
_TAKEN = ("use", "in", "repeat")


@dataclass(frozen=True)
class Port:
    """One named input or output of a component.

    ``accepts`` (inputs): ``stream`` one piece ``[B, T, dim]``; ``ids`` integers ``[B, T]``; ``fixed`` elements that belong
    to no token ``[n, dim]``; ``sequence`` any pieces with features. ``many``: the port takes a list of values, in order.
    """

    name: str
    doc: str
    accepts: str = "stream"
    required: bool = True
    many: bool = False


@dataclass(frozen=True)
class Site:
    """Everything a component may know of its place in a graph, before any tensor exists.

    ``inputs`` maps each connected input port to the types of its values (one, or several for a ``many`` port);
    ``segment`` is the enclosing block's segment in tokens, or None; ``dim`` the feature size of the enclosing block's
    first input, or None; ``used`` the output ports somebody reads.
    """

    name: str
    parameters: Any
    inputs: Mapping[str, tuple[Value, ...]]
    segment: int | None = None
    dim: int | None = None
    used: frozenset[str] = frozenset()

    def value(self, port: str) -> Value:
        """The type at a connected port that takes one value."""
        return self.inputs[port][0]

    def connected(self, port: str) -> bool:
        """Whether the input port is connected."""
        return bool(self.inputs.get(port))

    def features(self, port: str) -> int:
        """The feature size at a connected port; a SiteError where the value has none."""
        dim = self.value(port).dim
        if dim is None:
            raise SiteError(f"input {port!r} needs features, got ids {self.value(port).text()}", key=port)
        return dim


class Component:
    """The contract of a component: a mixin beside ``torch.nn.Module``, one class in one file.

    The class methods answer questions about a :class:`Site` without building anything; the instance computes.

    The first input port is the one that ``in:`` in a spec means; most components call it ``x``.

    ``forward`` takes the connected input ports as keyword arguments (a ``many`` port gets a tuple), and for stateful
    components also ``state`` (a flat mapping of tensors, batch first) and ``clock``; with several stages, ``stage``.
    It returns the stage's outputs (a tensor, or a tuple in the order of ``Stage.outputs``);
    the stage that updates returns ``(outputs, new_state)``.
    """

    Parameters: ClassVar[type]
    inputs: ClassVar[tuple[Port, ...]]
    outputs: ClassVar[tuple[Port, ...]] = (Port("out", "the result"),)
    stateful: ClassVar[bool] = False
    grows: ClassVar[bool] = False
    """Whether the state grows with the number of tokens read (full attention only)."""
    precise: ClassVar[tuple[str, ...]] = ()
    """How the names of those entries of a state begin that are float32 where the model is of a narrower type."""
    partial: ClassVar[bool] = False
    """Whether ``infer`` can name output types before all inputs are known (what stands on a feedback loop must)."""
    default_kernel: ClassVar[str] = ""
    """What ``kernel: auto`` means, for components with a parameter ``kernel``; empty for those with one implementation."""

    @classmethod
    def infer(cls, site: Site) -> dict[str, Value]:
        """Types of the output ports; raises SiteError where the inputs do not fit."""
        raise TypeError(f"{cls.__name__} does not say what types its outputs have")

    @classmethod
    def dependences(cls, site: Site) -> tuple[Dependence, ...]:
        """How each output depends in time on each connected input; pointwise (or fixed) unless a component says more."""
        return tuple(
            Dependence(port, out.name, "pointwise" if any(v.timed for v in values) else "fixed")
            for port, values in site.inputs.items()
            for out in cls.outputs
        )

    @classmethod
    def stages(cls, site: Site) -> tuple[Stage, ...]:
        """The calls a schedule makes, in any order that the wiring allows; one for most components."""
        return (Stage("run", tuple(site.inputs), tuple(o.name for o in cls.outputs), updates=cls.stateful),)

    @classmethod
    def periods(cls, site: Site) -> tuple[int, ...]:
        """Chunk and segment lengths (tokens) that the grid must be aligned to."""
        return ()

    @classmethod
    def flops(cls, site: Site) -> float:
        """Floating-point operations per token of a forward pass (a multiply-add counts two); 0 where negligible."""
        return 0.0

    compiles: bool = True
    """Whether what holds it goes through torch.compile; an instance that is meant to run as written says no."""

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        """The state before the first token, batch first; on the parameters' device and dtype."""
        return {}

    def stepping(self, state: Mapping[str, Tensor], position: Tensor) -> Mapping[str, Tensor]:
        """The state in the form in which single tokens are read without gradients; most components have no other.

        Called outside compiled regions before every such token, ``position`` int64 ``[B]`` on the CPU being where it stands.
        From a call on such a state the component may return what changed alone.
        """
        return state

    def settled(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The state as :meth:`initial_state` describes it, from the one that a single token left."""
        return state

    def prebuild(self, batch: int, training: bool) -> None:
        """Begin, beside the compilation of the model, to build what this component compiles for itself; most nothing."""


@functools.cache
def _plugins() -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group=ENTRY_POINTS)}


_REGISTERED: dict[str, type[Component]] = {}


def register(name: str, component: type[Component], *, replace: bool = False) -> type[Component]:
    """Make a component of one's own known in this process under an id such as ``"mine.ema"``; returns the class.

    component: a class under :class:`Component` and ``torch.nn.Module``, as CONTRIBUTING.md describes them. From then on it
    is used like the built-in ones, in specs and in :class:`titans_graph.Builder`. The same id may be registered again
    by a class of the same module and name (a notebook cell that runs twice), by another one with ``replace``; models
    that were built before keep theirs. Other processes do not know it: register it where a module is imported that they
    import too, or package it with an entry point in the group ``titans_graph.components``.

    Raises :class:`titans_graph.errors.UsageError` where the id is no word, is a built-in or installed component's, or is
    taken by another class, and where the class lacks something of the contract.
    """
    _check_id(name)
    lacking = _lacking(component)
    if lacking:
        raise UsageError(f"component {name!r}: {lacking}")
    known_as = _REGISTERED.get(name, component)
    same = (known_as.__module__, known_as.__qualname__) == (component.__module__, component.__qualname__)
    if not same and not replace:
        other = f"{known_as.__module__}.{known_as.__qualname__}"
        raise UsageError(f"component {name!r} is registered as {other}; choose another id, or give replace=True")
    _REGISTERED[name] = component
    lookup.cache_clear()
    return component


def _check_id(name: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"{name!r:.100} is no id for a component; write words joined by dots, such as 'mine.ema'")
    if name in TABLE or name in _plugins():
        where = "a built-in component" if name in TABLE else _origin(_plugins()[name])
        raise UsageError(f"component {name!r} is {where}; choose another id, such as 'mine.{name.rpartition('.')[2]}'")


def names() -> list[str]:
    """The ids of all known components, own and others', sorted."""
    return sorted({*_plugins(), *_REGISTERED, *TABLE})


def known(name: str) -> bool:
    """Whether a component of that id exists; imports nothing."""
    return name in TABLE or name in _REGISTERED or name in _plugins()


@functools.cache
def lookup(name: str) -> type[Component]:
    """The component class of an id; imports its file.

    UsageError where the id is unknown, :class:`titans_graph.errors.PluginError` where another project's component cannot be
    imported or is none.
    """
    if name in _REGISTERED and name not in TABLE:
        return _REGISTERED[name]
    if name not in TABLE and name in _plugins():
        return _plugin(_plugins()[name])
    if name not in TABLE:
        raise UsageError(f"unknown component {name!r}; {suggest(name, names())}")
    module, _, attribute = TABLE[name].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, Component)):
        raise UsageError(f"component {name!r}: {TABLE[name]} is not a titans_graph.registry.Component")
    return found


def _plugin(entry: EntryPoint) -> type[Component]:
    """The component behind an entry point; whatever goes wrong in another project's code is said with its origin."""
    try:
        found = entry.load()
    except Exception as error:
        why = f"{type(error).__name__}: {shortened(str(error), 300)}"
        raise PluginError(_broken(entry, f"cannot be imported: {why}")) from error
    lacking = _lacking(found)
    if lacking:
        raise PluginError(_broken(entry, f"is no component: {lacking}"))
    return found  # type: ignore[no-any-return]


def _origin(entry: EntryPoint) -> str:
    name = f"the distribution {entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown distribution"
    return f"the entry point '{entry.name} = {entry.value}' of {name}"


def _broken(entry: EntryPoint, what: str) -> str:
    name = entry.dist.name if entry.dist is not None else "it"
    return (
        f"component {entry.name!r}, {_origin(entry)} (group {ENTRY_POINTS}), {what}\n"
        f"  help: correct the entry point or what it imports and install {name} again, or uninstall {name}"
    )


def _lacking(found: Any) -> str:
    """What a class lacks of the contract that can be seen without a site; an empty string where nothing."""
    if not (isinstance(found, type) and issubclass(found, Component)):
        return f"{found!r:.100} is not a class under titans_graph.registry.Component"
    if not callable(getattr(found, "forward", None)):
        return f"{found.__name__} has no forward; derive it from Component and torch.nn.Module"
    parameters = getattr(found, "Parameters", None)
    if not (isinstance(parameters, type) and dataclasses.is_dataclass(parameters)):
        return f"{found.__name__}.Parameters must be a dataclass, empty where there are none"
    ports = (getattr(found, "inputs", None), found.outputs)
    if not all(isinstance(side, tuple) and all(isinstance(port, Port) for port in side) for side in ports):
        return f"{found.__name__}.inputs and .outputs must be tuples of titans_graph.registry.Port"
    if not found.outputs:
        return f"{found.__name__}.outputs is empty"
    if found.infer.__func__ is Component.infer.__func__:  # type: ignore[attr-defined]
        return f"{found.__name__} has no infer(cls, site), which says what types its outputs have"
    keys = [port.name for port in found.inputs] + [field.name for field in dataclasses.fields(parameters)]
    twice = next((key for key in keys if keys.count(key) > 1 or key in _TAKEN), "")
    return f"the name {twice!r} of a port or parameter of {found.__name__} is taken" if twice else ""


__all__ = [
    "ENTRY_POINTS",
    "TABLE",
    "Component",
    "ParameterProblem",
    "Port",
    "Site",
    "SiteError",
    "known",
    "lookup",
    "names",
    "parameter",
    "parameter_types",
    "parse_parameters",
    "register",
    "stand_ins",
]
