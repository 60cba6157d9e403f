from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.data import quick, small_text
from tests.training.stand_in import build
from titans_graph.errors import CheckpointError, UsageError
from titans_graph.training import demo, figures, plan

MODELS: dict[str, dict[str, Any]] = {"first": {"dim": 8}, "second": {"dim": 8}}
CONFIG = quick(eval_restart=8)


def run(out: Path, **options: Any) -> demo.DemoResult:
    options = {"models": MODELS, "config": CONFIG, "steps": 12, "progress": False, "note": lambda text: None, **options}
    return demo.demo(build, small_text(), out, **options)


def test_the_demo_compares_and_draws(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.steps == 12
    table = demo.table(result, CONFIG)
    for word in ("first", "second", "bigram", "bzip2", "parameters", "state", "bytes per second"):
        assert word in table
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert result.prompt == "the quick "
    assert result.sample
    first, second = result.rows
    assert first.windows == second.windows, "same model, same batches"


def test_an_earlier_plan_is_followed(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "loss.png").unlink()
    notes: list[str] = []
    assert run(tmp_path, steps=50, note=notes.append).steps == 12
    assert any("a demo of 12 steps is here" in note for note in notes)
    assert (tmp_path / "loss.png").exists()
    demo.set_aside(tmp_path, notes.append, MODELS)
    assert run(tmp_path, steps=11).steps == 11


def test_little_time_means_fewer_steps_for_both(tmp_path: Path) -> None:
    result = run(tmp_path, minutes=0.0001, steps=1000)
    assert result.steps == 10
    assert json.loads((tmp_path / plan.FILE).read_text())["steps"] == 10


@pytest.mark.parametrize(("minutes", "shown"), [(1.0, "1 minute"), (0.5, "0.5 minutes"), (4.0, "4 minutes")])
def test_one_minute_is_one(tmp_path: Path, minutes: float, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_seconds", lambda *_: 1.0)
    notes: list[str] = []
    plan.plan({"a": build("a")}, small_text(), tmp_path, CONFIG, 9, minutes, notes.append)
    assert notes[0].endswith(f" steps fit into {shown}")


def test_a_plan_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / plan.FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"plan\.json: cannot be read"):
        run(tmp_path)


def test_the_faster_number_of_threads_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_seconds", lambda *_: {1: 2.0, 2: 1.0}[torch.get_num_threads()])
    with plan.threads(2):
        assert plan._fastest({"a": build("a")}, small_text(), CONFIG) == (2, {"a": 1.0})
    monkeypatch.setattr(plan, "_seconds", lambda *_: {1: 2.0, 2: 9.0}[torch.get_num_threads()])
    with plan.threads(2):
        assert plan._fastest({"a": build("a")}, small_text(), CONFIG) == (1, {"a": 2.0})


def test_unequal_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="more than 5%"):
        run(tmp_path, models={"first": {"dim": 8}, "second": {"dim": 9}})


def test_smoothing_is_corrected_for_its_start() -> None:
    records = [{"kind": "train", "step": i, "bits_per_byte": 3.0} for i in (1, 2, 3)]
    steps, values = figures.smoothed(records)
    assert steps == [1, 2, 3]
    assert values == pytest.approx([3.0, 3.0, 3.0])
