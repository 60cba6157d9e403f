"""Sequence models with neural memory, declared as graphs, checked, compiled, trained and streamed.

The one public namespace. Importing it does not import torch; the names below are looked up when they are first used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# `components`, `kernels` and `specs` lie beside this package and are linked into it. Where a checkout lost the links
# (a zip, Git on Windows) they are found one level up; an installed package holds them as plain folders.
_here = Path(__file__).resolve().parent
if not (_here / "components").is_dir() and (_here.parent / "components").is_dir():
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from titans_graph.builder import Builder
    from titans_graph.errors import Diagnostic, InputError, SpecError, StateError, TitansGraphError
    from titans_graph.ir import Graph, parse
    from titans_graph.kernels.memory_function import MemoryState, fast_weights, neural_memory
    from titans_graph.kernels.memory_objectives import register_objective
    from titans_graph.kernels.memory_packed import neural_memory_packed
    from titans_graph.kernels.networks import NetworkBuilder
    from titans_graph.loading import load
    from titans_graph.registry import register
    from titans_graph.runtime import Compiled, Model, State, build, check, compilation, graph
    from titans_graph.runtime.health import doctor

_PUBLIC = {
    "Builder": "builder",
    "Compiled": "runtime",
    "Diagnostic": "errors",
    "Graph": "ir.model",
    "InputError": "errors",
    "MemoryState": "kernels.memory_function",
    "Model": "runtime",
    "NetworkBuilder": "kernels.networks",
    "SpecError": "errors",
    "State": "runtime",
    "StateError": "errors",
    "TitansGraphError": "errors",
    "build": "runtime",
    "check": "runtime",
    "compilation": "runtime",
    "doctor": "runtime.health",
    "fast_weights": "kernels.memory_function",
    "graph": "runtime",
    "load": "loading",
    "neural_memory": "kernels.memory_function",
    "neural_memory_packed": "kernels.memory_packed",
    "parse": "ir.text",
    "register": "registry",
    "register_objective": "kernels.memory_objectives",
}

__all__ = [
    "Builder",
    "Compiled",
    "Diagnostic",
    "Graph",
    "InputError",
    "MemoryState",
    "Model",
    "NetworkBuilder",
    "SpecError",
    "State",
    "StateError",
    "TitansGraphError",
    "build",
    "check",
    "compilation",
    "doctor",
    "fast_weights",
    "graph",
    "load",
    "neural_memory",
    "neural_memory_packed",
    "parse",
    "register",
    "register_objective",
]


def __getattr__(name: str) -> Any:
    """Look a public name up in the module that defines it."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
