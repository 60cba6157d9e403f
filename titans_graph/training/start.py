"""Where a run's first weights come from when they are not drawn at random: ``train --init``, for fine-tuning.

A run that starts from a checkpoint of another takes its weights and nothing else: optimizer moments, random states, the
learning rate and the steps are those of the new run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from titans_graph.errors import CheckpointError
from titans_graph.runtime import files
from titans_graph.training import checkpoint, folder
from titans_graph.training.interface import Build, LanguageModel


def first_weights(
    source: Path, out: Path, model: LanguageModel | None, build: Build, note: checkpoint.Note
) -> tuple[LanguageModel, dict[str, Any]]:
    """A model with the weights of a run or checkpoint ``source``, and what the run into ``out`` notes of them.

    They are put into ``model``; without one (None) the checkpoint's own spec is built. A run in ``out`` that was started from
    ``source`` and has a checkpoint goes on with that: ``source`` is then not read, it may have changed or be gone.
    CheckpointError where there is no checkpoint, or it is of another graph than ``model``.
    """
    path = os.path.abspath(source)
    begun = checkpoint.newest(out, lambda text: None) if out.is_dir() else None
    noted = folder.first_weights(begun)
    if begun is not None and noted is not None and noted["path"] == path:
        return (build(str(begun.path / checkpoint.SPEC)) if model is None else model), noted
    found = checkpoint.find(source, note)
    trained = found.model(build)
    if model is not None:
        _demand_same(found, trained, model)
        checkpoint.load_weights(model, found)
    note(f"the first weights are those of {found.path}")
    sha256 = files.checksum(found.path / checkpoint.WEIGHTS)
    return model if model is not None else trained, {"path": path, "step": found.step, "sha256": sha256}


def _demand_same(found: checkpoint.Checkpoint, trained: LanguageModel, model: LanguageModel) -> None:
    """CheckpointError, with the lines that differ, unless a checkpoint's model has the graph of ``model``."""
    if trained.fingerprint == model.fingerprint:
        return
    changes = folder.spec_changes(trained.spec, model.spec)
    raise CheckpointError(
        f"{found.path}: its weights are of another graph than {model.name!r}:\n    "
        + "\n    ".join(changes)
        + "\n  help: leave SPEC out to take the graph of --init as it is, or give the --set of that run"
    )
