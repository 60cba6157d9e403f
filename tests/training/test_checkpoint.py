from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.data import model, quick, run
from tests.training.stand_in import build
from titans_graph.errors import CheckpointError
from titans_graph.training import atomic, checkpoint
from titans_graph.training.folder import set_aside

ROOT = Path(__file__).resolve().parents[2]
FILES = [checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.PROGRESS, checkpoint.SPEC, atomic.MANIFEST]


def test_killed_at_every_write_a_run_goes_on_exactly() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.crash"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) > 30
    assert [name for name, exact in results if not exact] == []


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    run(tmp_path, quick(steps=4, checkpoint_every=2))
    return tmp_path


def newest(out: Path) -> Path:
    return out / "checkpoints" / "step-00000004"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flip", "cut", "missing", "empty"])
def test_a_damaged_checkpoint_is_passed_over(trained: Path, name: str, how: str) -> None:
    path = newest(trained) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-1]), "empty": b""}[how])
    notes: list[str] = []
    found = checkpoint.newest(trained, notes.append)
    assert found is not None
    assert found.step == 2
    assert len(notes) == 1
    assert "step-00000004" in notes[0]
    assert "falling back" in notes[0]
    with pytest.raises(CheckpointError):
        checkpoint.find(newest(trained), notes.append)


def test_the_damaged_checkpoint_is_replaced_when_the_run_gets_there(trained: Path) -> None:
    before = (newest(trained) / checkpoint.WEIGHTS).read_bytes()
    (newest(trained) / checkpoint.WEIGHTS).write_bytes(b"damage")
    run(trained, quick(steps=4, checkpoint_every=2))
    assert (newest(trained) / checkpoint.WEIGHTS).read_bytes() == before


def test_a_damaged_checkpoint_never_outlives_a_good_one(trained: Path) -> None:
    (newest(trained) / checkpoint.WEIGHTS).write_bytes(b"damage")
    net = model()
    checkpoint.save_checkpoint(trained, net, torch.optim.AdamW(net.parameters()), {"step": 3}, keep=1)
    assert [p.name for p in (trained / "checkpoints").iterdir()] == ["step-00000003"]


def test_only_damaged_checkpoints_are_an_error(trained: Path) -> None:
    for folder in (trained / "checkpoints").iterdir():
        (folder / atomic.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        run(trained, quick(steps=4, checkpoint_every=2))


def test_the_model_comes_back_from_the_checkpoint_alone(trained: Path) -> None:
    for path in (trained, trained / "checkpoints", newest(trained)):
        found = checkpoint.find(path, print)
        net = found.model(build)
        assert found.step == 4
        assert all(torch.equal(value, found.weights()[name]) for name, value in net.state_dict().items())


def test_weights_of_another_model_are_refused(trained: Path) -> None:
    with pytest.raises(CheckpointError, match="do not fit"):
        checkpoint.load_weights(model(dim=9), checkpoint.find(trained, print))


def test_no_checkpoint_is_named(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path, print) is None
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        checkpoint.find(tmp_path / "nothing", print)


def test_random_states_come_back(trained: Path) -> None:
    import random

    import numpy as np

    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    checkpoint.save_checkpoint(trained, net, optimizer, {"step": 9})
    drawn = torch.rand(1).item(), random.random(), np.random.rand()
    checkpoint.restore(checkpoint.find(trained, print), net, optimizer)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == drawn


def test_an_earlier_run_is_set_aside(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    assert set_aside(other) is None, "no run, nothing to rename"
    moved = set_aside(trained)
    assert moved == trained.with_name(trained.name + ".1")
    assert not trained.exists()
    run(trained, quick(steps=1))
    assert set_aside(trained) == trained.with_name(trained.name + ".2")
