"""A program that is killed at every boundary of a checkpoint's writing, one after the other, and goes on each time.

Prints, as JSON, a list of ``[boundary, went on exactly]``. A program of its own, because it forks.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.training.data import quick, run
from titans_graph.training import atomic, logs

CONFIG = quick(steps=2, checkpoint_every=1, keep=1, eval_every=0, eval_bytes=20)


def outcome(out: Path) -> tuple[list[Any], bytes]:
    records = [r["loss"] for r in logs.read(out) if r["kind"] == "train"]
    return records, (out / "checkpoints" / "step-00000002" / "weights.safetensors").read_bytes()


def killed_at(out: Path, number: int) -> bool:
    """Train in a child that kills itself at the boundary of that number; whether it got so far."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    passed = -1

    def boundary(name: str) -> None:
        nonlocal passed
        passed += 1
        if passed == number:
            os.kill(os.getpid(), signal.SIGKILL)

    atomic.boundary = boundary
    run(out, CONFIG)
    os._exit(0)


def names(folder: Path) -> list[str]:
    """The boundaries that a whole run passes."""
    found: list[str] = []
    original, atomic.boundary = atomic.boundary, lambda name: found.append(name)
    run(folder, CONFIG)
    atomic.boundary = original
    return found


def main() -> None:
    torch.set_num_threads(1)
    logs._board = lambda folder, step: None  # threads of its own, and slow to open
    results = []
    with tempfile.TemporaryDirectory() as folder:
        boundaries = names(Path(folder, "whole"))
        wanted = outcome(Path(folder, "whole"))
        for number, name in enumerate(boundaries):
            out = Path(folder, "crashed")
            crashed = killed_at(out, number)
            run(out, CONFIG)
            left = sorted(p.name for p in (out / "checkpoints").iterdir())
            results.append([name, crashed and outcome(out) == wanted and left == ["step-00000002"]])
            shutil.rmtree(out)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
