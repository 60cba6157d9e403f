"""What a memory network is made of: one table of operations, each with its options, size rule, arithmetic and bounds.

Stands before :mod:`~titans_graph.kernels.networks`, which makes graphs of them; imports no torch, so that descriptions are
checked without it. An operation touches fast (inner-learned) weights only through a :class:`Use`, as ``u @ W`` or as a
vector that is broadcast over tokens: then the gradient of one token is the outer product of what went in and one delta,
and a whole chunk has an exact parallel form. :data:`NO_FORM` says why other things have none.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from titans_graph.errors import UsageError, shortened

if TYPE_CHECKING:
    from torch import Tensor

Options = Mapping[str, Any]
Plain = int | float | bool | str | None

_MULTIPLE = re.compile(r"\s*(?:([0-9]{1,6})\s*\*\s*)?dim\s*(?:/\s*([0-9]{1,6})\s*)?", re.ASCII)

INPUT = "x"
"""What the network's input is called."""


class NetworkError(UsageError):
    """The description of a memory network cannot be understood; the message says what is allowed.

    ``path`` leads to the place in the description: keys from the outside in, empty where there is no closer place.
    """

    def __init__(self, message: str, *path: str) -> None:
        super().__init__(shortened(message))  # names in it may be of any length
        self.path = path


class Use(Protocol):
    """How a network reaches its fast weights. ``u`` is ``[..., C, in]``; results broadcast over the same axes."""

    def linear(self, name: str, u: Tensor) -> Tensor:
        """``u @ W_name``: ``[..., C, in] -> [..., C, out]``."""

    def vector(self, name: str) -> Tensor:
        """The vector ``name``, broadcastable against ``[..., C, size]``."""


class Node(NamedTuple):
    """One node: its name, the operation it uses, the names of its inputs, and its options, complete and sorted."""

    name: str
    use: str
    inputs: tuple[str, ...]
    options: tuple[tuple[str, Plain], ...] = ()

    @property
    def weight(self) -> str:
        """The name of its fast weight: the option ``weight``, or the node's own name."""
        return str(dict(self.options).get("weight") or self.name)


class At(NamedTuple):
    """What the bounds of one node are made of, for inputs of unit length to the network; tensors ``[N]`` or ``[N, C]``.

    ``lengths``: upper bounds of the lengths of its inputs. ``norm``: the norm of its fast weight (1 where it has none).
    ``local``: its gain at the token, where the operation has no finite one. ``size``: the size of its output.
    """

    lengths: list[Tensor]
    norm: Tensor
    local: Tensor
    size: int
    options: Options


class Option(NamedTuple):
    """An option of an operation: its default and what makes a value canonical (ValueError with what it must be)."""

    default: Plain
    parse: Callable[[Any], Plain]
    required: bool = False


Sizes = Mapping[str, int]
Apply = Callable[[Use, str, Options, "Sequence[Tensor]"], "Tensor"]
Bounds = Callable[[At], "Tensor"]


@dataclass(frozen=True)
class Op:
    """One operation. ``apply`` gets the use, the name of the node's fast weight, its options and input values.

    ``length`` bounds the length of the output, ``gains`` the gain from each input to the output, ``share`` (fast ones) the
    length of the output's Jacobian by the fast weight. ``measure`` is the norm of the fast weight that these mean:
    ``spectral`` of a matrix, ``length`` or ``largest`` entry of a vector; empty for an operation without a fast weight.
    ``local`` gives the gain at a token from the value that goes in, where there is no finite gain for all.
    """

    apply: Apply
    length: Bounds
    gains: Callable[[At], Sequence[Tensor | float]]
    size: Callable[[Node, Sizes, int], int]
    options: Mapping[str, Option] = field(default_factory=dict)
    least: int = 1
    most: int | None = 1
    measure: str = ""
    share: Bounds | None = None
    start: float = 0.0
    local: Callable[[Options, Tensor], Tensor] | None = None


_LONGEST_WORD = 64


