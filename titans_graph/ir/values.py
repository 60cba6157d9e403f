"""Which values a parameter may have: those that a spec file can hold, so that every graph prints and reads back."""

from __future__ import annotations

import math
from typing import Any

from titans_graph.ir.limits import MAX_DEPTH, MAX_ELEMENTS, MAX_INTEGER


class Unresolved:
    """Stands for a value whose mistake is reported already; checks pass over it."""

    def __repr__(self) -> str:
        return "<unresolved>"


UNRESOLVED = Unresolved()


def number_problem(value: int | float) -> str:
    """What is wrong with a number, or an empty string: too large for 64 bits, or not finite."""
    if isinstance(value, int):
        return "" if -MAX_INTEGER <= value <= MAX_INTEGER else "a whole number must fit in 64 bits"
    return "" if math.isfinite(value) else f"a number must be finite, got {value}"


def plain_problem(value: Any, tuples: bool = False) -> str:
    """What keeps a value from being written to a spec, or an empty string. Bounded in time, free of recursion.

    ``tuples``: those of Python are welcome too, because :func:`plain` will make them lists; so is what describes itself.
    """
    stack: list[tuple[Any, int]] = [(value, 0)]
    seen = 0
    while stack:
        item, depth = stack.pop()
        item = described(item) if tuples else item
        seen += 1
        if seen > MAX_ELEMENTS:
            return f"a value holds more than {MAX_ELEMENTS} elements"
        if depth > MAX_DEPTH:
            return f"a value is nested deeper than {MAX_DEPTH}"
        if isinstance(item, dict):
            odd = next((k for k in item if not isinstance(k, str)), None)
            if odd is not None:
                return f"a key must be a word, got {odd!r:.60}"
            stack.extend((v, depth + 1) for v in item.values())
        elif isinstance(item, list) or (tuples and isinstance(item, tuple)):
            stack.extend((v, depth + 1) for v in item)
        else:
            problem = _leaf_problem(item)
            if problem:
                return problem
    return ""


def _leaf_problem(item: Any) -> str:
    if item is None or item is UNRESOLVED or isinstance(item, str | bool):
        return ""
    if isinstance(item, int | float):
        return number_problem(item)
    return f"a value must be a number, a word, true, false, null, a list or a mapping, got {type(item).__name__}"


def described(value: Any) -> Any:
    """The plain data of an object that gives it by a method ``description()``, such as a memory network."""
    describe = None if isinstance(value, type) else getattr(value, "description", None)
    return describe() if callable(describe) else value


def plain(value: Any) -> Any:
    """The same value with tuples turned into lists and mappings into dicts, as a spec would give it (from Python)."""
    value = described(value)
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


def size(value: Any) -> int:
    """How many elements a plain value holds, itself included."""
    stack, count = [value], 0
    while stack:
        item = stack.pop()
        count += 1
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return count


def has_unresolved(value: Any) -> bool:
    """Whether a value is, or holds, one whose mistake is reported already; so does one too large to look through."""
    stack, seen = [value], 0
    while stack:
        item = stack.pop()
        seen += 1
        if item is UNRESOLVED or seen > MAX_ELEMENTS:
            return True
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return False
