"""The files of a checkpoint as values, whoever wrote them: JSON of bounded size, tensors that fit, random states that are some.

A manifest shows damage by accident; whoever writes a checkpoint writes its manifest too. Everything here is therefore
checked as if nothing was known about it, and what does not fit is a CheckpointError before any of it is used.
"""

from __future__ import annotations

import json
import math
import random
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titans_graph.errors import CheckpointError, shortened
from titans_graph.runtime import files

LARGEST = 16 << 20
"""Bytes of a JSON file; the project's own have a few ten thousand."""
RANDOM = "random/"
"""Where torch's random states stand among the tensors."""
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
_WORDS = 624
"""32-bit words of the Mersenne Twister's state."""


def json_of(path: Path) -> Any:
    """The content of a JSON file. OSError where it cannot be read; ValueError where it is no JSON, too large or too deep."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
        raise ValueError(f"no file of at most {LARGEST} bytes")
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("nested too deep") from None


def shown(text: str, longest: int = 200) -> str:
    """A text out of a file, fit to be shown: bounded, and nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in shortened(text, longest))


def progress(path: Path) -> dict[str, Any]:
    """What ``progress.json`` says, with every known key of its type; ``step`` is always there. CheckpointError."""
    try:
        found = json_of(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.parent}: no training checkpoint ({shortened(str(error), 200)})") from error
    wrong = "no mapping" if not isinstance(found, dict) else "without a step" if "step" not in found else ""
    bad = "" if wrong else next((key for key, fits in _KNOWN.items() if key in found and not fits(found[key])), "")
    if wrong or bad:
        reason = wrong or f"{bad} is {found[bad]!r:.60}"
        raise CheckpointError(f"{path}: no progress of a training run: {reason}")
    return dict(found)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


_KNOWN: dict[str, Callable[[Any], bool]] = {
    "step": _count,
    "seconds": _number,
    # A validation that gave a NaN is no reason to lose a run, whose weights are finite.
    "bits_per_byte": lambda value: value is None or _number(value) or (type(value) is float and not math.isfinite(value)),
    "config": lambda value: isinstance(value, dict),
}


def weights(path: Path, wanted: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Weights that fit a model's, as views of the mapped file; CheckpointError where they do not."""
    found, _ = files.read(path, "weights", CheckpointError)
    wrong = files.misfit(wanted, found)
    if wrong:
        raise CheckpointError(f"{path}: the weights do not fit the model {name!r}: {wrong}")
    return found


Moments = dict[str, dict[str, Tensor]]


def optimizer(path: Path, parameters: Iterable[tuple[str, Tensor]]) -> tuple[Moments, dict[str, Tensor]]:
    """AdamW's moments by parameter and moment, and torch's random states by device; CheckpointError for anything else."""
    found, _ = files.read(path, "optimizer", CheckpointError)
    known = dict(parameters)
    moments: Moments = {}
    states: dict[str, Tensor] = {}
    for key, tensor in found.items():
        name, _, moment = key.rpartition("/")
        if key.startswith(RANDOM):
            states[key.removeprefix(RANDOM)] = tensor.clone()
            continue
        parameter = known.get(name)
        shape = None if parameter is None else torch.Size() if moment == "step" else parameter.shape
        if moment not in _MOMENTS or tensor.shape != shape or not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {key!r:.100} {list(tensor.shape)} {tensor.dtype} is no moment of this model")
        assert parameter is not None
        device = torch.device("cpu") if moment == "step" else parameter.device
        moments.setdefault(name, {})[moment] = files.copied(tensor, device)
    odd = next((name for name, own in moments.items() if own.keys() != _MOMENTS), None)
    if odd is not None:
        raise CheckpointError(f"{path}: the moments of {odd!r:.100} are not complete")
    return moments, states


def set_random(path: Path, states: Mapping[str, Tensor], plain: Any) -> None:
    """Put torch's, Python's and NumPy's random states in place; CheckpointError, with all as they were, where one is none."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True)
    try:
        twister = _python(plain["python"]), _numpy(plain["numpy"])
        torch.set_rng_state(states["cpu"])
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in states:
                torch.cuda.set_rng_state(states[f"cuda{i}"], i)
        random.setstate(twister[0])
        np.random.set_state(twister[1])
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])
        reason = shortened(f"{type(error).__name__}: {error}", 200)
        raise CheckpointError(f"{path}: the random states cannot be put back ({reason!r})") from error


def _python(state: Any) -> tuple[Any, ...]:
    version, internal, gauss = state
    if gauss is not None and not _number(gauss):
        raise ValueError("a number in reserve that is none")
    return version, tuple(internal), gauss


def _numpy(state: Any) -> tuple[Any, ...]:
    """NumPy takes a position behind the end of its state as it is, and then reads what lies there in memory."""
    kind, keys, position, has_gauss, cached = state
    words = isinstance(keys, list) and len(keys) == _WORDS and all(type(k) is int and 0 <= k < 1 << 32 for k in keys)
    if kind != "MT19937" or not words or not (type(position) is int and 0 <= position <= _WORDS):
        raise ValueError("no state of the Mersenne Twister")
    if has_gauss not in (0, 1) or not _number(cached):
        raise ValueError("a number in reserve that is none")
    return kind, np.array(keys, dtype=np.uint32), position, int(has_gauss), float(cached)
