"""Pictures of a declared graph as text: Mermaid (rendered by many hosting sites) and DOT (Graphviz). No library needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from titans_graph.ir import Block, Graph, Node, Ref
from titans_graph.registry import known, lookup

# Component family -> (Mermaid class, fill colour): memory and attention stand out.
COLOURS = {
    "memory": "#f6d5a8",
    "attention": "#bcd7f5",
    "tokens": "#d9c8f0",
    "gate": "#c9e8c4",
    "input": "#ffffff",
    "other": "#eeeeee",
}


@dataclass(frozen=True)
class Box:
    """One node of the picture: a unique id, the lines of its label, and its family (for the colour)."""

    key: str
    lines: tuple[str, ...]
    family: str


@dataclass(frozen=True)
class Arrow:
    """One connection: from and to box, a label (ports that are not the first), and whether it closes a feedback loop."""

    source: str
    target: str
    label: str
    feedback: bool


def _family(use: str) -> str:
    family = use.split(".")[0]
    return family if family in COLOURS else "other"


def boxes(block: Block, prefix: str) -> Iterator[Box]:
    """Inputs, nodes and outputs of one block as boxes."""
    for name, value in block.inputs.items():
        yield Box(f"{prefix}{name}", (name, value.text()), "input")
    for node in block.nodes:
        times = f" × {node.repeat}" if node.repeat > 1 else ""
        yield Box(f"{prefix}{node.name}", (node.name, node.use + times), _family(node.use))
    for name in block.outputs:
        yield Box(f"{prefix}out_{name}", ("output" if len(block.outputs) == 1 else name,), "input")


def arrows(graph: Graph, block: Block, prefix: str) -> Iterator[Arrow]:
    """The connections of one block; a connection to an earlier node in the file closes a loop."""
    order = {node.name: i for i, node in enumerate(block.nodes)}
    for node in block.nodes:
        for port, refs in node.inputs.items():
            for ref in refs:
                back = ref.node in order and order[ref.node] >= order[node.name] and _reaches(block, node.name, ref.node)
                yield Arrow(f"{prefix}{ref.node}", f"{prefix}{node.name}", _label(graph, node, ref, port), back)
    for name, ref in block.outputs.items():
        yield Arrow(f"{prefix}{ref.node}", f"{prefix}out_{name}", ref.port, False)


def _label(graph: Graph, node: Node, ref: Ref, port: str) -> str:
    """Port names where a reader needs them: an output that is named, an input that is not the first."""
    names = [p.name for p in lookup(node.use).inputs] if known(node.use) else list(graph.blocks[node.use].inputs)
    shown = port if names and port != names[0] else ""
    return " → ".join(p for p in (ref.port, shown) if p)


def _reaches(block: Block, start: str, goal: str) -> bool:
    readers: dict[str, list[str]] = {}
    for node in block.nodes:
        for refs in node.inputs.values():
            for ref in refs:
                readers.setdefault(ref.node, []).append(node.name)
    seen, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name == goal:
            return True
        if name not in seen:
            seen.add(name)
            waiting += readers.get(name, [])
    return False


def _blocks(graph: Graph) -> list[tuple[str, Block]]:
    return [("main", graph.main), *graph.blocks.items()]


def _id(text: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in text)


def mermaid(graph: Graph) -> str:
    """The graph as a Mermaid flowchart: one subgraph per block, feedback as dashed arrows."""
    lines = ["flowchart TD"]
    classes: dict[str, list[str]] = {}
    for title, block in _blocks(graph):
        prefix = f"{_id(title)}__"
        lines.append(f'  subgraph {_id(title)} ["{title}{_segment(block)}"]')
        for box in boxes(block, prefix):
            lines.append(f'    {_id(box.key)}["{"<br/>".join(box.lines)}"]')
            classes.setdefault(box.family, []).append(_id(box.key))
        for arrow in arrows(graph, block, prefix):
            shaft = "-.->" if arrow.feedback else "-->"
            label = f'|"{arrow.label}"|' if arrow.label else ""
            lines.append(f"    {_id(arrow.source)} {shaft}{label} {_id(arrow.target)}")
        lines.append("  end")
    for family, keys in classes.items():
        lines.append(f"  classDef {family} fill:{COLOURS[family]},stroke:#555,color:#111")
        lines.append(f"  class {','.join(keys)} {family}")
    return "\n".join(lines) + "\n"


def dot(graph: Graph) -> str:
    """The graph in Graphviz' language: one cluster per block, feedback dashed."""
    lines = ["digraph {", "  rankdir=TB; node [shape=box, style=filled, fontname=Helvetica];"]
    for title, block in _blocks(graph):
        prefix = f"{title}/"
        lines.append(f'  subgraph "cluster_{title}" {{ label="{title}{_segment(block)}";')
        for box in boxes(block, prefix):
            label = "\\n".join(box.lines)
            lines.append(f'    "{box.key}" [label="{label}", fillcolor="{COLOURS[box.family]}"];')
        for arrow in arrows(graph, block, prefix):
            style = ", style=dashed, constraint=false" if arrow.feedback else ""
            lines.append(f'    "{arrow.source}" -> "{arrow.target}" [label="{arrow.label}"{style}];')
        lines.append("  }")
    return "\n".join([*lines, "}"]) + "\n"


def _segment(block: Block) -> str:
    return f", segment {block.segment}" if block.segment is not None else ""
