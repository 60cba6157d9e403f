"""``bench``: measure what the project promises, on this machine, as ratios within one run."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from titans_graph.bench import PARTS
from titans_graph.cli.options import Commands, command, writing
from titans_graph.errors import UsageError


def add_commands(commands: Commands) -> None:
    """Add the parser of ``bench``."""
    bench = command(
        commands,
        "bench",
        "measure the neural memory on this machine's processor, on one thread",
        "bench memory --out memory.json\n  titans-graph bench memory --only peer --peer ~/peer/bin/python",
        "Shares of the same run's matrix products, peak memory per head and token in fresh processes, time per token at "
        "several lengths, and a whole layer against titans-pytorch 0.5.5. Compiles first, then takes some minutes.",
    )
    bench.add_argument("what", choices=("memory",), help="what to measure")
    bench.add_argument("--only", metavar="PARTS", default=",".join(PARTS), help=f"some of: {', '.join(PARTS)} (default: all)")
    bench.add_argument("--peer", metavar="PYTHON", help="a Python that has titans-pytorch 0.5.5; without it, no comparison")
    bench.add_argument("--quick", action="store_true", help="few tokens and rounds: whether it runs, not how fast")
    bench.add_argument("--out", type=Path, metavar="FILE", help="also write everything as JSON")
    bench.set_defaults(run=run_bench)


def run_bench(options: argparse.Namespace) -> int:
    """Print figures as they are measured; 0 even where an aim is missed, because machines differ."""
    from titans_graph.bench import report
    from titans_graph.bench.memory import Case

    parts = tuple(p.strip() for p in options.only.split(","))
    unknown = [p for p in parts if p not in PARTS]
    if unknown:
        raise UsageError(f"--only {', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    if options.peer is None and parts == ("peer",):
        raise UsageError("--only peer needs --peer PYTHON, an interpreter that has titans-pytorch")
    if not sys.platform.startswith("linux") and set(parts) & {"growth", "peer"}:
        raise UsageError("peak memory is read from Linux's /proc: elsewhere, give --only speed,length")
    if options.peer is not None and shutil.which(options.peer) is None:
        raise UsageError(f"--peer {options.peer}: no such interpreter")
    if options.out is not None:
        with writing(options.out):
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.touch()
    case, sizes = Case(), report.QUICK if options.quick else report.Sizes()
    print(f"{case.heads} heads, {case.dim} -> {case.hidden} -> {case.dim}, chunk {case.chunk}, float32, one thread")
    figures = report.bench(case, sizes, parts, options.peer, lambda line: print(line, flush=True))
    if "peer" in parts and options.peer is None:
        print("no comparison with titans-pytorch: give --peer PYTHON")
    if options.out is not None:
        options.out.write_text(json.dumps(report.plain(case, sizes, figures), indent=1) + "\n")
    return 0
