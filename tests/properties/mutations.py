"""Injecting one deliberate defect at a time: a small edit of the source of one or more functions, undone afterwards.

The edited source is compiled and its code put into the function that is already there, so that every module which imported
the function by name gets the defect too, and nothing else changes. An edit whose text is no longer in the source is an
error, and so is a defect none of whose edits was reached.
"""

from __future__ import annotations
import __future__

import ast
import contextlib
import functools
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

HOOK = "_an_edit_was_reached"


class MutationError(Exception):
    """The machinery itself failed: an edit that fits no source, a defect that was never reached."""


@dataclass(frozen=True)
class Edit:
    """``place`` is ``module:function`` under ``titans_graph``; ``old``, which stands there once, becomes ``new``."""

    place: str
    old: str
    new: str


@dataclass(frozen=True)
class Defect:
    """One mistake that somebody could make: its name, what is then wrong (after "then"), and how it is put in."""

    name: str
    wrong: str
    edits: tuple[Edit, ...]


def defect(name: str, wrong: str, *edits: tuple[str, str, str]) -> Defect:
    """A defect; an edit is (place, old text, new text)."""
    return Defect(name, wrong, tuple(Edit(*edit) for edit in edits))


@contextlib.contextmanager
def injected(defect: Defect) -> Iterator[set[str]]:
    """The product with a defect in it. Gives the set of places reached so far; it fills while code runs."""
    reached = set[str]()
    with contextlib.ExitStack() as stack:
        for place in dict.fromkeys(edit.place for edit in defect.edits):
            stack.enter_context(_edited(place, [e for e in defect.edits if e.place == place], reached))
        yield reached


def caught(defect: Defect, law: Callable[[], None], places: set[str] | None = None) -> bool | None:
    """Whether a law fails under a defect; None where the law does not even reach it. ``places`` gets what it reached.

    Whatever the product raises counts, as it would in a test; a mistake in an edit's own text does not.
    """
    with injected(defect) as reached:
        try:
            law()
        except (NameError, SyntaxError, MutationError):
            raise
        except Exception:
            if not reached:
                raise
            return True
        finally:
            (set() if places is None else places).update(reached)
        return False if reached else None


@contextlib.contextmanager
def _edited(place: str, edits: list[Edit], reached: set[str]) -> Iterator[None]:
    function = find(place)
    original, space = function.__code__, function.__globals__
    code = _compiled(place, edits, function)
    space[HOOK] = reached.add
    function.__code__ = code
    try:
        yield
    finally:
        function.__code__ = original
        space.pop(HOOK, None)


def find(place: str) -> FunctionType:
    """The function at a place, taken out of whatever wraps it."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(f"titans_graph.{module}")
    for name in path.split("."):
        owner = inspect.getattr_static(owner, name)
    found = _unwrapped(owner)
    if not isinstance(found, FunctionType):
        raise MutationError(f"{place} is no function")
    return found


def _unwrapped(found: Any) -> Any:
    if isinstance(found, functools.cached_property):
        return found.func
    for inner in ("fget", "_init_fn", "__func__", "__wrapped__"):  # property, operator, class or static method, decorator
        if getattr(found, inner, None) is not None:
            return _unwrapped(getattr(found, inner))
    return found


def _compiled(place: str, edits: list[Edit], function: FunctionType) -> CodeType:
    """The function's code with the edits, telling the hook when it runs."""
    source = textwrap.dedent(inspect.getsource(function))
    for edit in edits:
        count = source.count(edit.old)
        if count != 1:
            raise MutationError(f"{place} has {edit.old!r} {count} times, not once: bring the defect up to date")
        source = source.replace(edit.old, edit.new)
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    definition.body.insert(0, ast.parse(f"{HOOK}({place!r})").body[0])
    # A function around it holds what the original is closed over, such as the class that super() needs.
    factory = ast.parse(f"def factory({', '.join(function.__code__.co_freevars)}): pass").body[0]
    assert isinstance(factory, ast.FunctionDef)
    factory.body = [definition]
    tree = ast.fix_missing_locations(ast.Module([factory], []))
    flags = __future__.annotations.compiler_flag
    space: dict[str, Any] = {}
    exec(compile(tree, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True), {}, space)
    outer: CodeType = space["factory"].__code__
    (code,) = (c for c in outer.co_consts if isinstance(c, CodeType) and c.co_name == function.__name__)
    if code.co_freevars != function.__code__.co_freevars:
        raise MutationError(f"{place}: the edit changes what the function is closed over")
    return code
