"""A run's folder after something happened to it: what is gone is said, nothing starts over in silence."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training import kills
from tests.training.data import quick, run
from tests.training.test_loop import Stopping, losses, same, weights
from titans_graph.errors import CheckpointError
from titans_graph.training import atomic, checkpoint, folder, logs

CONFIG = quick(checkpoint_every=2)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints at 4 and 6."""
    out = tmp_path_factory.mktemp("reference")
    run(out, CONFIG)
    return out


@pytest.fixture
def copy(reference: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _no_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_board", lambda folder, step: None)


def again(out: Path, **options: Any) -> list[str]:
    notes: list[str] = []
    run(out, CONFIG, note=notes.append, **options)
    return notes


def test_four_kills_and_the_losses_of_a_run_that_nobody_killed() -> None:
    found = kills.run(4, seed=3, steps=12)
    assert found["wrong"] == []
    assert found["kills"] == 4


@pytest.mark.nightly
def test_sixty_kills() -> None:
    found = kills.run(60, seed=0, steps=60)
    assert found["wrong"] == []
    assert found["in a save"] >= 10


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "missing"])
def test_steps_after_a_damaged_checkpoint_are_named_and_repeated(copy: Path, reference: Path, how: str) -> None:
    path = copy / "checkpoints" / "step-00000006" / checkpoint.WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if how == "missing":
        shutil.rmtree(path.parent)
    else:
        path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-1]), "empty": b""}[how])
    notes = "\n".join(again(copy))
    assert ("step-00000006 is damaged" in notes) == (how != "missing")
    assert "going on from step 4 of 6 (step-00000004)" in notes
    assert "steps 5 to 6, made after the last good checkpoint, are run again" in notes
    assert losses(copy) == losses(reference)
    assert same(weights(copy, 6), weights(reference, 6))


def test_a_run_stopped_before_its_first_checkpoint_says_that_it_starts_over(tmp_path: Path, reference: Path) -> None:
    run(tmp_path, CONFIG, Stopping(1))
    shutil.rmtree(tmp_path / "checkpoints")
    log = tmp_path / logs.FILE
    log.write_bytes(b"".join(line for line in log.read_bytes().splitlines(True) if b'"checkpoint"' not in line[:22]))
    assert "note: step 1, made after the last good checkpoint, is run again" in again(tmp_path)
    assert losses(tmp_path) == losses(reference)


@pytest.mark.parametrize("damage", ["checkpoints gone", "all damaged"])
def test_a_run_never_starts_over_in_silence(copy: Path, damage: str) -> None:
    if damage == "checkpoints gone":
        shutil.rmtree(copy / "checkpoints")
    for path in (copy / "checkpoints").glob("*/" + checkpoint.PROGRESS):
        path.write_bytes(b"")
    said = "the log says that step 6 was saved" if damage == "checkpoints gone" else "damaged, step-00000004, step-00000006"
    before = (copy / logs.FILE).read_bytes()
    with pytest.raises(CheckpointError, match=said + r"(.|\n)*start afresh from step 0, with --fresh"):
        again(copy)
    assert (copy / logs.FILE).read_bytes() == before
    assert folder.set_aside(copy) is not None
    assert again(copy) == []


@pytest.mark.parametrize("content", [None, b"", b"[1]", b'{"fingerprint": 3}', b"\xff\xfe", b"flip"])
def test_the_identity_of_a_run_is_in_its_checkpoints_too(copy: Path, content: bytes | None) -> None:
    path = copy / folder.FILE
    before = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(before.replace(b'"steps": 6', b'"steps": 7') if content == b"flip" else content)
    with pytest.raises(CheckpointError, match="seed: 0 there, 1 here"):
        run(copy, quick(checkpoint_every=2, seed=1))
    notes = again(copy)
    assert any(re.match(r"note: .*run.json .*; written anew from step-00000006", n) for n in notes)
    assert json.loads(path.read_bytes()) == json.loads(before)


