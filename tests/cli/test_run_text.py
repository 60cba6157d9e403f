"""Which text ``eval`` measures on: the run's own, wherever the command is given; and what ``train`` suggests afterwards."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.data import SENTENCE
from tests.training.stand_in import build
from titans_graph import runtime
from titans_graph.cli import main
from titans_graph.errors import DataError
from titans_graph.tasks import text as tasks
from titans_graph.training import checkpoint, folder

Capture = pytest.CaptureFixture[str]
SIZES = ["--steps", "2", "--batch", "2", "--length", "8", "--eval-bytes", "50", "--device", "cpu"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Path:
    """A run trained on ``fox.txt``, named as a path relative to the folder it was started in."""
    monkeypatch.setitem(vars(runtime), "load", lambda spec, **parameters: build(spec, **{"dim": 8, **parameters}))
    monkeypatch.chdir(tmp_path)
    Path("fox.txt").write_bytes(SENTENCE * 40)
    assert main(["train", "small", "--data", "fox.txt", "--out", "my run", *SIZES]) == 0
    return tmp_path / "my run"


def test_eval_measures_the_text_of_the_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    capsys.readouterr()
    assert main(["eval", str(run), "--data", "fox.txt"]) == 0
    expected = capsys.readouterr().out
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for asked in (run, run / "checkpoints" / "step-00000002"):
        assert main(["eval", str(asked)]) == 0
        shown = capsys.readouterr()
        assert shown.out == expected
        assert f"{tmp_path / 'fox.txt'}: 1,800 bytes" in shown.err
        assert "note:" not in shown.err
        assert "100%" in shown.err
        assert "89.0/89.0" in shown.err
    assert json.loads((run / "run.json").read_text())["data"]["path"] == str(tmp_path / "fox.txt")


def test_the_next_lines_are_commands_that_run(run: Path, capsys: Capture) -> None:
    said = capsys.readouterr().err
    lines = [line[line.index("titans-graph") :] for line in said.splitlines() if line.startswith(("next: ", "      titans"))]
    assert len(lines) == 2
    assert "--prompt 'the quick '" in lines[0]
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0
    assert "(one long stream, step 2, 90 bytes)" in capsys.readouterr().out


def test_a_text_that_is_gone_is_an_error(run: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "fox.txt").unlink()
    capsys.readouterr()
    assert main(["eval", str(run)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"cannot be read again: {tmp_path / 'fox.txt'}: no such file or folder" in shown.err
    assert "help: say with --data" in shown.err


def test_a_text_that_has_changed_is_said(run: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "fox.txt").write_bytes(SENTENCE * 50)
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    shown = capsys.readouterr()
    assert f"note: {tmp_path / 'fox.txt'} has changed since this run was trained on it" in shown.err
    assert "112 bytes" in shown.out


def test_a_run_on_the_standard_library_needs_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    part = torch.zeros(50, dtype=torch.uint8)
    text = tasks.Text(tasks.STANDARD, part, part, "")
    monkeypatch.setattr(tasks, "load", {None: text}.__getitem__)
    data = {"name": tasks.STANDARD, "identity": text.identity, "path": None}
    found = checkpoint.Checkpoint(Path("a run"), {"step": 1, "identity": {"data": data}})
    assert folder.text_of(found, pytest.fail) is text


@pytest.mark.parametrize(
    "identity",
    [
        None,
        3,
        {"data": []},
        {"data": {"name": "a sentence", "identity": "x", "path": None}},
        {"data": {"name": 3, "path": 4}},
        {"data": {"name": "gone.txt", "identity": "x"}},
        {"data": {"name": "x", "path": ""}},
        {"data": {"name": "x", "path": "."}},
        {"data": {"name": "x", "path": "/a\0b\x1b[2J"}},
        {"data": {"name": "x", "path": "/" + "a" * 5000}},
    ],
)
def test_a_run_that_does_not_say_where_its_text_is(identity: Any) -> None:
    found = checkpoint.Checkpoint(Path("a run"), {"step": 1, "identity": identity})
    with pytest.raises(DataError, match="--data") as caught:
        folder.text_of(found, pytest.fail)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_run_of_before_paths_were_noted_is_looked_for_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "old.txt"
    path.write_bytes(SENTENCE * 4)
    data = {"name": str(path), "identity": tasks.load(path).identity}
    found = checkpoint.Checkpoint(tmp_path, {"step": 1, "identity": {"data": data}})
    assert folder.text_of(found, pytest.fail).path == str(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"Call me Ishmael. Some years", "Call me"),
        (b'"""Record of phased-in', "Record of"),
        (b"1 2 3 (x) = 4\n\nimport os", "x"),
        ("été\n".encode("latin-1") * 3, "t"),
        ("Ärger über".encode(), "Ärger über"),
        (b"\0\x01" * 30 + b"123", ""),
    ],
)
def test_the_opening_is_the_first_words(content: bytes, words: str) -> None:
    train = torch.tensor(list(content), dtype=torch.uint8)
    assert tasks.Text("x", train, train, "").opening() == words


def test_a_run_starts_from_another_ones_weights(run: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "dog.txt").write_bytes(SENTENCE[::-1] * 40)
    more = ["--data", "dog.txt", "--init", "my run", "--out", "tuned", *SIZES]
    capsys.readouterr()
    assert main(["train", *more]) == 0
    said = capsys.readouterr().err
    assert "the first weights are those of my run/checkpoints/step-00000002" in said
    assert main(["train", "small", *more]) == 0
    assert "going on from step 2 of 2" in capsys.readouterr().err
    assert main(["train", "small", "--set", "dim=10", *more, "--fresh"]) == 1
    assert "of another graph than 'small'" in capsys.readouterr().err
    assert not (tmp_path / "tuned.1").exists()
    assert main(["train", *more, "--fresh"]) == 0
    assert (tmp_path / "tuned.1").is_dir()


def test_a_run_starts_again_from_its_own_weights(run: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["train", "--data", "fox.txt", "--init", "my run", "--out", "my run", *SIZES]
    assert main(command) == 1
    assert "the first weights: drawn at random there, step 2" in capsys.readouterr().err
    assert main([*command, "--fresh"]) == 0
    assert main(command) == 0
    assert "going on from step 2 of 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a SPEC, or with --init the run whose graph it is"),
        (["--set", "dim=4", "--init", "my run", "--out", "x"], "--set goes with a SPEC"),
        (["--init", "my run"], "say with --out"),
        (["small", "--init", "nowhere", "--out", "x"], "no checkpoint here"),
    ],
)
def test_starts_that_cannot_be(arguments: list[str], message: str, run: Path, capsys: Capture) -> None:
    assert main(["train", *arguments]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not Path("x").exists()
