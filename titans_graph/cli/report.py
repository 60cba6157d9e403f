"""A compilation as text: its passes with their times, and the program as it stands after one of them."""

from __future__ import annotations

from collections.abc import Iterator

from titans_graph.passes import Compilation
from titans_graph.passes.compilation import FlatNode, Program


def passes(c: Compilation) -> str:
    """The passes in the order they ran, in milliseconds; those that may be left out are marked."""
    lines = [f"{'pass':<18}{'ms':>8}  what"]
    for record in c.records:
        if record.after is None:
            what, time = "left out", ""
        else:
            what, time = "optional" if record.optional else "", f"{1000 * record.seconds:.1f}"
        lines.append(f"{record.name:<18}{time:>8}  {what}".rstrip())
    return "\n".join(lines)


def program(c: Compilation) -> str:
    """What is known so far: nodes with their inputs and types, loops, kernels, and both programs once they are planned."""
    lines = [f"# after {c.records[-1].name}" if c.records else "# declared", *_nodes(c)]
    for loop in c.loops:
        lines.append(f"loop every {loop.period} tokens: {', '.join(loop.nodes)}")
    lines += [f"kernel of {node}: {kernel}" for node, kernel in c.kernels.items()]
    for name, plan in (("whole sequence", c.whole), ("one token", c.token)):
        lines += _plan(name, plan) if plan is not None else []
    lines += [f"output {name} = {ref.text()}" for name, ref in c.outputs.items()]
    return "\n".join(lines)


def _nodes(c: Compilation) -> Iterator[str]:
    for name, value in c.inputs.items():
        yield f"input {name}: {value.text()}"
    for node in c.nodes.values():
        types = [f"{ref.port} {value.text()}" for ref, value in c.types.items() if ref.node == node.name]
        yield f"{node.name} = {_call(node)}" + (f" -> {', '.join(types)}" if types else "")


def _call(node: FlatNode) -> str:
    inputs = (f"{port}={', '.join(ref.text() for ref in refs)}" for port, refs in node.inputs.items())
    values = (f"{key}={value}" for key, value in node.values.items())
    return f"{node.use}({'; '.join([*inputs, *values])})"


def _plan(name: str, plan: Program) -> Iterator[str]:
    yield f"program for {name}:"
    for region in plan.regions:
        every = f", every {region.period} tokens" if region.period else ""
        steps = ", ".join(s.node if s.stage.name == "run" else f"{s.node}.{s.stage.name}" for s in region.steps)
        yield f"  {region.name}{every}: {steps}"
