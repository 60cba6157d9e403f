"""The declared graph as text, one node a line; :func:`parse` reads it back, value for value.

    graph mac
    block mac(x: [B, T, 128]) segment 64
      memory = memory.neural(write=attended, ask=attended, opening=x) chunk=64 network={"mlp": {"depth": 2}}
      -> y=memory.recall
    main(tokens: [B, T])
      layers = mac(x=embedded) repeat 2
      -> logits=layers

Values are JSON. Words that are no plain names (only in graphs with mistakes) are JSON strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from titans_graph.ir.limits import BLOCK_NAME, NAME
from titans_graph.ir.model import Block, Graph, Node, Ref
from titans_graph.ir.reader import parse

__all__ = ["parse", "to_text"]


def to_text(graph: Graph) -> str:
    """The graph as text, ending in a newline; needs plain values (:func:`titans_graph.ir.validate` checks them)."""
    lines = [f"graph {_word(graph.name, BLOCK_NAME)}"]
    for name, block in graph.blocks.items():
        lines.extend(_block(f"block {_word(name, BLOCK_NAME)}", block))
    lines.extend(_block("main", graph.main))
    return "\n".join(lines) + "\n"


def _block(head: str, block: Block) -> Iterator[str]:
    inputs = ", ".join(f"{_word(name, NAME)}: {value.text()}" for name, value in block.inputs.items())
    yield f"{head}({inputs})" + ("" if block.segment is None else f" segment {block.segment}")
    for node in block.nodes:
        yield f"  {_node(node)}"
    if block.outputs:
        yield "  -> " + ", ".join(f"{_word(name, NAME)}={_ref(ref)}" for name, ref in block.outputs.items())


def _node(node: Node) -> str:
    inputs = ", ".join(f"{_word(port, NAME)}={_refs(refs)}" for port, refs in node.inputs.items())
    parts = [f"{_word(node.name, NAME)} = {_word(node.use, BLOCK_NAME)}({inputs})"]
    parts.extend(f"{_word(key, NAME)}={json.dumps(value)}" for key, value in node.parameters.items())
    if node.repeat != 1:
        parts.append(f"repeat {node.repeat}")
    return " ".join(parts)


def _refs(refs: tuple[Ref, ...]) -> str:
    return _ref(refs[0]) if len(refs) == 1 else "[" + ", ".join(map(_ref, refs)) + "]"


def _ref(ref: Ref) -> str:
    return f"{_word(ref.node, NAME)}.{_word(ref.port, NAME)}" if ref.port else _word(ref.node, NAME)


def _word(text: str, pattern: re.Pattern[str]) -> str:
    return text if pattern.fullmatch(text) else json.dumps(text)
