"""``check``, ``show``, ``draw`` and ``schema``: what a spec says, without training anything."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from titans_graph.cli.blame import rendered
from titans_graph.cli.options import Commands, add_spec, command, count, settings, writing


def add_commands(commands: Commands) -> None:
    """Add the parsers of this module's commands."""
    check = command(
        commands, "check", "check a spec and print every mistake with its place", "check specs/mac.yaml --set dim=128"
    )
    add_spec(check)
    check.set_defaults(run=run_check)

    show = command(
        commands,
        "show",
        "print a spec's graph, the compiler's passes or the generated code",
        "show mac --passes\n  titans-graph show mac --after schedule\n  titans-graph show mac --code",
    )
    add_spec(show)
    what = show.add_mutually_exclusive_group()
    what.add_argument("--after", metavar="PASS", help="the graph as it stands after a pass")
    what.add_argument("--code", action="store_true", help="the generated PyTorch code")
    what.add_argument("--passes", action="store_true", help="the passes in order, with their times")
    show.add_argument("--disable", action="append", default=[], metavar="PASS", help="leave a pass out; may be repeated")
    show.set_defaults(run=run_show)

    draw = command(commands, "draw", "draw a spec's graph", "draw mac --format dot --out mac.dot")
    add_spec(draw)
    draw.add_argument("--format", choices=("mermaid", "dot"), default="mermaid", help="mermaid (default) or dot")
    draw.add_argument("--out", type=Path, metavar="FILE", help="write to a file instead of the terminal")
    draw.set_defaults(run=run_draw)

    schema = command(commands, "schema", "print the JSON schema of specs, for editors", "schema > titans-graph.schema.json")
    schema.set_defaults(run=run_schema)


def run_check(options: argparse.Namespace) -> int:
    """Diagnostics on stderr, or one line of sizes; 1 where there is an error among them."""
    from titans_graph import runtime

    values = settings(options.set)
    diagnostics = runtime.check(options.spec, **values)
    if diagnostics:
        print(rendered(diagnostics, options.spec, options.set), file=sys.stderr)
    if any(d.severity == "error" for d in diagnostics):
        return 1
    print(f"{options.spec}: sound; {_sizes(options.spec, values)}")
    return 0


def run_show(options: argparse.Namespace) -> int:
    """The graph and its sizes, or what ``--passes``, ``--after`` or ``--code`` asks for."""
    import torch

    from titans_graph import runtime
    from titans_graph.cli import report

    values = settings(options.set)
    if not (options.passes or options.after or options.code or options.disable):
        print(runtime.graph(options.spec, **values).text())
        print(f"# {_sizes(options.spec, values)}")
        return 0
    with torch.device("meta"):
        done = runtime.compilation(options.spec, after=options.after, disable=tuple(options.disable), **values)
    if options.passes:
        print(report.passes(done))
    else:
        print(done.lowered.text() if options.code else report.program(done))
    return 0


def run_draw(options: argparse.Namespace) -> int:
    """A drawing as text, to the terminal or a file."""
    from titans_graph import runtime, viz

    graph = runtime.graph(options.spec, **settings(options.set))
    drawing = viz.dot(graph) if options.format == "dot" else viz.mermaid(graph)
    if options.out is None:
        print(drawing)
    else:
        with writing(options.out):
            options.out.write_text(drawing + "\n", encoding="utf-8")
        print(f"wrote {options.out}", file=sys.stderr)
    return 0


def run_schema(options: argparse.Namespace) -> int:
    """The schema as JSON."""
    from titans_graph import spec

    print(json.dumps(spec.schema(), indent=2))
    return 0


def _sizes(spec: str, values: dict[str, Any]) -> str:
    """One line of sizes; no weight is made for it."""
    import torch

    from titans_graph import runtime

    with torch.device("meta"):
        summary = runtime.Model(runtime.compilation(spec, **values)).summary()  # The check has told warnings.
    state = f"{count(summary.state_bytes)} bytes of state a stream"
    if summary.grows:
        state += " (growing with every token: full attention keeps them all)"
    return f"{count(summary.parameters)} parameters, {state}, {count(summary.flops)} FLOPs a token"
