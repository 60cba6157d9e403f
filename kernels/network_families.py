"""Short names for memory networks: each family expands into a graph of ordinary nodes, and is nothing else.

Stands between :mod:`~titans_graph.kernels.network_ops` and :mod:`~titans_graph.kernels.networks`; imports no torch. Another
family is one :class:`Family`, made known with :func:`register`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from titans_graph.kernels.network_ops import NetworkError, Options, size_of

Description = dict[str, Any]

ACTIVATIONS = ("silu", "gelu", "relu2")
DEEPEST = 64
"""The most layers of an ``mlp``."""


@dataclass(frozen=True)
class Family:
    """A macro: ``expand`` turns complete options into the description of a graph, the same for every dim.

    ``defaults`` names every option with its default; ``short`` is the option meant by a bare number (``{"mlp": 3}``).
    ``check`` raises :class:`NetworkError` for options out of range; it may write them in a canonical form. ``quiet``
    options stand in the canonical text only where they are not at their default.
    """

    defaults: Options
    expand: Callable[[Options], Description]
    check: Callable[[dict[str, Any]], None] = lambda options: None
    short: str = ""
    quiet: tuple[str, ...] = ()


def _require(condition: bool, message: str, option: str) -> None:
    if not condition:
        raise NetworkError(message, option)


def _check_size(family: str, options: dict[str, Any], name: str, *, optional: bool) -> None:
    if optional and options[name] is None:
        return
    try:
        options[name] = size_of(options[name])
    except ValueError as problem:
        null = " or null" if optional else ""
        raise NetworkError(f"{family}: {name} must be {problem}{null}, not {options[name]!r:.60}", name) from None


def _linear(options: Options) -> Description:
    """x w."""
    return {"nodes": {"w": {"use": "fast.linear"}}}


def _mlp_check(options: dict[str, Any]) -> None:
    depth, kind = options["depth"], options["activation"]
    whole = isinstance(depth, int) and not isinstance(depth, bool) and 1 <= depth <= DEEPEST
    _require(whole, f"mlp: depth must be a whole number from 1 to {DEEPEST}, not {depth!r:.60}", "depth")
    _check_size("mlp", options, "hidden", optional=True)
    known = isinstance(kind, str) and kind in ACTIVATIONS
    _require(known, f"mlp: activation must be one of {', '.join(ACTIVATIONS)}, not {kind!r:.60}", "activation")
    for name in ("residual", *_MLP_QUIET):
        value = options[name]
        _require(isinstance(value, bool), f"mlp: {name} must be true or false, not {value!r:.60}", name)


def _mlp(options: Options) -> Description:
    """h_l = [h_{l-1} +] activation(norm(h_{l-1}) w_l + b_l), no activation after the last layer; then the output's norm.

    The residual sum stands wherever sizes agree. Norms are ``norm.rms``: they keep the mean, and need no weights.
    """
    depth, kind = options["depth"], options["activation"]
    nodes: Description = {}
    before = "x"
    for layer in range(1, depth + 1):
        size = None if layer == depth else options["hidden"] or "4*dim"
        last = before
        for wanted, name, node in (
            (options["norm"], f"n{layer}", {"use": "norm.rms"}),
            (True, f"w{layer}", {"use": "fast.linear", "size": size}),
            (options["bias"], f"b{layer}", {"use": "fast.bias"}),
            (layer < depth, f"a{layer}", {"use": kind}),
        ):
            if wanted:
                nodes[name] = {**node, "in": last}
                last = name
        if options["residual"]:
            nodes[f"h{layer}"] = {"use": "residual", "in": [before, last]}
            last = f"h{layer}"
        before = last
    if options["output_norm"]:
        nodes["y"] = {"use": "norm.rms", "in": before}
    return {"nodes": nodes}


def _swiglu_check(options: dict[str, Any]) -> None:
    _check_size("swiglu", options, "hidden", optional=True)


def _swiglu(options: Options) -> Description:
    """(silu(x gate) * (x up)) down."""
    hidden = options["hidden"] or "4*dim"
    return {
        "nodes": {
            "gate": {"use": "fast.linear", "in": "x", "size": hidden},
            "up": {"use": "fast.linear", "in": "x", "size": hidden},
            "open": {"use": "silu", "in": "gate"},
            "gated": {"use": "product", "in": ["open", "up"]},
            "down": {"use": "fast.linear", "in": "gated"},
        }
    }


def _lowrank_check(options: dict[str, Any]) -> None:
    _check_size("lowrank", options, "rank", optional=False)


def _lowrank(options: Options) -> Description:
    """(x down) up: a matrix of the given rank."""
    return {"nodes": {"down": {"use": "fast.linear", "size": options["rank"]}, "up": {"use": "fast.linear"}}}


_MLP_QUIET = ("norm", "output_norm", "bias")

FAMILIES: dict[str, Family] = {
    "linear": Family({}, _linear),
    "mlp": Family(
        {
            "depth": 2,
            "hidden": None,
            "activation": "silu",
            "residual": False,
            "norm": False,
            "output_norm": False,
            "bias": False,
        },
        _mlp,
        _mlp_check,
        short="depth",
        quiet=_MLP_QUIET,
    ),
    "swiglu": Family({"hidden": None}, _swiglu, _swiglu_check, short="hidden"),
    "lowrank": Family({"rank": "dim/4"}, _lowrank, _lowrank_check, short="rank"),
}
OWN = frozenset(FAMILIES)
"""Those that every process knows, and whose short form is therefore a canonical text."""


def register(name: str, family: Family) -> None:
    """Make ``family`` known as ``name``; :class:`NetworkError` where the name is taken by another."""
    if FAMILIES.get(name, family) is not family:
        raise NetworkError(f"memory network {name!r} is already registered")
    FAMILIES[name] = family
