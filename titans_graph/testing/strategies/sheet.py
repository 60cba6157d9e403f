"""A spec as lines with addresses, so that it can be changed in one place and that place be named."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from titans_graph.ir import Block, Graph, Node, Ref
from titans_graph.ir.limits import MAIN


class Address(NamedTuple):
    """A line: ``key`` of a ``node`` of a ``block``; empty ``key`` the node's first line, empty ``node`` the block's own."""

    block: str
    node: str = ""
    key: str = ""


class Sheet:
    """The spec of a graph, one key a line. Lines are changed, put in and taken out by address."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.rows: list[tuple[Address, str]] = [(Address(MAIN, key="titans_graph"), "titans_graph: 1")]
        self.rows += self._block(graph.main, MAIN, "")
        if graph.blocks:
            self.rows.append((Address(MAIN, key="blocks"), "blocks:"))
            for name, block in graph.blocks.items():
                self.rows += [(Address(name), f"  {name}:"), *self._block(block, name, "    ")]

    @property
    def text(self) -> str:
        """The file."""
        return "".join(f"{row}\n" for _, row in self.rows)

    def index(self, address: Address) -> int:
        """Where a line stands, from 0; the last one of that address."""
        return max(i for i, (here, _) in enumerate(self.rows) if here == address)

    def line(self, address: Address) -> int:
        """The number of a line, from 1."""
        return self.index(address) + 1

    def change(self, address: Address, value: Any) -> None:
        """Another value on the line of a key."""
        i = self.index(address)
        head = self.rows[i][1].partition(":")[0]
        self.rows[i] = address, f"{head}: {shown(value)}"

    def remove(self, *addresses: Address) -> None:
        """Take lines out."""
        self.rows = [row for row in self.rows if row[0] not in addresses]

    def insert(self, at: int, rows: Iterable[tuple[Address, str]]) -> None:
        """Put lines in before the line with that index."""
        self.rows[at:at] = rows

    def set(self, block: str, node: str, key: str, value: Any) -> Address:
        """Give a key of a node a value, on the line it has or a new one."""
        address = Address(block, node, key)
        if any(here == address for here, _ in self.rows):
            self.change(address, value)
        else:
            indent = "    " if block == MAIN else "        "
            self.insert(self.index(Address(block, node, "use")) + 1, [(address, f"{indent}{key}: {shown(value)}")])
        return address

    def add_node(self, before: str, node: Node) -> None:
        """A further node of the main block, before another."""
        self.insert(self.index(Address(MAIN, before)), self._node(node, MAIN, "  "))

    def add_output(self, name: str, ref: Ref) -> Address:
        """A further output of the main block, which keeps what it names from being unused."""
        address = Address(MAIN, key=f"-> {name}")
        self.insert(self.index(Address(MAIN, key="output")) + 1, [(address, f"  {name}: {ref.text()}")])
        return address

    def add_block(self, name: str, **lines: str) -> Address:
        """A further block, last in the file: a line for each key, ``nodes`` and ``input`` with what stands in their braces."""
        if not any(here == Address(MAIN, key="blocks") for here, _ in self.rows):
            self.rows.append((Address(MAIN, key="blocks"), "blocks:"))
        self.rows.append((Address(name), f"  {name}:"))
        self.rows += [(Address(name, key=key), f"    {key}: {line}") for key, line in lines.items()]
        return Address(name)

    def _block(self, block: Block, name: str, indent: str) -> list[tuple[Address, str]]:
        rows = [(Address(name, key="input"), f"{indent}input:")]
        rows += [(Address(name, key=k), f"{indent}  {k}: {v.text()}") for k, v in block.inputs.items()]
        if block.segment is not None:
            rows.append((Address(name, key="segment"), f"{indent}segment: {block.segment}"))
        rows.append((Address(name, key="nodes"), f"{indent}nodes:"))
        for node in block.nodes:
            rows += self._node(node, name, indent + "  ")
        rows.append((Address(name, key="output"), f"{indent}output:"))
        return rows + [(Address(name, key=f"-> {k}"), f"{indent}  {k}: {ref.text()}") for k, ref in block.outputs.items()]

    def _node(self, node: Node, block: str, indent: str) -> list[tuple[Address, str]]:
        keys: dict[str, Any] = {"use": node.use, **node.inputs, **node.parameters}
        if node.repeat != 1:
            keys["repeat"] = node.repeat
        rows = [(Address(block, node.name), f"{indent}{node.name}:")]
        return rows + [(Address(block, node.name, k), f"{indent}  {k}: {shown(v)}") for k, v in keys.items()]


def shown(value: Any) -> str:
    """A value on one line: references bare, everything else as JSON, which is YAML as well."""
    if isinstance(value, tuple):
        refs = [ref.text() if isinstance(ref, Ref) else str(ref) for ref in value]
        return refs[0] if len(refs) == 1 else f"[{', '.join(refs)}]"
    return value.text() if isinstance(value, Ref) else json.dumps(value)


def plain_nodes(graph: Graph) -> list[tuple[str, Node]]:
    """All nodes that use a component, each with its block."""
    every = {MAIN: graph.main, **graph.blocks}
    return [(name, node) for name, block in every.items() for node in block.nodes if node.use not in graph.blocks]
