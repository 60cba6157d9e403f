"""Pictures of graphs. See :mod:`titans_graph.viz.draw`."""

from titans_graph.viz.draw import dot, mermaid

__all__ = ["dot", "mermaid"]
