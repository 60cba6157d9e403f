"""A disk that is full, pretended at every call that changes it, and really."""

from __future__ import annotations

import builtins
import errno
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.data import model, quick, run
from tests.training.test_loop import Breaking, losses, same, weights
from titans_graph.errors import CheckpointError
from titans_graph.training import atomic, checkpoint, logs
from titans_graph.training.replay import NonFiniteError

CONFIG = quick(steps=4, checkpoint_every=2, eval_every=0, eval_bytes=20)


@pytest.fixture
def reference(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(logs, "_board", lambda folder, step: None)
    out = tmp_path_factory.mktemp("reference")
    run(out, CONFIG)
    return out


class Full:
    """Every call that may need space, counted; the one of number ``at`` and all later ones fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.calls = at, 0
        for place, name in ((Path, "mkdir"), (Path, "rename"), (Path, "replace"), (os, "fsync"), (os, "write")):
            monkeypatch.setattr(place, name, self.failing(getattr(place, name)))
        monkeypatch.setattr(atomic, "open", self.open, raising=False)
        monkeypatch.setattr(logs, "open", self.open, raising=False)

    def failing(self, call: Any) -> Any:
        def wrapped(*args: Any, **given: Any) -> Any:
            self.count()
            return call(*args, **given)

        return wrapped

    def count(self) -> None:
        self.calls += 1
        if self.calls > self.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open(self, *args: Any, **given: Any) -> Any:
        self.count()
        return _Writing(self, builtins.open(*args, **given))


class _Writing:
    """A file whose writes count."""

    def __init__(self, disk: Full, file: Any) -> None:
        self.disk, self.file = disk, file

    def write(self, content: Any) -> int:
        self.disk.count()
        return int(self.file.write(content))

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def refused(out: Path, at: int) -> str:
    """What a run says on a disk that is full from a call on."""
    with pytest.MonkeyPatch.context() as patch:
        Full(patch, at)
        try:
            run(out, CONFIG)
        except CheckpointError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.nightly)])
def test_full_at_every_call(tmp_path: Path, reference: Path, every: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk = Full(patch, at=10**9)
        run(tmp_path / "counted", CONFIG)
    assert disk.calls > 50
    for at in range(0, disk.calls, every):
        out = tmp_path / f"full{at}"
        assert re.search(r"full\d+.*No space left(.|\n)*help:", refused(out, at))
        saved = [r["step"] for r in logs.read(out) if r["kind"] == "checkpoint"]
        found = checkpoint.newest(out, pytest.fail)
        assert (found.step if found else 0) >= max(saved, default=0)
        run(out, CONFIG)
        assert losses(out) == losses(reference)
        assert same(weights(out, 4), weights(reference, 4))
        assert {p.name for p in (out / "checkpoints").iterdir()} == {"step-00000002", "step-00000004"}
        shutil.rmtree(out)


def test_the_space_needed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(name: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "boundary", full)
    with pytest.raises(CheckpointError, match=r"run/x: .*No space left on device \(1,003 bytes are needed, [\d,]+ are free\)"):
        atomic.write_folder(tmp_path / "run" / "x", {"a": b"abc", "b": bytes(1000)})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("no right to mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("free", [0, 5_000, 50_000, 200_000])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own
def test_a_really_full_disk(small_disk: Path, reference: Path, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with TensorBoard
    net = model(dim=16)
    out, ballast = small_disk / "run", small_disk / "ballast"
    config = quick(steps=8, checkpoint_every=1, eval_every=0, eval_bytes=20)
    whole = small_disk.parent / "whole"
    run(whole, config, model(dim=16))
    room = shutil.disk_usage(small_disk).free
    ballast.write_bytes(bytes(room - free))
    with pytest.raises(CheckpointError, match=rf"{small_disk}.*No space left on device"):
        run(out, config, net)
    ballast.unlink()
    run(out, config, model(dim=16))
    assert losses(out) == losses(whole)
    assert same(weights(out, 8), weights(whole, 8))


def test_a_limit_on_the_size_of_files(tmp_path: Path, reference: Path) -> None:
    config = quick(steps=2, checkpoint_every=1, eval_every=0, eval_bytes=20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(CheckpointError, match="step-00000001: cannot be written: File too large"):
            run(tmp_path, config, model(dim=256))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert run(tmp_path, config, model(dim=256)).step == 2


def test_a_full_disk_does_not_hide_a_loss_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)

    def full(name: str) -> None:
        if name == "inside batch.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "boundary", full)
    with pytest.raises(NonFiniteError) as caught:
        run(tmp_path, CONFIG, Breaking(3, in_gradient=False))
    assert "step 3: the loss is nan" in str(caught.value)
    assert "could not be kept: " in str(caught.value)
    assert "bytes are needed" in str(caught.value)
    assert not caught.value.folder.exists()
