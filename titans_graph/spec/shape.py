"""Types of inputs from lists of axes, for files and for the builder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from titans_graph.errors import Span, UnknownName, WrongType
from titans_graph.ir.hints import hint, meant
from titans_graph.ir.limits import PARAMETER_NAME
from titans_graph.ir.values import UNRESOLVED
from titans_graph.shapes import Value, fixed, ids, stream
from titans_graph.spec.formula import is_formula
from titans_graph.spec.scope import Scope

Axis = tuple[Any, Span | None]
"""One axis as written, and its place."""
_HELP = "write [B, T] for tokens, [B, T, dim] for features, [n, dim] for n elements beside time"


def shape(scope: Scope, name: str, axes: Sequence[Axis], place: Span | None, values: Mapping[str, Any]) -> Value | None:
    """The type of the input ``name``; None where its mistake was reported. ``values`` are the parameters."""
    written = [axis if isinstance(axis, str) else None for axis, _ in axes]
    timed = written[:2] == ["B", "T"] and len(axes) in (2, 3)
    if not timed and (len(axes) != 2 or {"B", "T"} & set(written)):
        scope.report(WrongType, f"input {name!r} needs a list of axes", place, name, _HELP)
        return None
    sizes = [_size(scope, name, axis, values) for axis in (axes[2:] if timed else axes)]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return None
    if not timed:
        return fixed(known[0], known[1], name)
    return stream(known[0], name) if known else ids(name)


def _size(scope: Scope, name: str, axis: Axis, values: Mapping[str, Any]) -> int | None:
    """A number, ``$name``, a formula or the bare name of a parameter."""
    value, place = axis
    if isinstance(value, str):
        if not is_formula(value) and value not in values and PARAMETER_NAME.fullmatch(value):
            help = hint(value, values, "" if values else "write a number, or declare it under parameters")
            scope.report(UnknownName, f"unknown parameter {value!r}", place, name, help)
            scope.meant.add(meant(help))
            return None
        value = values.get(value, value) if not is_formula(value) else scope.formula(value, place, values, name)
    if value is UNRESOLVED:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        scope.report(WrongType, f"an axis is a whole number, got {value!r:.60}", place, name, _HELP)
        return None
    return value
