"""A run that starts from another run's weights: which weights, which graph, and how it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.training.data import model, quick, run, small_text
from tests.training.stand_in import StandIn, build
from tests.training.test_loop import losses, same, weights
from titans_graph.errors import CheckpointError
from titans_graph.training import checkpoint, folder
from titans_graph.training.start import first_weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints at 3 and 6."""
    out = tmp_path_factory.mktemp("trained")
    run(out, quick(checkpoint_every=3))
    return out


def start(source: Path, out: Path, net: StandIn | None = None, **changes: int) -> list[str]:
    """Start a run into ``out`` from ``source``, or go on with it; the notes of both."""
    notes: list[str] = []
    first, init = first_weights(source, out, net, build, notes.append)
    assert isinstance(first, StandIn)
    run(out, quick(checkpoint_every=2, **changes), first, init=init, note=notes.append)
    return notes


@pytest.mark.parametrize("with_a_model", [False, True])
def test_the_first_weights_are_those_of_the_checkpoint(trained: Path, tmp_path: Path, with_a_model: bool) -> None:
    notes: list[str] = []
    net = model(seed=7) if with_a_model else None
    first, init = first_weights(trained, tmp_path / "no run yet", net, build, notes.append)
    assert same(first.state_dict(), weights(trained, 6))
    assert net is None or first is net
    assert notes == [f"the first weights are those of {trained / 'checkpoints' / 'step-00000006'}"]
    assert (init["path"], init["step"]) == (str(trained), 6)
    older, _ = first_weights(trained / "checkpoints" / "step-00000003", tmp_path, None, build, notes.append)
    assert same(older.state_dict(), weights(trained, 3))


def test_it_begins_where_the_other_ended_with_a_schedule_of_its_own(trained: Path, tmp_path: Path) -> None:
    start(trained, tmp_path)
    assert losses(tmp_path)[0] < min(losses(trained)[0], 5.5)
    rates = [json.loads(line).get("lr") for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert next(r for r in rates if r) == pytest.approx(0.005), "the first step of a warm-up of two"


def test_it_goes_on_as_a_run_that_was_not_stopped(trained: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(trained, tmp_path / "source"))
    start(source, tmp_path / "whole")
    start(source, tmp_path / "parts")
    checkpoint._remove(tmp_path / "parts", [tmp_path / "parts" / "checkpoints" / "step-00000006"])
    shutil.rmtree(source)
    assert any("going on from step 4 of 6" in n for n in start(source, tmp_path / "parts"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert same(weights(tmp_path / "parts", 6), weights(tmp_path / "whole", 6))


def test_a_source_that_trains_on_does_not_stop_it(trained: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(trained, tmp_path / "source"))
    start(source, tmp_path / "run")
    shutil.rmtree(source)
    run(source, quick(seed=9))
    assert any("going on from step 6 of 6" in n for n in start(source, tmp_path / "run", model()))


def test_other_first_weights_are_another_run(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    start(trained, out)
    with pytest.raises(CheckpointError, match=f"the first weights: step 6 of {trained} there, drawn at random here"):
        run(out, quick(checkpoint_every=2))
    older = trained / "checkpoints" / "step-00000003"
    with pytest.raises(CheckpointError, match=f"step 6 of {trained} there, step 3 of {older} here"):
        start(older, out)
    with pytest.raises(CheckpointError, match=r"first weights: drawn at random there(.|\n)*weights further: --init"):
        start(older, Path(shutil.copytree(trained, tmp_path / "copy")))


def test_before_the_first_checkpoint_the_source_must_be_as_it_was(trained: Path, tmp_path: Path) -> None:
    source, out = Path(shutil.copytree(trained, tmp_path / "source")), tmp_path / "run"
    _, init = first_weights(source, out, None, build, lambda text: None)
    folder.claim(out, folder.identity(model(), small_text(), quick(checkpoint_every=2), init), pytest.fail)
    checkpoint._remove(source, [source / "checkpoints" / "step-00000006"])
    with pytest.raises(CheckpointError, match=r"step 6 of .* there, step 3 of .* here"):
        start(source, out)


def test_another_graph_is_refused_with_its_lines(trained: Path, tmp_path: Path) -> None:
    net = model(dim=10)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r'of another graph than \'stand-in\':(.|\n)*-.*"dim": 8(.|\n)*"dim": 10(.|\n)*SPEC'
    ):
        first_weights(trained, tmp_path, net, build, pytest.fail)
    assert same(net.state_dict(), before)


def test_a_finished_run_is_not_prolonged_and_says_what_to_do(trained: Path) -> None:
    message = rf"steps: 6 there, 9 here\n  help: the learning rate of every step depends on --steps(.|\n)*--init {trained} with"
    with pytest.raises(CheckpointError, match=message):
        run(trained, quick(checkpoint_every=3, steps=9))
    with pytest.raises(CheckpointError, match=r"pass --fresh to set that run aside; to train its weights further: --init"):
        run(trained, quick(checkpoint_every=3, steps=9, seed=4))


@pytest.mark.parametrize("noted", [3, [], {}, {"path": 3, "step": "x", "sha256": None}, {"path": "\x1b[2J" * 999, "step": 0}])
def test_odd_notes_of_first_weights_are_those_of_another_run(trained: Path, tmp_path: Path, noted: object) -> None:
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(out / "checkpoints")
    found = json.loads((out / folder.FILE).read_text())
    (out / folder.FILE).write_text(json.dumps({**found, "init": noted}))
    wanted = {**found, "init": {"path": "here", "step": 1, "sha256": "abc"}}
    lines = folder.differences(json.loads((out / folder.FILE).read_text()), wanted)
    assert len(lines) == 1
    assert "\x1b" not in lines[0]
    assert len(lines[0]) < 500
