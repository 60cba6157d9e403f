"""The ordered list of passes, run with checks and timings. Lowering is the last pass and lives to the right of this one."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import replace

from titans_graph.errors import UsageError, suggest
from titans_graph.ir import Graph
from titans_graph.passes.base import Pass
from titans_graph.passes.check_causality import CheckCausality
from titans_graph.passes.choose_kernels import ChooseKernels, Share
from titans_graph.passes.compilation import Compilation, PassRecord
from titans_graph.passes.expand import Expand
from titans_graph.passes.find_feedback import FindFeedback
from titans_graph.passes.infer_shapes import InferShapes
from titans_graph.passes.schedule import Hoist, Schedule

CHECKS: tuple[Pass, ...] = (Expand(), InferShapes(), CheckCausality(), FindFeedback())
PLANS: tuple[Pass, ...] = (Hoist(), Schedule(), ChooseKernels(), Share())


def run(c: Compilation, passes: Iterable[Pass], *, disable: Collection[str] = (), after: str | None = None) -> Compilation:
    """Run passes in order; each is checked before and after, timed and recorded.

    disable: names of optional passes to leave out. after: stop once the pass of that name ran. A graph with errors stops
    before the first pass that plans, because there is nothing sound to plan.
    """
    passes = list(passes)
    _check_names(passes, disable, after)
    for p in passes:
        if p.name in disable:
            c = replace(c, records=(*c.records, PassRecord(p.name, 0.0, None, p.optional)))
            continue
        if not c.sound and p not in CHECKS:
            break
        p.check_before(c)
        start = time.perf_counter()
        new = p.run(c)
        seconds = time.perf_counter() - start
        p.check_after(new)
        c = replace(new, records=(*c.records, PassRecord(p.name, seconds, new, p.optional)))
        if p.name == after:
            break
    return c


def _check_names(passes: list[Pass], disable: Collection[str], after: str | None) -> None:
    known = {p.name: p for p in passes}
    for name in disable:
        if name not in known:
            raise UsageError(f"unknown pass {name!r}; {suggest(name, known)}")
        if not known[name].optional:
            optional = ", ".join(n for n, p in known.items() if p.optional)
            raise UsageError(f"pass {name!r} cannot be disabled; optional passes: {optional}")
    if after is not None and after not in known:
        raise UsageError(f"unknown pass {after!r}; {suggest(after, known)}")


def check(graph: Graph) -> Compilation:
    """Run the passes that check a declared graph."""
    return run(Compilation(graph), CHECKS)
