"""Checkpoints: everything a run needs to go on exactly, and everything ``generate`` needs to build the model again.

``RUN/checkpoints/step-00000200/`` holds

- ``weights.safetensors``    parameters and buffers by name;
- ``optimizer.safetensors``  AdamW's moments as ``parameter/moment``, and torch's random states;
- ``progress.json``          step, seconds so far, last validation, the run's settings and identity (as in ``run.json``),
  Python's and NumPy's random states;
- ``spec.yaml``              the resolved spec;
- ``manifest.json``          sizes and checksums of the above.

No pickle: a checkpoint from somebody else can be opened without running their code.

The last ``keep`` are kept, two unless told otherwise, so that there is one to fall back to; while one is written, the disk
holds one more.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from titans_graph.errors import CheckpointError
from titans_graph.runtime import files
from titans_graph.training import atomic, reading
from titans_graph.training.interface import Build, LanguageModel

WEIGHTS, OPTIMIZER, PROGRESS, SPEC = "weights.safetensors", "optimizer.safetensors", "progress.json", "spec.yaml"

Note = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder whose every byte is as written. ``step`` counts finished optimizer steps."""

    path: Path
    progress: dict[str, Any]

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return int(self.progress["step"])

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, on the CPU."""
        return files.read(self.path / WEIGHTS, "weights", CheckpointError)[0]

    def value(self, key: str) -> Any:
        """What the run noted under a key; CheckpointError where it did not."""
        if key not in self.progress:
            raise CheckpointError(f"{self.path / PROGRESS}: {key!r} is missing")
        return self.progress[key]

    def model(self, build: Build) -> LanguageModel:
        """The model, built from the spec in the checkpoint, with its trained weights."""
        model = build(str(self.path / SPEC))
        load_weights(model, self)
        return model


def load_weights(model: LanguageModel, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights into a model; CheckpointError where they do not fit."""
    found = reading.weights(checkpoint.path / WEIGHTS, model.state_dict(), model.name)
    try:
        model.load_state_dict(found)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.path}: the weights do not fit the model {model.name!r}: {error}") from error


def save_checkpoint(
    run: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, progress: dict[str, Any], keep: int = 2
) -> Path:
    """Write the checkpoint of ``progress["step"]`` under ``run`` and drop all but the last ``keep``.

    Atomic: see :mod:`titans_graph.training.atomic`. CheckpointError naming the path where the disk refuses.
    """
    folder = _folder(run) / _name(progress["step"])
    atomic.write_folder(folder, contents(model, optimizer, progress, random_tensors()))
    # Newer ones were passed over as damaged when this run was resumed from an earlier one.
    _remove(run, [p for p in _candidates(run) if p.name > folder.name])
    prune(run, progress["step"], keep)
    return folder


def contents(
    model: LanguageModel, optimizer: torch.optim.Optimizer, progress: dict[str, Any], states: dict[str, Tensor]
) -> dict[str, bytes]:
    """The files of a checkpoint, by name; ``states`` are torch's random states, of :func:`random_tensors`."""
    return {
        WEIGHTS: save(_portable(model.state_dict())),
        OPTIMIZER: save(_portable(_optimizer_tensors(model, optimizer) | states)),
        PROGRESS: json.dumps(progress | {"random": _random_plain()}, indent=1).encode(),
        SPEC: model.spec.encode(),
    }


def prune(run: Path, step: int, keep: int) -> None:
    """Remove all but the last ``keep`` of the checkpoints up to ``step``; newer ones stay."""
    _remove(run, [p for p in _candidates(run) if p.name <= _name(step)][keep:])


def newest(run: Path, note: Note) -> Checkpoint | None:
    """The newest undamaged checkpoint under ``run``; None where there is none at all.

    Damaged ones are passed over, each with a note. CheckpointError where all of them are damaged.
    """
    candidates = _candidates(run)
    for folder in candidates:
        wrong = atomic.damage(folder)
        if not wrong:
            return _read(folder)
        if not folder.is_dir():  # replaced by newer ones while we looked: a run goes on in this folder
            return newest(run, note)
        note(f"note: {folder} is damaged ({wrong}); falling back to the checkpoint before it")
    if candidates:
        raise CheckpointError(
            f"{_folder(run)}: every checkpoint is damaged, {', '.join(sorted(p.name for p in candidates))}\n"
            "  help: put one back from a copy; or start afresh from step 0, with --fresh (which sets this run aside) or "
            "another --out"
        )
    return None


def find(path: str | Path, note: Note) -> Checkpoint:
    """The checkpoint a user means by ``path``: a checkpoint folder, or a run's folder (its newest undamaged one)."""
    path = Path(path)
    if (path / atomic.MANIFEST).is_file():
        wrong = atomic.damage(path)
        if wrong:
            raise CheckpointError(
                f"{path}: damaged: {wrong}\n  help: name the run's folder to get its newest undamaged checkpoint"
            )
        return _read(path)
    found = newest(path.parent if path.name == "checkpoints" else path, note)
    if found is None:
        raise CheckpointError(
            f"{path}: no checkpoint here\n  help: give the --out folder of a training run, or one of its checkpoints"
        )
    return found


def restore(checkpoint: Checkpoint, model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
    """Put weights, optimizer moments and random states back, so that the next step is the one that would have come."""
    load_weights(model, checkpoint)
    moments, _ = reading.optimizer(checkpoint.path / OPTIMIZER, model.named_parameters())
    for name, parameter in model.named_parameters():
        if name in moments:
            optimizer.state[parameter] = moments[name]
    restore_random(checkpoint, model)


def restore_random(checkpoint: Checkpoint, model: LanguageModel) -> None:
    """Put torch's, Python's and NumPy's random states back."""
    _, states = reading.optimizer(checkpoint.path / OPTIMIZER, model.named_parameters())
    reading.set_random(checkpoint.path, states, checkpoint.value("random"))


def _read(folder: Path) -> Checkpoint:
    return Checkpoint(folder, reading.progress(folder / PROGRESS))


def _folder(run: Path) -> Path:
    return run / "checkpoints"


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _remove(run: Path, folders: list[Path]) -> None:
    try:
        for folder in folders:
            atomic.remove_folder(folder)
    except OSError as error:
        raise CheckpointError(f"{_folder(run)}: an old checkpoint cannot be removed: {error}") from error


def _candidates(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((p for p in _folder(run).glob("step-*") if p.is_dir()), reverse=True)


def _portable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory, as the file format wants."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def random_tensors() -> dict[str, Tensor]:
    """Torch's random states by name."""
    states = {f"{reading.RANDOM}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"{reading.RANDOM}cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _random_plain() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {"python": random.getstate(), "numpy": [str(kind), [int(k) for k in keys], *rest]}
