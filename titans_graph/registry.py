"""The registry: which components exist, what their ports and parameters are, and the contract they fulfil.

Stands after :mod:`titans_graph.shapes`; imports no torch. A component's own file is imported when it is first looked up.
Others' packages add components through the entry-point group ``titans_graph.components`` (name = component id, value =
``module:Class``).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from titans_graph.errors import (
    Diagnostic,
    ShapeMismatch,
    TitansGraphError,
    UnknownParameter,
    UsageError,
    WrongType,
    suggest,
)
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


class SiteError(TitansGraphError):
    """A component refuses its site. ``key`` names the port or parameter at fault, so that the error gets its place."""

    def __init__(self, message: str, *, kind: type[Diagnostic] = ShapeMismatch, key: str = "", help: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind
        self.key = key
        self.help = help


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
    """The entries of a state that are float32 where the model is of a narrower type."""
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


def parameter(
    default: Any = dataclasses.MISSING,
    *,
    doc: str,
    reason: str = "",
    choices: tuple[Any, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A field of a component's ``Parameters``: what it means, why the default is what it is, and which values are legal."""
    metadata = {"doc": doc, "reason": reason, "choices": choices, "minimum": minimum, "maximum": maximum}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ParameterProblem:
    """One mistake in a component's parameters: the diagnostic class, the key at fault, what is wrong, how to mend it."""

    kind: type[Diagnostic]
    key: str
    message: str
    help: str = ""


@functools.cache
def _plugins() -> dict[str, str]:
    return {e.name: e.value for e in entry_points(group=ENTRY_POINTS)}


def names() -> list[str]:
    """The ids of all known components, own and others', sorted."""
    return sorted({**_plugins(), **TABLE})


def known(name: str) -> bool:
    """Whether a component of that id exists; imports nothing."""
    return name in TABLE or name in _plugins()


@functools.cache
def lookup(name: str) -> type[Component]:
    """The component class of an id. Imports its file; a UsageError where the id is unknown or is no component."""
    target = TABLE.get(name) or _plugins().get(name)
    if target is None:
        raise UsageError(f"unknown component {name!r}; {suggest(name, names())}")
    module, _, attribute = target.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, Component)):
        raise UsageError(f"component {name!r}: {target} is not a titans_graph.registry.Component")
    return found


@functools.cache
def parameter_types(parameters: type) -> dict[str, Any]:
    """Field name -> annotated type of a ``Parameters`` dataclass."""
    return typing.get_type_hints(parameters)


def parse_parameters(parameters: type, values: Mapping[str, Any]) -> tuple[Any | None, list[ParameterProblem]]:
    """Build a ``Parameters`` dataclass from plain values; all mistakes at once, then None instead of an instance."""
    fields = {f.name: f for f in dataclasses.fields(parameters)}
    hints = parameter_types(parameters)
    problems = [
        ParameterProblem(UnknownParameter, key, f"unknown parameter {key!r}", suggest(key, fields, "it takes no parameters"))
        for key in values
        if key not in fields
    ]
    accepted: dict[str, Any] = {}
    for name, spec in fields.items():
        if name not in values:
            if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                message = f"parameter {name!r} is missing ({spec.metadata.get('doc', '')})"
                problems.append(ParameterProblem(WrongType, "", message, f"write {name}: ..."))
            continue
        problem = _check_value(spec, hints[name], values[name])
        if problem is None:
            accepted[name] = _coerce(hints[name], values[name])
        else:
            problems.append(problem)
    if problems:
        return None, problems
    try:
        return parameters(**accepted), []
    except SiteError as error:
        return None, [ParameterProblem(error.kind, error.key, error.message, error.help)]


def _check_value(spec: dataclasses.Field[Any], hint: Any, value: Any) -> ParameterProblem | None:
    name, meta = spec.name, spec.metadata
    if not _fits(hint, value):
        message = f"parameter {name!r} must be {_type_name(hint)}, got {_shown(value)}"
        return ParameterProblem(WrongType, name, message, meta.get("doc", ""))
    choices = meta.get("choices") or ()
    if choices and value not in choices:
        message = f"parameter {name!r} must be one of {', '.join(map(repr, choices))}, got {_shown(value)}"
        return ParameterProblem(WrongType, name, message, suggest(str(value), [str(c) for c in choices]))
    low, high = meta.get("minimum"), meta.get("maximum")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and ((low is not None and value < low) or (high is not None and value > high)):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        return ParameterProblem(WrongType, name, f"parameter {name!r} must be {bounds}, got {value}", meta.get("doc", ""))
    return None


def _fits(hint: Any, value: Any) -> bool:
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(option, value) for option in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if typing.get_origin(hint) in (Mapping, dict):
        return isinstance(value, Mapping)
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        wanted = (int, float) if hint is float else int
        return isinstance(value, wanted) and not isinstance(value, bool) and value == value
    return isinstance(value, hint)


def _coerce(hint: Any, value: Any) -> Any:
    return float(value) if hint is float and isinstance(value, int) else value


def _type_name(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}
    if hint in words:
        return words[hint]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_type_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) in (Mapping, dict):
        return "a mapping"
    return str(getattr(hint, "__name__", hint))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