def test_without_an_identity_anywhere_a_run_is_refused(copy: Path) -> None:
    (copy / folder.FILE).write_bytes(b"{")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(CheckpointError, match=r"cannot be told which run this is\n.*--fresh"):
        again(copy)
    (copy / folder.FILE).unlink()
    (copy / logs.FILE).rename(copy / "elsewhere")
    assert folder.set_aside(copy) is None
    (copy / "elsewhere").rename(copy / logs.FILE)
    assert folder.set_aside(copy) is not None


def test_holes_in_the_log_are_said(copy: Path) -> None:
    log = copy / logs.FILE
    lines = log.read_bytes().splitlines(True)
    at = [n for n, line in enumerate(lines) if b'"kind": "train"' in line]
    for n, content in ((at[1], b"{\n"), (at[2], b"[]\n"), (at[3], b'{"kind": 4, "step": 4}\n')):
        lines[n] = content
    log.write_bytes(b"".join(lines))
    assert any("log.jsonl is damaged or missing: it lacks 3 of the steps 2 to 4" in n for n in again(copy))
    log.unlink()
    assert any("it lacks 6 of the steps 1 to 6" in n for n in again(copy))


def test_a_checkpoint_that_goes_while_it_is_read_is_no_damage(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``eval`` beside a training run, which drops old checkpoints."""
    real, calls = atomic.damage, 0

    def damage(path: Path) -> str:
        nonlocal calls
        calls += 1
        if calls == 1:
            shutil.rmtree(path)
        return real(path)

    monkeypatch.setattr(atomic, "damage", damage)
    notes: list[str] = []
    found = checkpoint.find(copy, notes.append)
    assert (found.step, notes) == (4, [])


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a folder, with a child that outlives it."""
    program = (
        "import subprocess, sys\nfrom pathlib import Path\nfrom titans_graph.training.atomic import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "    print(child.pid, flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_a_held_folder_names_its_holder_and_a_killed_one_blocks_nobody(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        who = rf"another process \(id {holder.pid} on \S+ since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d+\) is training"
        with pytest.raises(CheckpointError, match=rf"{who}(.|\n)*`kill {holder.pid}` \(it saves first\), or choose another"):
            again(tmp_path)
        holder.kill()
        holder.wait()
        assert again(tmp_path) == [], "the kernel let the lock go, though the holder's child lives on"
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("place", ["inside weights.safetensors", "before rename", "after rename", "before retiring"])
def test_a_second_ctrl_c_stops_at_once_and_harms_nothing(
    tmp_path: Path, reference: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def boundary(name: str) -> None:
        if name == place and list((tmp_path / "checkpoints").glob("*step-00000006")):
            os.kill(os.getpid(), signal.SIGINT)

    notes: list[str] = []
    monkeypatch.setattr(atomic, "boundary", boundary)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, quick(checkpoint_every=2, keep=1), Stopping(6), note=notes.append)
    monkeypatch.setattr(atomic, "boundary", lambda name: None)
    assert re.fullmatch(r"stopped at once, after step 6; the last checkpoint is of step [46]", notes[-1])
    found = checkpoint.newest(tmp_path, notes.append)
    assert found is not None
    assert f"of step {found.step}" in notes[-1] or place in ("after rename", "before retiring")
    again(tmp_path)
    assert losses(tmp_path) == losses(reference)
    assert same(weights(tmp_path, 6), weights(reference, 6))


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_of_torchrun_saves(tmp_path: Path, number: int) -> None:
    """torchrun hands the signal on to its processes, which stop after the same step."""
    out, program = tmp_path / "run", tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.training.data import quick, run\n"
        "run(Path(sys.argv[1]), quick(steps=100_000, device='cpu'))\n"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(program), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(losses(out)) < 5:
            time.sleep(0.1)
        process.send_signal(number)
        process.wait()
    found = checkpoint.newest(out, pytest.fail)
    assert found is not None
    assert found.step == len(losses(out)) >= 5
