"""Parameters of a spec: their values, what mentions them, and trees turned to plain values."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, cast

from titans_graph.errors import (
    Diagnostic,
    LimitExceeded,
    Span,
    UnknownName,
    UnknownParameter,
    WrongType,
)
from titans_graph.ir.hints import ENOUGH, EnoughMistakes, hint, meant
from titans_graph.ir.limits import MAX_ELEMENTS, PARAMETER_NAME, RESERVED
from titans_graph.ir.values import UNRESOLVED, plain, plain_problem, size
from titans_graph.spec.formula import FormulaError, evaluate, is_formula, literal, names
from titans_graph.spec.tree import Items, Scalar, Table, Tree

_BUDGET = 10 * MAX_ELEMENTS


class TooMuch(EnoughMistakes):
    """Parameters or blocks expand to more than a spec may hold; reported before it is raised."""


class Scope:
    """Reports mistakes and evaluates trees, within a budget shared by the whole spec."""

    def __init__(self) -> None:
        self.problems: dict[Diagnostic, None] = {}
        self.meant: set[str] = set()
        """Parameters that a misspelt ``$name`` probably means; they count as used."""
        self.spent = 0

    def report(self, kind: type[Diagnostic], message: str, span: Span | None, node: str = "", help: str = "") -> None:
        """Collect one mistake (once, even when a block that holds it is used many times)."""
        self.problems[kind(message, span, node, help)] = None
        if len(self.problems) > ENOUGH:
            raise EnoughMistakes

    def charge(self, amount: int, span: Span | None) -> None:
        """Count values against the budget; TooMuch where it is spent."""
        self.spent += amount
        if self.spent > _BUDGET:
            self.report(LimitExceeded, f"parameters expand to more than {_BUDGET} values", span)
            raise TooMuch

    def value(self, tree: Tree, scope: Mapping[str, Any]) -> Any:
        """A tree as plain value, formulas evaluated; UNRESOLVED (somewhere in it) where a mistake was reported."""
        self.charge(1, tree.span)
        if isinstance(tree, Table):
            return {key: self.value(entry.value, scope) for key, entry in tree.entries.items()}
        if isinstance(tree, Items):
            return [self.value(item, scope) for item in tree.items]
        return self.leaf(tree, scope)

    def leaf(self, tree: Scalar, scope: Mapping[str, Any]) -> Any:
        """A scalar's value; strings with a dollar sign are formulas."""
        if not isinstance(tree.value, str):
            return tree.value
        return self.formula(tree.value, tree.span, scope)

    def formula(self, text: str, place: Span | None, scope: Mapping[str, Any], node: str = "") -> Any:
        """The value of a text that may be a formula; UNRESOLVED where its mistake was reported."""
        if not is_formula(text):
            return literal(text)
        try:
            result = evaluate(text, scope)
        except FormulaError as error:
            self.report(error.kind, error.message, place, node, error.help)
            self.meant.add(meant(error.help) if error.kind is UnknownName else "")
            return UNRESOLVED
        if isinstance(result, dict | list):
            self.charge(size(result), place)
        return result

    def parameters(self, table: Tree | None, outer: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The values of one ``parameters:`` mapping: what is ``given``, else the default, which may use ``outer`` and
        the parameters above it."""
        own: dict[str, Any] = {}
        if not isinstance(table, Table):
            if table is not None and not (isinstance(table, Scalar) and table.value is None):
                self.report(WrongType, "parameters is a mapping", table.span, help="write {dim: 128, layers: 2}")
            return own
        for name, entry in table.entries.items():
            if not PARAMETER_NAME.fullmatch(name) or name in RESERVED:
                help = "letters, digits and '_', a letter first; not use, in, repeat"
                self.report(WrongType, f"{name!r} is no name for a parameter", entry.key.span, help=help)
            value = self.value(entry.value, below(own, outer))
            problem = plain_problem(value)
            if problem:
                self.report(LimitExceeded, f"parameter {name!r}: {problem}", entry.value.span)
                value = UNRESOLVED
            own[name] = given.get(name, value)
        return own

    def overrides(self, table: Tree | None, given: Mapping[str, Any], file: str) -> dict[str, Any]:
        """Keyword overrides that fit the spec's parameters; the others are reported."""
        known = table.entries if isinstance(table, Table) else {}
        accepted = {}
        for name, raw in given.items():
            if name not in known:
                help = hint(name, known, "" if known else "it declares no parameters")
                self.report(UnknownParameter, f"spec {file} has no parameter {name!r}", None, help=help)
                continue
            default = known[name].value
            problem = plain_problem(raw, tuples=True)
            value = UNRESOLVED if problem else plain(raw)
            if not problem and isinstance(default, Scalar) and _kind(default.value) not in ("", _kind(value)):
                problem = f"must be {_kind(default.value)} like its default {default.text}, got {value!r:.60}"
            if problem:
                self.report(WrongType, f"override of parameter {name!r}: {problem}", known[name].key.span)
                value = UNRESOLVED
            accepted[name] = value
        return accepted


def below(own: dict[str, Any], outer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Names looked up in ``own`` first, without copying either."""
    return ChainMap(own, cast(MutableMapping[str, Any], outer))


def _kind(value: Any) -> str:
    """The kind of a scalar, for comparison with an override; empty where anything goes (null, formulas)."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "a word" if isinstance(value, str) and not is_formula(value) else ""


def mentioned(trees: Iterable[Tree | None]) -> set[str]:
    """The parameters that formulas in these trees mention."""
    found: set[str] = set()
    stack = [tree for tree in trees if tree is not None]
    while stack:
        tree = stack.pop()
        if isinstance(tree, Table):
            stack.extend(entry.value for entry in tree.entries.values())
        elif isinstance(tree, Items):
            stack.extend(tree.items)
        elif isinstance(tree.value, str) and is_formula(tree.value):
            found.update(names(tree.value))
    return found


def axis_names(tree: Tree | None) -> set[str]:
    """Bare words on the axes of an ``input:`` mapping."""
    if not isinstance(tree, Table):
        return set()
    shapes = [e.value for e in tree.entries.values() if isinstance(e.value, Items)]
    return {axis.text for shape in shapes for axis in shape.items if isinstance(axis, Scalar)}
