"""Mistakes that come from ``--set`` are shown there: the file that they would point into is sound without it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from titans_graph.cli.options import settings
from titans_graph.errors import Diagnostic, shortened


def rendered(diagnostics: Iterable[Diagnostic], spec: str, pairs: list[str]) -> str:
    """Diagnostics of ``spec`` as text; those that go away without ``pairs`` name the pairs that bring them."""
    found = list(diagnostics)
    sources = _sources(found, spec, settings(pairs)) if pairs else {}
    written = {pair.partition("=")[0]: pair for pair in pairs}
    return "\n".join(_at(d, [written[key] for key in sources[d]]) if sources.get(d) else d.render() for d in found)


def _sources(found: list[Diagnostic], spec: str, values: dict[str, Any]) -> dict[Diagnostic, list[str]]:
    """For each diagnostic that is not the spec's own, the keys without any one of which it would not be there."""
    from titans_graph import runtime

    own = set(runtime.check(spec))
    foreign = [d for d in found if d not in own]
    if not foreign:
        return {}
    without = {key: set(runtime.check(spec, **{k: v for k, v in values.items() if k != key})) for key in values}
    return {d: [key for key in values if d not in without[key]] or list(values) for d in foreign}


def _at(diagnostic: Diagnostic, pairs: list[str]) -> str:
    """A diagnostic as text, headed by the settings that bring it; its place in the file follows."""
    first, *rest = diagnostic.render().split("\n")
    heading = f"--set {shortened(' '.join(pairs), 200)}: {diagnostic.severity}: {shortened(diagnostic.message)}"
    place = first.removesuffix(f": {diagnostic.severity}: {shortened(diagnostic.message)}")
    known = diagnostic.span is not None or bool(diagnostic.node)
    return "\n".join([heading, *([f"  at {place}"] if known else []), *rest])
