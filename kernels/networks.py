"""Memory networks: what a neural memory computes from its fast weights (arXiv 2501.00663, section 3.1).

A network is a pure function of ``x`` that touches fast weights only through a :class:`Use`: ``use.linear(name, u)`` for
``u @ W`` and ``use.vector(name)`` for a broadcast vector. Everything else (the gradient per token, the chunk-parallel
form, decoding) is derived from that one function. Descriptions are parsed and shapes are known without torch, because
the checker of specs imports them from here.

Adding a network is one :class:`Family` in ``FAMILIES`` (or :func:`register`).
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from titans_graph.errors import UsageError

if TYPE_CHECKING:
    from torch import Generator, Tensor

Options = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]

ACTIVATIONS = ("silu", "gelu", "relu2")


class NetworkError(UsageError):
    """The description of a memory network cannot be understood; the message says what is allowed."""


class Use(Protocol):
    """How a network reaches its fast weights. ``u`` is ``[..., C, in]``; results broadcast over the same axes."""

    def linear(self, name: str, u: Tensor) -> Tensor:
        """``u @ W_name``: ``[..., C, in] -> [..., C, out]``."""

    def vector(self, name: str) -> Tensor:
        """The vector ``name``, broadcastable against ``[..., C, size]``."""


@dataclass(frozen=True)
class Family:
    """One kind of network, as plain functions of its options.

    ``defaults`` names every option with its default; ``short`` is the option meant by a bare number (``{"mlp": 3}``).
    ``check`` raises :class:`NetworkError` for options out of range. ``weights`` gives the shapes of the fast weights
    for a dim. ``apply`` computes the network. ``curvature`` bounds, for keys of unit length, the squared length of the
    Jacobian of the output by all weights, from upper bounds of the weights' spectral norms (None: no bound is known).
    ``uses`` lists the names of the weights in the order of use where a weight is used more than once.
    """

    defaults: Options
    check: Callable[[Options], None]
    weights: Callable[[Options, int], Shapes]
    apply: Callable[[Options, Tensor, Use], Tensor]
    curvature: Callable[[Options, Mapping[str, Tensor]], Tensor] | None = None
    uses: Callable[[Options, int], tuple[str, ...]] | None = None
    short: str = ""


@dataclass(frozen=True)
class Network:
    """A memory network as data: a family and its options, complete with defaults, sorted, hashable."""

    family: str
    options: tuple[tuple[str, int | float | bool | str | None], ...] = ()

    def weights(self, dim: int) -> Shapes:
        """Names and shapes of the fast weights for inputs and outputs of size ``dim``: ``(in, out)`` or ``(size,)``."""
        return FAMILIES[self.family].weights(dict(self.options), dim)

    def uses(self, dim: int) -> tuple[str, ...]:
        """Names of the fast weights in the order in which :meth:`apply` uses them, with repetitions."""
        family = FAMILIES[self.family]
        if family.uses is not None:
            return family.uses(dict(self.options), dim)
        return tuple(family.weights(dict(self.options), dim))

    def apply(self, x: Tensor, use: Use) -> Tensor:
        """The network's output for ``x`` ``[..., C, dim]``, with the same shape."""
        return FAMILIES[self.family].apply(dict(self.options), x, use)

    def curvature(self, norms: Mapping[str, Tensor]) -> Tensor:
        """The Jacobian bound from spectral norms ``{name: [...]}``; :class:`NetworkError` where none is known."""
        curvature = FAMILIES[self.family].curvature
        if curvature is None:
            raise NetworkError(f"memory network {self.family!r} has no curvature bound; use bounded=False")
        return curvature(dict(self.options), norms)

    def initialise(self, name: str, shape: tuple[int, ...], generator: Generator | None = None) -> Tensor:
        """Initial values of one fast weight, float32.

        Matrices are normal with deviation 1/sqrt(in): outputs keep the size of unit-variance inputs, and the product of
        gains in the curvature bound starts near one per layer. Vectors start at zero, except gains (named ``gain*``).
        """
        import torch

        if len(shape) == 1:
            return torch.ones(shape) if name.startswith("gain") else torch.zeros(shape)
        return torch.randn(shape, generator=generator) / math.sqrt(shape[0])

    def text(self) -> str:
        """The canonical description: ``linear``, or JSON such as ``{"mlp": {...}}``; :func:`parse_network` reads it."""
        if not self.options:
            return self.family
        return json.dumps({self.family: dict(self.options)}, sort_keys=True)


