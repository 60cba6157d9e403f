"""A run's folder that somebody may have written on purpose: its log, its identity, and a step kept for ``doctor --replay``."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from random import Random

import torch

import titans_graph as tg
from tests.fuzz import files, mutate
from tests.fuzz.contracts import Contract, Outcome, printable
from tests.models import small
from titans_graph.training import atomic, checkpoint, folder, logs, reading, replay
from titans_graph.training.config import TrainConfig

Kept = dict[str, bytes]


@functools.cache
def _speaker() -> tg.Model:
    return small("transformer", torch.float32, vocab=256)


@functools.cache
def _kept() -> Kept:
    """The files of a step that gave a NaN."""
    model = copy.deepcopy(_speaker())
    adamw = torch.optim.AdamW(model.parameters())
    progress = {"step": 1, "seconds": 0.5, "bits_per_byte": 8.0, "config": TrainConfig(steps=2, device="cpu").plain()}
    windows = torch.randint(0, 256, (2, 6), generator=torch.Generator().manual_seed(0))
    report = {"step": 2, "what": "loss", "value": float("nan"), "precision": "no", "device": "cpu (x)", "torch": "2"}
    contents = checkpoint.contents(model, adamw, progress, checkpoint.random_tensors())
    with tempfile.TemporaryDirectory() as out:
        error = replay.keep(Path(out), model, contents, windows, report, contextlib.nullcontext)
        return {p.name: p.read_bytes() for p in error.folder.iterdir()}


def draw_batch(draw: Random) -> bytes:
    """A damaged ``batch.safetensors``."""
    return files._tensor_file(draw, (_kept()[replay.BATCH],))


def draw_report(draw: Random) -> bytes:
    """A damaged ``replay.json``."""
    return mutate.text(draw, (_kept()[replay.REPLAY],))


def kept(name: str) -> Contract:
    """A kept step with one file of somebody's and a manifest that fits: refused, or run again and reported."""

    def contract(data: bytes, scratch: Path) -> Outcome:
        path = scratch / "nonfinite-step-00000002"
        path.mkdir(exist_ok=True)
        contents = {**_kept(), name: data}
        contents[atomic.MANIFEST] = json.dumps(
            {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items() if n != atomic.MANIFEST}
        ).encode()
        for file in (name, atomic.MANIFEST) if (path / name).is_file() else contents:
            (path / file).write_bytes(contents[file])

        def work() -> None:
            found = replay.rerun(replay.find(path), lambda spec: copy.deepcopy(_speaker()))
            printable(found.text())
            json.dumps(found.plain(), indent=2, allow_nan=False)

        return files._held(work)

    return contract


LOG = b"\n".join(
    json.dumps(record).encode()
    for record in (
        {"kind": "start", "step": 0, "time": 1.5, "config": {"steps": 4}},
        *({"kind": "train", "step": n, "time": 2.5, "loss": 5.0, "lr": 0.1, "grad_norm": 1.0} for n in (1, 2, 3)),
        {"kind": "eval", "step": 3, "time": 2.5, "bits_per_byte": 8.0},
        {"kind": "checkpoint", "step": 3, "time": 2.5, "path": "step-00000003"},
    )
)


def draw_log(draw: Random) -> bytes:
    """A damaged ``log.jsonl``."""
    return mutate.text(draw, (LOG,), trees=False)


def log(data: bytes, scratch: Path) -> Outcome:
    """A log: what it says is lost can be shown, with and without a checkpoint to go on from."""
    (scratch / logs.FILE).write_bytes(data)

    def work() -> None:
        for line in folder.loss(scratch, checkpoint.Checkpoint(scratch, {"step": 2})):
            printable(line)
        folder.loss(scratch, None)

    return files._held(work)


@functools.cache
def _identity() -> bytes:
    data = {"name": "a text", "identity": "abc", "bytes": 1200, "path": "/a/text"}
    init = {"path": "/another/run", "step": 7, "sha256": "def"}
    spec = _speaker().spec
    found = {"fingerprint": _speaker().fingerprint, "spec": spec, "data": data, "config": TrainConfig(steps=2).identity()}
    return json.dumps({**found, "init": init}, indent=1).encode()


def draw_identity(draw: Random) -> bytes:
    """A damaged ``run.json``."""
    return mutate.text(draw, (_identity(),))


def identity(data: bytes, scratch: Path) -> Outcome:
    """``run.json``, alone and beside a checkpoint that repeats it: the run's own, written anew, or another run's."""
    run = scratch / "run"
    shutil.rmtree(run, ignore_errors=True)
    step = run / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)

    def work() -> None:
        (run / folder.FILE).write_bytes(data)
        wanted = json.loads(_identity())
        folder.claim(run, wanted, printable)
        assert folder.differences(reading.json_of(run / folder.FILE), wanted) == []

    outcome = files._held(work)
    with contextlib.suppress(ValueError, RecursionError):
        progress = json.dumps({"step": 1, "identity": json.loads(data)}).encode()
        (step / checkpoint.PROGRESS).write_bytes(progress)
        entry = {"bytes": len(progress), "sha256": hashlib.sha256(progress).hexdigest()}
        (step / atomic.MANIFEST).write_text(json.dumps({checkpoint.PROGRESS: entry}))
        files._held(work)
    return outcome
