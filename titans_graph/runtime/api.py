"""From a spec file, a declared graph or a text to a model."""

from __future__ import annotations

import logging
from collections.abc import Collection
from os import PathLike
from typing import Any

from titans_graph.errors import Diagnostic, SpecError, in_order, raise_errors
from titans_graph.ir import Graph
from titans_graph.ir.validate import capped, inspect, prune
from titans_graph.lowering import Lower
from titans_graph.passes import CHECKS, PLANS, Compilation, run
from titans_graph.runtime.model import Model
from titans_graph.spec import Declared, read

PASSES = (*CHECKS, *PLANS, Lower())

log = logging.getLogger("titans_graph")


def declare(source: str | PathLike[str] | Graph, **parameters: Any) -> Declared:
    """A spec read and checked for names, ports and parameters; a graph built in Python only checked."""
    if isinstance(source, Graph):
        found = inspect(source)
        broken = frozenset(found.broken)
        return Declared(prune(source, broken), capped(found.diagnostics), broken=broken)
    return read(source, **parameters)


def compilation(
    source: str | PathLike[str] | Graph,
    *,
    after: str | None = None,
    disable: Collection[str] = (),
    **parameters: Any,
) -> Compilation:
    """Run the compiler: all passes, or up to ``after``; optional passes named in ``disable`` are left out.

    Raises SpecError with every mistake found.
    """
    declared = declare(source, **parameters)
    if declared.graph is None:
        raise SpecError(declared.diagnostics)
    start = _start(declared, declared.graph)
    if not start.sound:
        raise SpecError(_checked(start))
    done = run(start, PASSES, disable=disable, after=after)
    raise_errors(capped([*done.diagnostics]))
    return done


def _start(declared: Declared, graph: Graph) -> Compilation:
    return Compilation(graph, tuple(declared.diagnostics), declared.broken)


def _checked(start: Compilation) -> list[Diagnostic]:
    """What the checking passes find in addition, on the parts of a graph that are well formed."""
    return capped([*run(start, CHECKS).diagnostics])


def check(source: str | PathLike[str] | Graph, **parameters: Any) -> list[Diagnostic]:
    """All mistakes and warnings of a spec or graph, sorted by place; empty when it is sound."""
    declared = declare(source, **parameters)
    if declared.graph is None:
        return in_order(declared.diagnostics)
    return _checked(_start(declared, declared.graph))


def graph(source: str | PathLike[str], **parameters: Any) -> Graph:
    """The declared graph of a spec; raises SpecError when the spec is not sound."""
    declared = declare(source, **parameters)
    found = check_declared(declared)
    raise_errors(found)
    assert declared.graph is not None
    return declared.graph


def check_declared(declared: Declared) -> list[Diagnostic]:
    """Diagnostics of something already read."""
    if declared.graph is None:
        return in_order(declared.diagnostics)
    return _checked(_start(declared, declared.graph))


def build(source: Graph, *, disable: Collection[str] = ()) -> Model:
    """A model from a declared graph; raises SpecError with every mistake, tells warnings to the log ``titans_graph``."""
    return _told(compilation(source, disable=disable))


def load(source: str | PathLike[str], *, disable: Collection[str] = (), **parameters: Any) -> Model:
    """A model from a spec: a path, or the bare name of a shipped one (``mac``, ``blocks/mag``).

    parameters override the spec's own; disable names optional passes to leave out. Raises SpecError with every mistake, tells
    warnings to the log ``titans_graph``.
    """
    return _told(compilation(source, disable=disable, **parameters))


def _told(done: Compilation) -> Model:
    """The model, its warnings told."""
    for warning in capped([*done.diagnostics]):
        log.warning(warning.render())
    return Model(done)
