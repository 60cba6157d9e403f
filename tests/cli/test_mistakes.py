"""Mistakes on the command line are named where they were made, with what mends them."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.training.data import SENTENCE
from titans_graph.cli import main
from titans_graph.cli.blame import rendered
from titans_graph.errors import Diagnostic, UsageError
from titans_graph.runtime import check
from titans_graph.training import atomic
from titans_graph.training.config import TrainConfig

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bytes", "-3"], "argument --bytes: -3 is out of range, at least 0"),
        (["--restart", "-7"], "argument --restart: -7 is out of range, at least -1"),
        (["--bytes", "many"], "argument --bytes: 'many' is no whole number"),
        (["--bytes", "1e3"], "argument --bytes: '1e3' is no whole number"),
    ],
)
def test_numbers_of_eval_have_a_range(arguments: list[str], message: str, capsys: Capture) -> None:
    assert main(["eval", "runs/none", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_window_has_two_bytes_at_least() -> None:
    with pytest.raises(UsageError, match="length: 1 is out of range, at least 2"):
        TrainConfig(length=1)
    assert TrainConfig(length=2).length == 2


@pytest.mark.parametrize("name", [".", "..", "/", ""])
def test_a_folder_is_no_spec(name: str, capsys: Capture) -> None:
    assert main(["check", name]) == 2
    assert "is a folder; give the path of a spec file in it" in capsys.readouterr().err


def test_a_drawing_that_cannot_be_written(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "none" / "x.dot"
    assert main(["draw", "lmm", "--out", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"error: --out {path}: cannot be written: No such file or directory\n"
        "  help: name a file in a folder that is there and can be written\n"
    )


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "none.txt"
    assert main(["doctor", "lmm", "--set", "dim=8", "layers=1", "heads=2", "--text", str(path)]) == 1
    assert capsys.readouterr().err == f"error: {path}: No such file or directory\n"


def test_a_file_is_no_folder_of_a_run(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(SENTENCE * 40)
    command = ["train", "transformer", "--set", "dim=8", "layers=1", "heads=2", "--data", str(path), "--device", "cpu"]
    for out in (path, path / "run"):
        assert main([*command, "--out", str(out)]) == 1
        shown = capsys.readouterr().err
        assert f"error: {out}: cannot be written: " in shown
        assert shown.endswith("help: a file is where a folder is needed: choose another --out\n")
    assert path.read_bytes() == SENTENCE * 40


@pytest.mark.parametrize(
    ("number", "mend"),
    [
        (errno.ENOSPC, "earlier checkpoints are intact; free space or choose another folder"),
        (errno.EFBIG, "earlier checkpoints are intact; free space or choose another folder"),
        (errno.EACCES, "choose a folder that can be written, with --out"),
        (errno.ENOENT, "choose a folder that can be written, with --out"),
        (errno.ENOTDIR, "a file is where a folder is needed"),
    ],
)
def test_the_mend_of_a_refused_write_is_that_of_its_reason(tmp_path: Path, number: int, mend: str) -> None:
    shown = str(atomic.failure(tmp_path, OSError(number, "why"), 1000))
    assert f"help: {mend}" in shown
    assert ("1,000 bytes are needed" in shown) == (number == errno.ENOSPC)


def show(spec: str, *pairs: str, **values: object) -> str:
    return rendered(check(spec, **values), spec, list(pairs))


def test_a_mistake_of_set_is_shown_at_set() -> None:
    heading, place, *rest = show("mac", "layers=1", "heads=3", layers=1, heads=3).splitlines()
    assert heading == "--set heads=3: error: heads 3 do not divide the feature size 128"
    assert place.startswith("  at ")
    assert "mac.yaml:" in place
    assert "heads: $heads" in rest[0]


def test_a_mistake_of_two_settings_names_both() -> None:
    shown = show("mac", "segment=32", "chunk=48", "dim=64", segment=32, chunk=48, dim=64)
    assert shown.startswith("--set segment=32 chunk=48: error: segment 32 is not a multiple of chunk 48")
    shown = show("mac", "dim=36", "heads=8", dim=36, heads=8)
    assert shown.startswith("--set dim=36 heads=8: error: heads 8 do not divide the feature size 36")


def test_a_parameter_that_is_none_is_shown_at_set(capsys: Capture) -> None:
    assert main(["train", "mac", "--set", "dmi=3", "dim=abc"]) == 1
    shown = capsys.readouterr().err.splitlines()
    assert "--set dim=abc: error: override of parameter 'dim': must be a number like its default 128, got 'abc'" in shown
    for command in ("check", "show", "draw", "doctor"):
        assert main([command, "mac", "--set", "dmi=3"]) == 1
        shown = capsys.readouterr().err.splitlines()
        assert shown[0].startswith("--set dmi=3: error: spec ")
        assert shown[1] == "  help: did you mean 'dim'?"


def test_the_mistakes_of_the_file_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    shipped = (Path(__file__).resolve().parents[2] / "specs" / "mac.yaml").read_text()
    path.write_text(shipped.replace("use: norm.rms, in: layers", "use: norm.rsm, in: layers"))
    own = show(str(path))
    assert own.startswith(f"{path}:")
    both = show(str(path), "heads=3", heads=3)
    assert own in both
    assert "--set heads=3: error: heads 3" in both
    assert show(str(path), "dim=64", dim=64) == own


def test_without_settings_nothing_is_blamed() -> None:
    assert rendered([Diagnostic("odd", node="n", help="mend")], "nowhere", []) == "node 'n': error: odd\n  help: mend"
