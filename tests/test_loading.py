"""``tg.load``: the one name for a spec's model and for a run's."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import titans_graph as tg
from tests.training.data import quick, small_text
from titans_graph.errors import CheckpointError, UsageError
from titans_graph.training import atomic, checkpoint
from titans_graph.training.loop import train

SIZES: dict[str, Any] = {"dim": 8, "layers": 1, "heads": 2}
TOKENS = torch.arange(20).view(1, 20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tg.Model]:
    """A run with checkpoints of steps 2 and 4, and the model after step 4."""
    torch.manual_seed(0)
    model = tg.load("transformer", **SIZES)
    out = tmp_path_factory.mktemp("runs") / "duo"
    train(model, small_text(), quick(steps=4, checkpoint_every=2), out, progress=False, note=lambda text: None)
    return out, model


@pytest.fixture
def run(trained: tuple[Path, tg.Model], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "duo"))


def logits(model: tg.Model) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS)[0]
    return found


def test_a_run_gives_its_newest_weights(run: Path, trained: tuple[Path, tg.Model]) -> None:
    for place in (run, str(run), run / "checkpoints", run / "checkpoints" / "step-00000004"):
        loaded = tg.load(place)
        assert torch.equal(logits(loaded), logits(trained[1]))
        assert loaded.fingerprint == trained[1].fingerprint
    assert not torch.equal(logits(tg.load(run / "checkpoints" / "step-00000002")), logits(trained[1]))


def test_a_loaded_model_trains_on_in_memory_of_its_own(run: Path) -> None:
    model = tg.load(run)
    shutil.rmtree(run)
    model(TOKENS)[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_optional_passes_can_be_left_out(run: Path) -> None:
    assert torch.allclose(logits(tg.load(run, disable=["hoist"])), logits(tg.load(run)), atol=1e-5)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run: Path) -> None:
    newest = run / "checkpoints" / "step-00000004"
    (newest / checkpoint.WEIGHTS).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"step-00000004 is damaged \(weights"):
        found = tg.load(run)
    assert torch.equal(logits(found), logits(tg.load(run / "checkpoints" / "step-00000002")))
    with pytest.raises(CheckpointError, match=r"damaged: weights(.|\n)*name the run's folder"):
        tg.load(newest)


def test_a_run_without_checkpoints_is_an_error(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        tg.load(run)


def test_a_trained_model_takes_no_parameters(run: Path) -> None:
    with pytest.raises(UsageError, match="is trained: its parameters stand; dim, heads would"):
        tg.load(run, dim=16, heads=4)


def test_any_other_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(tg.load("lmm", dim=8, layers=1, heads=2).spec)
    with pytest.raises(UsageError, match=r"is a folder without a training run's checkpoints; give the path of a spec file"):
        tg.load(tmp_path)


def test_shipped_names_stay_shipped(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lmm").mkdir()
    assert tg.load("lmm", dim=8, layers=1, heads=2).name == "lmm"
    (tmp_path / "lmm").rmdir()
    run.rename("lmm")
    with pytest.raises(UsageError, match=r"write 'lmm\.yaml' for the spec, the absolute path for the run"):
        tg.load("lmm")
    assert tg.load("lmm.yaml", dim=8, layers=1, heads=2).name == "lmm"
    assert tg.load(tmp_path / "lmm").name == "transformer"


def test_what_training_needs_is_named_where_it_is_missing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "titans_graph.training.checkpoint", None)
    with pytest.raises(UsageError, match=r"pip install 'titans-graph\[train\]'"):
        tg.load(run)


def test_a_graph_is_loaded_too() -> None:
    graph = tg.graph("transformer", **SIZES)
    assert tg.load(graph).fingerprint == tg.load("transformer", **SIZES).fingerprint


def test_the_folder_is_known_by_the_names_that_training_writes() -> None:
    from titans_graph import loading
    from titans_graph.training import folder

    assert {folder.FILE, atomic.MANIFEST} <= set(loading._RUN)
