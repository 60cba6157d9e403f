"""Parameters of components: what each means, which values are legal, and every mistake in a set of them at once.

Stands after :mod:`titans_graph.shapes`; :mod:`titans_graph.registry` hands its names on.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from titans_graph.errors import Diagnostic, ShapeMismatch, TitansGraphError, UnknownParameter, WrongType, suggest


class SiteError(TitansGraphError):
    """A component refuses its site. ``key`` names the port or parameter at fault, so that the error gets its place."""

    def __init__(self, message: str, *, kind: type[Diagnostic] = ShapeMismatch, key: str = "", help: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind
        self.key = key
        self.help = help


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
        return None, [*problems, *_others(parameters, values, accepted)]
    try:
        return parameters(**accepted), []
    except SiteError as error:
        return None, [ParameterProblem(error.kind, error.key, error.message, error.help)]


def stand_ins(parameters: type, values: Mapping[str, Any]) -> list[Any]:
    """Two instances for values with mistakes, which differ in what stands in their place; none where that cannot be made.

    What is said of both does not hang on a mistake that is reported already, and may be said beside it.
    """
    wrong = {problem.key.split("/")[0] for problem in parse_parameters(parameters, values)[1]}
    hints = parameter_types(parameters)
    good = {key: _coerce(hints[key], value) for key, value in values.items() if key in hints and key not in wrong}
    try:
        return [parameters(**good, **_filled(parameters, good, wrong, i)) for i in (0, -1)]
    except (SiteError, LookupError):
        return []


def _others(parameters: type, values: Mapping[str, Any], accepted: Mapping[str, Any]) -> list[ParameterProblem]:
    """What a dataclass refuses of its good values, whatever stands in place of the bad ones."""
    found = []
    for i in (0, -1):
        try:
            parameters(**accepted, **_filled(parameters, accepted, set(values) - set(accepted), i))
        except SiteError as error:
            found.append(ParameterProblem(error.kind, error.key, error.message, error.help))
        except LookupError:
            return []
    same = len(found) == 2 and found[0] == found[1] and found[0].key.split("/")[0] in accepted
    return found[:1] if same else []


def _filled(parameters: type, good: Mapping[str, Any], wrong: Collection[str], i: int) -> dict[str, Any]:
    """The first or last (``i``) legal value of each field that is wrong, or required and missing; LookupError without one."""
    hints = parameter_types(parameters)
    open_fields = [
        spec
        for spec in dataclasses.fields(parameters)
        if spec.name not in good and (spec.name in wrong or spec.default is spec.default_factory is dataclasses.MISSING)
    ]
    return {spec.name: _legal(spec, hints[spec.name])[i] for spec in open_fields}


def _legal(spec: dataclasses.Field[Any], hint: Any) -> list[Any]:
    """Some legal values of a field, the default first."""
    default = () if spec.default is dataclasses.MISSING else (spec.default,)
    some = (*default, *(spec.metadata.get("choices") or ()), spec.metadata.get("minimum"), True, False, 1, 2)
    legal = [_coerce(hint, value) for value in some if _check_value(spec, hint, value) is None]
    return list({repr(value): value for value in legal}.values())


def _check_value(spec: dataclasses.Field[Any], hint: Any, value: Any) -> ParameterProblem | None:
    name, meta = spec.name, spec.metadata
    if not _fits(hint, value):
        message = f"parameter {name!r} must be {_type_name(hint)}, got {_shown(value)}"
        return ParameterProblem(WrongType, name, message, _mend(spec, _type_name(hint)))
    choices = meta.get("choices") or ()
    if choices and value not in choices:
        message = f"parameter {name!r} must be one of {', '.join(map(repr, choices))}, got {_shown(value)}"
        return ParameterProblem(WrongType, name, message, suggest(str(value), [str(c) for c in choices]))
    low, high = meta.get("minimum"), meta.get("maximum")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and ((low is not None and value < low) or (high is not None and value > high)):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        return ParameterProblem(WrongType, name, f"parameter {name!r} must be {bounds}, got {value}", _mend(spec, bounds))
    return None


def _mend(spec: dataclasses.Field[Any], wanted: str) -> str:
    """What to write, and what it means."""
    default = "" if spec.default is dataclasses.MISSING else f" (by default {_word(spec.default)})"
    meaning = spec.metadata.get("doc", "")
    return f"write {spec.name}: {wanted}{default}" + (f"; it is {meaning}" if meaning else "")


def _word(value: Any) -> str:
    """A value as a spec writes it."""
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


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
