"""Running what the compiler made: layout, driver, state, ``torch.compile``. See :mod:`titans_graph.runtime.model`."""

from titans_graph.runtime.api import build, check, compilation, declare, graph, load
from titans_graph.runtime.model import Compiled, Model, Summary
from titans_graph.runtime.state import State

__all__ = ["Compiled", "Model", "State", "Summary", "build", "check", "compilation", "declare", "graph", "load"]
