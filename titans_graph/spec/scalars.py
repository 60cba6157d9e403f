"""Scalars of the spec language: YAML 1.2's core schema instead of PyYAML's YAML 1.1.

``1e-3`` is a number, ``on``, ``no`` and ``12:30`` are words. Numbers with leading zeros (``08``, ``010``) stay words:
the two YAML versions read them differently, and a wrong type is reported where a silent octal is not.
"""

from __future__ import annotations

import re
from typing import Any

from titans_graph.ir.values import number_problem

_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)", re.ASCII)
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
_ODD_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LONGEST = 40


class BadScalar(Exception):
    """A scalar that looks like a number and cannot be one; the argument says why."""


def resolve(text: str) -> Any:
    """The value of a plain (unquoted) scalar; BadScalar for numbers that are too long or not finite."""
    if text in _WORDS:
        return _WORDS[text]
    if _ODD_FLOAT.fullmatch(text):
        raise BadScalar("a number must be finite")
    whole, based = _INT.fullmatch(text), _BASED.fullmatch(text)
    if whole or based or _FLOAT.fullmatch(text):
        return _number(text, 10 if whole else 0 if based else None)
    return text


def _number(text: str, base: int | None) -> int | float:
    if len(text) > _LONGEST:
        raise BadScalar(f"a number has at most {_LONGEST} characters")
    value = float(text) if base is None else int(text, base)
    problem = number_problem(value)
    if problem:
        raise BadScalar(problem)
    return value
