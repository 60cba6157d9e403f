"""The declared graph: its data model, its text form and its structural checks. No torch, no YAML."""

from __future__ import annotations

from titans_graph.ir.model import Block, Graph, Node, Ref
from titans_graph.ir.reader import parse
from titans_graph.ir.text import to_text
from titans_graph.ir.validate import prune, validate

__all__ = ["Block", "Graph", "Node", "Ref", "parse", "prune", "to_text", "validate"]
