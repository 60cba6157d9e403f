"""A spec file to a declared graph: the whole file is read, and everything wrong with it is reported at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from titans_graph.errors import (
    Diagnostic,
    LimitExceeded,
    MissingKey,
    Span,
    UnsupportedVersion,
    WrongType,
)
from titans_graph.ir.hints import EnoughMistakes
from titans_graph.ir.limits import MAIN, MAX_BYTES
from titans_graph.ir.model import Graph
from titans_graph.ir.validate import capped, inspect, prune
from titans_graph.spec import blocks
from titans_graph.spec.scope import Scope, mentioned
from titans_graph.spec.tree import Scalar, Source, Table, Tree, compose

VERSION = 1
KEYS = ("titans_graph", "name", *blocks.KEYS, "blocks")
"""Keys of a spec."""
_FIRST_LINE = f"begin the file with titans_graph: {VERSION}"


@dataclass(frozen=True)
class Declared:
    """What a spec declares. ``diagnostics`` is empty when it is sound.

    With mistakes, ``graph`` is a best effort without what cannot be followed (None where nothing can), and ``broken``
    names the (block, node) pairs that have a mistake; node ``""`` is the block's own frame. ``parameters`` are the spec
    parameters with their values.
    """

    graph: Graph | None
    diagnostics: list[Diagnostic] = field(default_factory=list)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    broken: frozenset[tuple[str, str]] = frozenset()


def declare(text: str, file: str, stem: str, overrides: Mapping[str, Any]) -> Declared:
    """The graph of a YAML text; ``file`` names it in messages, ``stem`` is the graph's name where it has none."""
    if len(text) > MAX_BYTES:
        return Declared(None, [LimitExceeded(f"the file is larger than {MAX_BYTES} bytes", Span(file, 1, 1))])
    tree, problems = compose(text.removeprefix("\ufeff"), file)
    if tree is None:
        start = Source(text[:200], file).span(0, 0)
        return Declared(None, capped(problems) or [MissingKey("the file is empty", start, help=_FIRST_LINE)])
    if not isinstance(tree, Table):
        problem = WrongType("a spec is a mapping", tree.span, help=_FIRST_LINE)
        return Declared(None, capped([*problems, problem]))
    scope = Scope()
    scope.problems.update(dict.fromkeys(problems))
    if not _version(scope, tree):
        return Declared(None, capped(list(scope.problems)))
    return _declared(scope, tree, file, stem, overrides)


def _version(scope: Scope, tree: Table) -> bool:
    """Whether this package reads the file: a missing version is reported and taken for the present one."""
    version = tree.get("titans_graph")
    if version is None:
        start = next((e.key.span for e in tree.entries.values()), tree.span)
        scope.report(UnsupportedVersion, "the version of the language is missing", start, help=_FIRST_LINE)
    elif not isinstance(version, Scalar) or isinstance(version.value, bool) or version.value != VERSION:
        got = f" {version.text!r:.60}" if isinstance(version, Scalar) else ""
        message = f"this titans_graph reads version {VERSION} of the language, not{got or ' a mapping'}"
        scope.report(UnsupportedVersion, message, version.span, help=_FIRST_LINE)
        return False
    return True


def _declared(scope: Scope, tree: Table, file: str, stem: str, overrides: Mapping[str, Any]) -> Declared:
    values: dict[str, Any] = {}
    try:
        blocks.check_keys(scope, tree, KEYS)
        own = tree.get("parameters")
        given = scope.overrides(own, overrides, file)
        values = scope.parameters(own, {}, given)
        made = blocks.Blocks(scope, values, _templates(scope, tree.get("blocks")))
        main = made.block(MAIN, MAIN, tree, tree.span, values)
        made.finish()
        _check_parameters(scope, tree, made, given)
    except EnoughMistakes:
        return Declared(None, capped(list(scope.problems)), values)
    graph = Graph(_name(scope, tree.get("name"), stem), main, made.made)
    found = inspect(graph, partial=frozenset(made.partial), silent=frozenset(made.silent))
    broken = frozenset(found.broken)
    diagnostics = capped([*scope.problems, *found.diagnostics])
    return Declared(prune(graph, broken) if diagnostics else graph, diagnostics, values, broken)


def _templates(scope: Scope, tree: Tree | None) -> dict[str, blocks.Template]:
    """The blocks as written; mistakes in their frames are reported."""
    if not isinstance(tree, Table):
        if tree is not None and not (isinstance(tree, Scalar) and tree.value is None):
            help = "write blocks: {mac: {input: ..., nodes: ...}}"
            scope.report(WrongType, "blocks is a mapping", tree.span, help=help)
        return {}
    for name, entry in tree.entries.items():
        if not isinstance(entry.value, Table):
            scope.report(WrongType, f"block {name!r} is not a mapping", entry.value.span)
            continue
        blocks.check_keys(scope, entry.value, blocks.KEYS)
    found = {name: blocks.Template.of(name, entry) for name, entry in tree.entries.items()}
    for template in found.values():
        template.check_names(scope)
    return found


def _check_parameters(scope: Scope, tree: Table, made: blocks.Blocks, given: Mapping[str, Any]) -> None:
    """Report parameters nobody mentions, of the spec and of each block, and overrides without effect; a block's own hide
    those of the spec."""
    elsewhere: set[str] = set()
    for template in made.templates.values():
        if template.table is None:
            continue
        blocks.check_parameters(scope, template.table, template.own, set())
        inside = blocks.mentions(template.table)
        defaults = mentioned([template.table.get("parameters")])
        elsewhere |= (inside - set(template.own)) | defaults
    own = tree.get("parameters")
    if isinstance(own, Table):
        blocks.check_parameters(scope, tree, tuple(own.entries), elsewhere)
        if not scope.problems:  # Else a name may be missing because it is misspelt, or a value because it was refused.
            blocks.check_overrides(scope, tree, own, given, elsewhere)


def _name(scope: Scope, tree: Tree | None, stem: str) -> str:
    """The graph's name: as declared, else the file's stem."""
    if tree is None:
        return stem
    if isinstance(tree, Scalar) and isinstance(tree.value, str) and tree.value:
        return tree.value
    scope.report(WrongType, "name is a word", tree.span, help="put it in quotes")
    return stem
