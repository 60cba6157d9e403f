"""The compiler's passes: from a declared graph to a plan of regions. See :mod:`titans_graph.passes.pipeline`."""

from titans_graph.passes.base import Pass
from titans_graph.passes.compilation import Compilation, FlatNode, Loop, PassRecord, Program, Region, Step
from titans_graph.passes.pipeline import CHECKS, PLANS, check, run

__all__ = [
    "CHECKS",
    "PLANS",
    "Compilation",
    "FlatNode",
    "Loop",
    "Pass",
    "PassRecord",
    "Program",
    "Region",
    "Step",
    "check",
    "run",
]
