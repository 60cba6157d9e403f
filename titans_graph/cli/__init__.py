"""The command line, ``titans-graph``. The last stage: imports everything, but only inside the command that needs it."""

from titans_graph.cli.main import main

__all__ = ["main"]