def parse_network(description: str | Mapping[str, Any] | Network) -> Network:
    """A network from ``"linear"``, ``{"mlp": {"depth": 2}}``, ``{"mlp": 2}``, or the JSON text of either.

    Raises :class:`NetworkError` for unknown families and options and for values out of range.
    """
    if isinstance(description, Network):
        return description
    if isinstance(description, str):
        return _parse_text(description)
    return _parse(description)


@lru_cache(maxsize=256)
def _parse_text(text: str) -> Network:
    if not text.lstrip().startswith(("{", '"')):
        return _parse({text.strip(): {}})
    try:
        value = json.loads(text)
    except json.JSONDecodeError as problem:
        raise NetworkError(f"memory network {text!r} is not JSON: {problem}") from None
    return _parse({value: {}} if isinstance(value, str) else value)


def _parse(description: Any) -> Network:
    if not isinstance(description, Mapping) or len(description) != 1:
        raise NetworkError(f"a memory network is a name or one {{name: options}}, not {description!r}")
    name, given = next(iter(description.items()))
    if name not in FAMILIES:
        raise NetworkError(f"unknown memory network {name!r}; {_near(str(name), FAMILIES)}")
    family = FAMILIES[name]
    if given is None:
        given = {}
    if family.short and isinstance(given, int) and not isinstance(given, bool):
        given = {family.short: given}
    if not isinstance(given, Mapping):
        raise NetworkError(f"options of memory network {name!r} must be a mapping, not {given!r}")
    for key in given:
        if key not in family.defaults:
            raise NetworkError(f"memory network {name!r} has no option {key!r}; {_near(str(key), family.defaults)}")
    options = {**family.defaults, **given}
    family.check(options)
    return Network(name, tuple(sorted(options.items())))


