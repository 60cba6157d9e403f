"""``load``: a model by the name of its spec, or, with what it has learned, by the folder it was trained into."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from os import PathLike
from pathlib import Path
from typing import Any, cast

from titans_graph import runtime
from titans_graph.errors import UsageError
from titans_graph.ir import Graph
from titans_graph.runtime import Model
from titans_graph.spec import shipped

_RUN = ("run.json", "checkpoints", "manifest.json")
"""What shows that a folder is a run's, or one of its checkpoints."""


def load(source: str | PathLike[str] | Graph, *, disable: Collection[str] = (), **parameters: Any) -> Model:
    """A model, on the CPU: of a spec with new weights, or of a training run with the trained ones.

    source: the path of a spec, the bare name of a shipped one (``mac``, ``blocks/mag``), a declared graph, or the folder of
    a run or of one of its checkpoints. A run gives its newest undamaged checkpoint; a damaged one that is passed over is a
    warning. parameters override the spec's own; disable names optional passes to leave out.

    Warnings of a spec go to the log ``titans_graph``.

    Raises SpecError with every mistake of a spec; CheckpointError where a folder has no checkpoint that is whole; UsageError
    where there is nothing by that name, or parameters are given for a model that is trained.
    """
    if isinstance(source, Graph) or not os.path.isdir(source):
        return runtime.load(cast(str, source), disable=disable, **parameters)
    name, run = os.fspath(source), any((Path(source) / part).exists() for part in _RUN) or Path(source).name == _RUN[1]
    if Path(source).as_posix() in shipped():
        if not run:
            return runtime.load(source, disable=disable, **parameters)
        raise UsageError(
            f"{name!r} is a shipped spec, and the folder of a training run here; "
            f"write '{name}.yaml' for the spec, the absolute path for the run"
        )
    if not run:
        raise UsageError(
            f"{name!r} is a folder without a training run's checkpoints; give the path of a spec file, or a run's folder"
        )
    if parameters:
        raise UsageError(f"{name!r} is trained: its parameters stand; {', '.join(parameters)} would make another model of it")
    return _trained(name, disable)


def _trained(path: str, disable: Collection[str]) -> Model:
    """The model of a checkpoint."""
    try:
        from titans_graph.training.checkpoint import find
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed; a trained model needs: pip install 'titans-graph[train]'") from error
    found = find(path, lambda text: warnings.warn(text.removeprefix("note: "), stacklevel=2))
    return cast(Model, found.model(lambda spec: runtime.load(spec, disable=disable)))