def near(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: what is probably meant, or what there is."""
    # Some of these words come from a description, and may be anything; comparing long ones is slow.
    known = list(known)
    found = difflib.get_close_matches(word[:_LONGEST_WORD], [name for name in known if len(name) <= _LONGEST_WORD], n=1)
    if found:
        return f"did you mean {found[0]!r}?"
    shown = [(name if name.isprintable() else repr(name))[:40] for name in sorted(known)]
    return "known here: " + (", ".join(shown[:24]) + (", ..." if len(shown) > 24 else "") or "none")


NO_FORM: dict[str, str] = {
    "conv": "it mixes tokens, so that one token's gradient by the fast weight depends on others; "
    "use the memory's `conv`, or conv.causal before it",
    "attention": "it mixes tokens, so that one token's gradient by the fast weights depends on others; "
    "put it beside the memory",
    "batch": "it mixes rows of the batch, which must not see each other; use norm.rms or norm.layer",
    "dropout": "it is random, so that streaming would not repeat what training computed",
    "muon": "it orthogonalises the gradient, so that a chunk's update is no weighted sum of its tokens' outer products",
    "newton": "it is nonlinear in the gradient, so that a chunk's update is no weighted sum of its tokens' outer products",
    "adam": "it divides by past gradients entry by entry, so that a chunk's update is no weighted sum of outer products",
    "sign": "it is nonlinear in the gradient, so that a chunk's update is no weighted sum of its tokens' outer products",
    "clip": "it is nonlinear in the gradient, so that a chunk's update is no weighted sum of its tokens' outer products",
    "decay": "a decay per channel needs a mixing matrix per channel instead of one per head; "
    "the memory's `forget` is one decay per head and token",
    "channel": "gates per channel need a mixing matrix per channel instead of one per head",
}
"""Words of things that have no chunk-parallel form, and why."""


def no_form(word: str) -> str:
    """Why what ``word`` means has no chunk-parallel form, as a sentence; empty where nothing is known against it."""
    parts = re.split(r"[^a-z]+", word.lower())
    for stem, why in NO_FORM.items():
        if any(part.startswith(stem) for part in parts):
            return f"{word!r:.60} has no chunk-parallel form: {why}"
    if parts[0] == "fast":
        return (
            f"{word!r:.60} has no chunk-parallel form: fast weights are reached as products u @ W (fast.linear), sums "
            "(fast.bias) and factors (fast.gain) alone, whose gradients per token are outer products"
        )
    return ""


def size_of(value: Any) -> int | str:
    """A size in canonical form, ``12`` or ``3*dim/2``; ValueError with what it must be."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    found = _MULTIPLE.fullmatch(value) if isinstance(value, str) else None
    times, parts = (int(found[1] or 1), int(found[2] or 1)) if found else (0, 0)
    if not times or not parts:
        raise ValueError("a whole number of at least 1, or a multiple of dim such as 4*dim or dim/2")
    common = math.gcd(times, parts)
    times, parts = times // common, parts // common
    return (f"{times}*" if times > 1 else "") + "dim" + (f"/{parts}" if parts > 1 else "")


def resolve(size: Any, dim: int, where: str, *path: str) -> int:
    """A canonical size as a number; None means ``dim``. NetworkError where ``dim`` has no such part."""
    if size is None:
        return dim
    if isinstance(size, int):
        return size
    head, _, tail = str(size).partition("dim")
    times, parts = int(head[:-1]) if head else 1, int(tail[1:]) if tail else 1
    if times * dim % parts:
        raise NetworkError(f"{where}: {size} is no whole number for dim {dim}", *path)
    return times * dim // parts


def _optional_size(value: Any) -> int | str | None:
    return None if value is None else size_of(value)


def _name(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError("the name of a fast weight")
    return value


def _positive(value: Any) -> float:
    if not _is_number(value) or not 0 < value <= 1:
        raise ValueError("a number above 0, at most 1")
    return float(value)


def _factor(value: Any) -> float:
    if not _is_number(value) or value == 0 or not math.isfinite(value):
        raise ValueError("a finite number other than 0")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _linear_size(node: Node, sizes: Sizes, dim: int) -> int:
    return resolve(dict(node.options)["size"], dim, f"node {node.name!r}", "nodes", node.name, "size")


def _same_size(node: Node, sizes: Sizes, dim: int) -> int:
    first = node.inputs[0]
    for other in node.inputs[1:]:
        if sizes[other] != sizes[first]:
            raise NetworkError(
                f"node {node.name!r}: {node.use} joins {first!r} of size {sizes[first]} and {other!r} of size {sizes[other]}; "
                "their sizes must agree",
                *("nodes", node.name, "in"),
            )
    return sizes[first]


def _second_size(node: Node, sizes: Sizes, dim: int) -> int:
    return sizes[node.inputs[1]]


def _pure(function: Callable[..., Tensor]) -> Apply:
    """An operation without fast weights, from a function of its options and inputs."""
    return lambda use, name, options, inputs: function(options, *inputs)


def _silu(options: Options, z: Tensor) -> Tensor:
    from titans_graph.kernels.activations import silu

    return silu(z)


def _gelu(options: Options, z: Tensor) -> Tensor:
    import torch.nn.functional as functional

    return functional.gelu(z)


def _relu2(options: Options, z: Tensor) -> Tensor:
    return z.relu().square()


def _rms(options: Options, z: Tensor) -> Tensor:
    """z / sqrt(mean z^2 + eps)."""
    return z * _rms_gain(options, z)[..., None]


def _rms_gain(options: Options, z: Tensor) -> Tensor:
    eps: float = options["eps"]
    return (z.square().mean(-1) + eps).rsqrt()


def _layer(options: Options, z: Tensor) -> Tensor:
    """The same after subtracting the mean."""
    return _rms(options, z - z.mean(-1, keepdim=True))


def _layer_gain(options: Options, z: Tensor) -> Tensor:
    return _rms_gain(options, z - z.mean(-1, keepdim=True))


def _product(options: Options, first: Tensor, *rest: Tensor) -> Tensor:
    for other in rest:
        first = first * other
    return first


def _sum(options: Options, first: Tensor, *rest: Tensor) -> Tensor:
    for other in rest:
        first = first + other
    return first


def _residual(options: Options, before: Tensor, after: Tensor) -> Tensor:
    """``before + after`` where their sizes agree, ``after`` where they do not."""
    return before + after if before.shape[-1] == after.shape[-1] else after


def _product_length(at: At) -> Tensor:
    """The entries of a vector are at most its length, so lengths multiply."""
    length = at.lengths[0]
    for other in at.lengths[1:]:
        length = length * other
    return length


def _product_gains(at: At) -> list[Tensor | float]:
    gains: list[Tensor | float] = []
    for i in range(len(at.lengths)):
        gain: Tensor | float = 1.0
        for j, other in enumerate(at.lengths):
            gain = gain if i == j else gain * other
        gains.append(gain)
    return gains


def _total(at: At) -> Tensor:
    length = at.lengths[0]
    for other in at.lengths[1:]:
        length = length + other
    return length


def _full(at: At) -> Tensor:
    """The length of a normalised vector: at most the root of its size."""
    return at.lengths[0].new_full(at.lengths[0].shape, math.sqrt(at.size))


def _elementwise(function: Callable[[Options, Tensor], Tensor], slope: float, length: Bounds) -> Op:
    return Op(_pure(function), length, lambda at: (slope,), _same_size)


def _input_length(at: At) -> Tensor:
    return at.lengths[0]


_EPS = {"eps": Option(1e-6, _positive)}
_WEIGHT = {"weight": Option(None, _name)}

OPS: dict[str, Op] = {
    # u W
    "fast.linear": Op(
        lambda use, name, options, inputs: use.linear(name, inputs[0]),
        lambda at: at.lengths[0] * at.norm,
        lambda at: (at.norm,),
        _linear_size,
        {"size": Option(None, _optional_size), **_WEIGHT},
        measure="spectral",
        share=_input_length,
    ),
    # u + b
    "fast.bias": Op(
        lambda use, name, options, inputs: inputs[0] + use.vector(name),
        lambda at: at.lengths[0] + at.norm,
        lambda at: (1.0,),
        _same_size,
        _WEIGHT,
        measure="length",
        share=lambda at: at.norm.new_ones(at.norm.shape),
    ),
    # u * g
    "fast.gain": Op(
        lambda use, name, options, inputs: inputs[0] * use.vector(name),
        lambda at: at.lengths[0] * at.norm,
        lambda at: (at.norm,),
        _same_size,
        _WEIGHT,
        measure="largest",
        share=_input_length,
        start=1.0,
    ),
    # The largest slopes of silu and gelu are 1.09984 and 1.12890.
    "silu": _elementwise(_silu, 1.0999, _input_length),
    "gelu": _elementwise(_gelu, 1.1290, _input_length),
    "relu2": Op(_pure(_relu2), lambda at: at.lengths[0].square(), lambda at: (2 * at.lengths[0],), _same_size),
    "tanh": _elementwise(lambda options, z: z.tanh(), 1.0, lambda at: at.lengths[0].clamp_max(math.sqrt(at.size))),
    "sigmoid": _elementwise(
        lambda options, z: z.sigmoid(),
        0.25,
        lambda at: (at.lengths[0] / 4 + math.sqrt(at.size) / 2).clamp_max(math.sqrt(at.size)),
    ),
    "norm.rms": Op(_pure(_rms), _full, lambda at: (at.local,), _same_size, _EPS, local=_rms_gain),
    "norm.layer": Op(_pure(_layer), _full, lambda at: (at.local,), _same_size, _EPS, local=_layer_gain),
    "add": Op(_pure(_sum), _total, lambda at: [1.0] * len(at.lengths), _same_size, least=2, most=None),
    # As if the two were always added: an upper bound either way.
    "residual": Op(_pure(_residual), _total, lambda at: (1.0, 1.0), _second_size, least=2, most=2),
    "product": Op(_pure(_product), _product_length, _product_gains, _same_size, least=2, most=None),
    "scale": Op(
        _pure(lambda options, z: z * options["by"]),
        lambda at: at.lengths[0] * abs(at.options["by"]),
        lambda at: (abs(at.options["by"]),),
        _same_size,
        {"by": Option(1.0, _factor, required=True)},
    ),
}