def _near(word: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else "known here: " + (", ".join(sorted(known)) or "none")


def register(name: str, family: Family) -> None:
    """Make ``family`` known as ``name``; :class:`NetworkError` where the name is taken by another."""
    if FAMILIES.get(name, family) is not family:
        raise NetworkError(f"memory network {name!r} is already registered")
    FAMILIES[name] = family


def activate(kind: str, z: Tensor) -> Tensor:
    """The activation ``kind`` of ``z``, elementwise: silu, gelu (exact), relu2 (squared relu)."""
    import torch.nn.functional as functional

    if kind == "silu":
        return functional.silu(z)
    if kind == "gelu":
        return functional.gelu(z)
    return functional.relu(z).square()


def _slope(kind: str, size: Tensor) -> Tensor | float:
    """An upper bound of the activation's slope for inputs of length at most ``size``."""
    return {"silu": 1.0999, "gelu": 1.1290}[kind] if kind != "relu2" else 2 * size


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise NetworkError(message)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_nothing(options: Options) -> None:
    del options


def _linear_weights(options: Options, dim: int) -> Shapes:
    return {"w": (dim, dim)}


def _linear_apply(options: Options, x: Tensor, use: Use) -> Tensor:
    return use.linear("w", x)


def _linear_curvature(options: Options, norms: Mapping[str, Tensor]) -> Tensor:
    return norms["w"].new_ones(norms["w"].shape)


def _mlp_check(options: Options) -> None:
    _require(_is_size(options["depth"]), f"mlp: depth must be a whole number of at least 1, not {options['depth']!r}")
    _check_hidden("mlp", options)
    kind = options["activation"]
    _require(kind in ACTIVATIONS, f"mlp: activation must be one of {', '.join(ACTIVATIONS)}, not {kind!r}")
    _require(isinstance(options["residual"], bool), f"mlp: residual must be true or false, not {options['residual']!r}")


def _check_hidden(name: str, options: Options) -> None:
    hidden = options["hidden"]
    _require(hidden is None or _is_size(hidden), f"{name}: hidden must be a positive whole number or null, not {hidden!r}")


def _mlp_weights(options: Options, dim: int) -> Shapes:
    """w1..wL of (in, out), applied in order. ``residual`` needs a layer whose input and output agree in size."""
    depth, hidden = options["depth"], options["hidden"] or 4 * dim
    sizes = [dim, *[hidden] * (depth - 1), dim]
    if options["residual"] and all(a != b for a, b in pairwise(sizes)):
        raise NetworkError("mlp: residual has no effect, no layer's input and output agree in size; set hidden or depth")
    return {f"w{i + 1}": (sizes[i], sizes[i + 1]) for i in range(depth)}


def _mlp_apply(options: Options, x: Tensor, use: Use) -> Tensor:
    """h_l = [h_{l-1} +] activation(h_{l-1} W_l), no activation after the last layer; the sum wherever sizes agree."""
    depth = options["depth"]
    for layer in range(1, depth + 1):
        z = use.linear(f"w{layer}", x)
        h = z if layer == depth else activate(options["activation"], z)
        x = x + h if options["residual"] and h.shape[-1] == x.shape[-1] else h
    return x


def _mlp_curvature(options: Options, norms: Mapping[str, Tensor]) -> Tensor:
    """sum over layers of (input length * gain of everything after)^2, both from products of the norms."""
    depth, kind = options["depth"], options["activation"]
    skip = 1.0 if options["residual"] else 0.0
    length = norms["w1"].new_ones(norms["w1"].shape)
    lengths, slopes = [], []
    for layer in range(1, depth + 1):
        lengths.append(length)
        z = length * norms[f"w{layer}"]
        slopes.append(_slope(kind, z) if layer < depth else 1.0)
        length = skip * length + (z.square() if kind == "relu2" and layer < depth else z)
    after: Tensor | float = 1.0
    total = norms["w1"].new_zeros(norms["w1"].shape)
    for layer in range(depth, 0, -1):
        total = total + (lengths[layer - 1] * slopes[layer - 1] * after).square()
        after = after * (skip + slopes[layer - 1] * norms[f"w{layer}"])
    return total


def _swiglu_check(options: Options) -> None:
    _check_hidden("swiglu", options)


def _swiglu_weights(options: Options, dim: int) -> Shapes:
    hidden = options["hidden"] or 4 * dim
    return {"gate": (dim, hidden), "up": (dim, hidden), "down": (hidden, dim)}


def _swiglu_apply(options: Options, x: Tensor, use: Use) -> Tensor:
    """(silu(x W_gate) * (x W_up)) W_down."""
    gate = activate("silu", use.linear("gate", x))
    return use.linear("down", gate * use.linear("up", x))


def _swiglu_curvature(options: Options, norms: Mapping[str, Tensor]) -> Tensor:
    """Product rule: each weight's Jacobian is the product of the two other norms (and silu's slope for the gate)."""
    gate, up, down = norms["gate"].square(), norms["up"].square(), norms["down"].square()
    return gate * up + gate * down + 1.0999**2 * up * down


FAMILIES: dict[str, Family] = {
    "linear": Family({}, _check_nothing, _linear_weights, _linear_apply, _linear_curvature),
    "mlp": Family(
        {"depth": 2, "hidden": None, "activation": "silu", "residual": False},
        _mlp_check,
        _mlp_weights,
        _mlp_apply,
        _mlp_curvature,
        short="depth",
    ),
    "swiglu": Family({"hidden": None}, _swiglu_check, _swiglu_weights, _swiglu_apply, _swiglu_curvature, short="hidden"),
}
