"""A declared graph as a spec file, for graphs that were built in Python or rewritten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from titans_graph.ir.model import Block, Graph, Node, Ref
from titans_graph.spec.formula import escape
from titans_graph.spec.scalars import resolve

_LONGEST_KEY = 900
"""YAML wants ``?`` before keys of more than 1024 characters."""


def to_yaml(graph: Graph) -> str:
    """A sound graph as YAML; :func:`titans_graph.spec.read_text` gives the same graph back, without parameters."""
    lines = ["titans_graph: 1", f"name: {_quoted(graph.name)}", *_block(graph.main, "")]
    if graph.blocks:
        lines.append("blocks:")
        for name, block in graph.blocks.items():
            lines.append(_entry("  ", name, ""))
            lines.extend(_block(block, "    "))
    return "\n".join(lines) + "\n"


def _block(block: Block, indent: str) -> Iterator[str]:
    inputs = ", ".join(f"{_short(name)}: {value.text()}" for name, value in block.inputs.items())
    yield f"{indent}input: {{{inputs}}}"
    if block.segment is not None:
        yield f"{indent}segment: {block.segment}"
    yield f"{indent}nodes:" + ("" if block.nodes else " {}")
    for node in block.nodes:
        yield _entry(f"{indent}  ", node.name, _node(node))
    yield f"{indent}output: {{" + ", ".join(f"{_short(name)}: {ref.text()}" for name, ref in block.outputs.items()) + "}"


def _entry(indent: str, name: str, value: str) -> str:
    """A line, or the two that a long name takes, of a mapping in block style."""
    value = f": {value}".rstrip()
    return f"{indent}{name}{value}" if len(name) < _LONGEST_KEY else f"{indent}? {name}\n{indent}{value}"


def _node(node: Node) -> str:
    # A component called like a number or null would not read back as a word.
    parts = [f"use: {node.use if isinstance(resolve(node.use), str) else _quoted(node.use)}"]
    parts.extend(f"{_short(port)}: {_refs(refs)}" for port, refs in node.inputs.items())
    parts.extend(f"{_short(key)}: {_value(value)}" for key, value in node.parameters.items())
    if node.repeat != 1:
        parts.append(f"repeat: {node.repeat}")
    return "{" + ", ".join(parts) + "}"


def _refs(refs: tuple[Ref, ...]) -> str:
    return refs[0].text() if len(refs) == 1 else "[" + ", ".join(ref.text() for ref in refs) + "]"


def _value(value: Any) -> str:
    """A plain value in flow style; strings always quoted, so that none is taken for a number."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)}: {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str):
        return _quoted(escape(value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _key(key: str) -> str:
    return _short(_quoted(key))


def _short(key: str) -> str:
    """A key in flow style."""
    return key if len(key) < _LONGEST_KEY else f"? {key} "


def _quoted(text: str) -> str:
    """A double-quoted scalar of printable ASCII (YAML's escapes, which unlike JSON's have no surrogate pairs)."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if " " <= character <= "~":
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
