"""The spec language: YAML files to declared graphs, with every mistake in its place. No torch."""

from __future__ import annotations

from titans_graph.spec.files import find, read, read_text, shipped
from titans_graph.spec.json_schema import schema
from titans_graph.spec.load import Declared
from titans_graph.spec.write import to_yaml

__all__ = ["Declared", "find", "read", "read_text", "schema", "shipped", "to_yaml"]
