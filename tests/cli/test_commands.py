"""The commands through ``main``, on stand-ins for the compiler: arguments, messages and exit statuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import titans_graph
from tests.training.data import SENTENCE
from tests.training.stand_in import build
from titans_graph import runtime
from titans_graph.cli import main
from titans_graph.errors import Diagnostic, SlowLoop, Span, SpecError, UnknownComponent
from titans_graph.training import checkpoint, demo

ROOT = Path(__file__).resolve().parents[2]
TYPO = UnknownComponent("unknown component 'x'", Span("a.yaml", 5, 3, 1, "  use: x"), help="did you mean 'y'?")
Capture = pytest.CaptureFixture[str]
Replace = Callable[[str, Any], None]


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Replace:
    """Put a stand-in for the compiler in place."""
    return lambda name, value: monkeypatch.setitem(vars(runtime), name, value)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(SENTENCE * 40)
    return path


@pytest.fixture
def quick_train(tmp_path: Path, text: Path, replace: Replace) -> list[str]:
    replace("load", lambda spec, **parameters: build(spec, **{"dim": 8, **parameters}))
    sizes = ["--steps", "4", "--batch", "2", "--length", "8", "--warmup", "1", "--eval-bytes", "50", "--device", "cpu"]
    return ["train", "small", "--data", str(text), "--out", str(tmp_path / "run"), *sizes]


def test_help_of_every_command_has_an_example(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name in ("check", "show", "draw", "train", "generate", "eval", "demo", "schema"):
        assert f"  {name} " in listed
        assert main([name, "--help"]) == 0
        assert f"example:\n  titans-graph {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["check"],
        ["train", "x", "--steps", "many"],
        ["show", "x", "--code", "--passes"],
        ["check", "--x"],
    ],
)
def test_bad_usage_is_two(arguments: list[str], capsys: Capture) -> None:
    assert main(arguments) == 2
    assert "usage: titans-graph" in capsys.readouterr().err


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"titans-graph {titans_graph.__version__}\n"


def test_a_sound_spec_is_said_to_be_so(replace: Replace, capsys: Capture) -> None:
    seen: dict[str, Any] = {}

    def check(spec: str, **parameters: Any) -> list[Diagnostic]:
        seen.update(parameters)
        return [SlowLoop("slow")]

    replace("check", check)
    replace("compilation", build)
    replace("Model", lambda built: built)
    assert main(["check", "small", "--set", "dim=8", "vocabulary=300"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("small: sound; ")
    assert "5,108 parameters, 32 bytes of state" in shown.out
    assert "warning: slow" in shown.err
    assert seen == {"dim": 8, "vocabulary": 300}


def test_a_warning_is_told_once(capsys: Capture, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["check", "lmm", "--set", "network=linear", "hidden=32"]) == 0
    assert capsys.readouterr().err.count("override of parameter 'hidden' has no effect") == 1
    assert not caplog.messages


def test_mistakes_go_to_stderr_and_give_one(replace: Replace, capsys: Capture) -> None:
    replace("check", lambda spec: [TYPO])
    assert main(["check", "a.yaml"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "a.yaml:5:3: error: unknown component 'x'\n    5 |   use: x\n      |   ^\n  help: did you mean 'y'?\n"


def test_errors_print_without_a_traceback(replace: Replace, capsys: Capture) -> None:
    def fail(spec: str) -> None:
        raise SpecError([TYPO])

    replace("graph", fail)
    assert main(["show", "a.yaml"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("a.yaml:5:3: error: unknown")
    assert "Traceback" not in shown


@pytest.mark.parametrize(("pair", "message"), [("dim", "KEY=VALUE"), ("a b=1", "KEY=VALUE"), ("x={", "no value")])
def test_odd_settings_are_bad_usage(pair: str, message: str, capsys: Capture) -> None:
    assert main(["check", "mac", "--set", pair]) == 2
    assert message in capsys.readouterr().err


def test_settings_given_twice_are_bad_usage(capsys: Capture) -> None:
    assert main(["check", "mac", "--set", "dim=1", "--set", "dim=2"]) == 2
    assert "given twice" in capsys.readouterr().err


def test_train_generate_eval(quick_train: list[str], tmp_path: Path, text: Path, capsys: Capture) -> None:
    run = str(tmp_path / "run")
    assert main([*quick_train, "--set", "dim=10"]) == 0
    assert "step 4, " in capsys.readouterr().out
    generate = ["generate", run, "--prompt", "the é", "--tokens", "5", "--seed", "1"]
    assert main(generate) == 0
    first = capsys.readouterr().out
    assert first.startswith("the é")
    assert main(generate) == 0
    assert capsys.readouterr().out == first
    assert main(["eval", run, "--data", str(text), "--bytes", "60"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "bits per byte (one long stream, step 4, 60 bytes)" in shown[0]
    assert [line.split()[0] for line in shown[1:]] == sorted(
        ("unigram", "bigram", "gzip", "bzip2", "xz"), key=[line.split()[0] for line in shown[1:]].index
    )
    assert main(["eval", run, "--data", str(text), "--bytes", "60", "--restart", "8"]) == 0
    assert "fresh every 8 bytes" in capsys.readouterr().out


def test_a_run_goes_on_by_itself_and_refuses_another(quick_train: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert main(quick_train) == 0
    capsys.readouterr()
    assert main(quick_train) == 0
    assert "going on from step 4 of 4" in capsys.readouterr().err
    assert main([*quick_train, "--seed", "5"]) == 1
    assert "seed: 0 there, 5 here" in capsys.readouterr().err
    assert main([*quick_train, "--seed", "5", "--fresh"]) == 0
    assert "the earlier run is now" in capsys.readouterr().err
    assert (tmp_path / "run.1" / "run.json").is_file()


def test_ctrl_c_saves_and_gives_130(quick_train: list[str], tmp_path: Path, replace: Replace, capsys: Capture) -> None:
    from tests.training.test_loop import Stopping

    replace("load", lambda spec, **parameters: Stopping(2))
    assert main(quick_train) == 130
    assert "stopped after step 2 of 4; the same command goes on" in capsys.readouterr().err
    found = checkpoint.newest(tmp_path / "run", print)
    assert found is not None
    assert found.step == 2


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train", "small", "--data", "nowhere.txt"], 1, "no such file or folder"),
        (["train", "small", "--steps", "0"], 2, "steps: 0 is out of range"),
        (["generate", "nowhere"], 1, "no checkpoint here"),
        (["eval", "nowhere"], 1, "no checkpoint here"),
    ],
)
def test_what_cannot_be_found_is_named(
    arguments: list[str], status: int, message: str, replace: Replace, capsys: Capture
) -> None:
    replace("load", build)
    assert main(arguments) == status
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown


def test_demo(tmp_path: Path, text: Path, replace: Replace, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    from tests.training.data import quick

    replace("load", build)
    monkeypatch.setattr(demo, "MODELS", {"mac": {"dim": 8}, "transformer": {"dim": 8}})
    monkeypatch.setattr(demo, "CONFIG", quick(eval_restart=8))
    arguments = ["demo", "--data", str(text), "--out", str(tmp_path / "demo"), "--minutes", "0.001"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for part in (
        "bigram",
        "bzip2",
        "parameters",
        "loss.png",
        "README",
        "titans-graph show mac --set dim=8",
        "eval",
        "goes on after 'the quick '",
    ):
        assert part in shown
    assert main([*arguments, "--fresh"]) == 0
    assert (tmp_path / "demo" / "mac.1").is_dir()
    assert main(["demo", "--help"]) == 0
    assert f"(default: {demo.MINUTES:g})" in capsys.readouterr().out


def test_a_missing_extra_is_named(quick_train: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(quick_train) == 1
    assert "pip install 'titans-graph[train]'" in capsys.readouterr().err


def test_the_reader_may_go_away(tmp_path: Path) -> None:
    command = f"{sys.executable} -m titans_graph.cli train --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")


def test_starting_up_imports_nothing_heavy() -> None:
    program = "import sys, titans_graph.cli as c; c.main(['train', '--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "accelerate", "numpy", "matplotlib"} & set(done.stderr.split())


def test_drawings_and_schema(tmp_path: Path, replace: Replace, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    from titans_graph import spec, viz

    replace("graph", lambda source: f"graph of {source}")
    monkeypatch.setattr(viz, "mermaid", lambda graph: f"mermaid {graph}", raising=False)
    monkeypatch.setattr(viz, "dot", lambda graph: f"dot {graph}", raising=False)
    monkeypatch.setattr(spec, "schema", lambda: {"type": "object"}, raising=False)
    assert main(["draw", "mac"]) == 0
    assert capsys.readouterr().out == "mermaid graph of mac\n"
    path = tmp_path / "mac.dot"
    assert main(["draw", "mac", "--format", "dot", "--out", str(path)]) == 0
    assert path.read_text() == "dot graph of mac\n"
    assert main(["draw", "mac", "--out", str(tmp_path / "no" / "where")]) == 2
    capsys.readouterr()
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == {"type": "object"}


TINY = ["--set", "dim=16", "layers=1", "heads=2", "hidden=4", "segment=8", "chunk=4"]


def test_show_prints_the_graph_and_its_sizes(capsys: Capture) -> None:
    assert main(["show", "mac", *TINY]) == 0
    shown = capsys.readouterr().out
    assert "memory.neural" in shown
    assert "parameters, " in shown.splitlines()[-1]
    assert main(["show", "transformer", "--set", "dim=16", "layers=1"]) == 0
    assert "growing with every token" in capsys.readouterr().out


def test_show_passes_and_code(capsys: Capture) -> None:
    assert main(["show", "mac", "--passes", "--disable", "hoist", *TINY]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()][:3] == ["pass", "expand", "infer-shapes"]
    assert "left out" in next(line for line in shown.splitlines() if line.startswith("hoist"))
    assert main(["show", "mac", "--code", *TINY]) == 0
    assert "def layers_loop(" in capsys.readouterr().out


def test_show_after_a_pass(capsys: Capture) -> None:
    assert main(["show", "mac", "--after", "expand", *TINY]) == 0
    early = capsys.readouterr().out
    assert "# after expand" in early
    assert "layers.0.memory = memory.neural(" in early
    assert "program for" not in early
    assert main(["show", "mac", "--after", "schedule", *TINY]) == 0
    late = capsys.readouterr().out
    assert "loop every 8 tokens: " in late
    assert "layers.0.memory.open" in late
    assert "program for one token:" in late
    assert main(["show", "mac", "--after", "nonsense"]) == 2
    assert "unknown pass 'nonsense'" in capsys.readouterr().err


def test_check_of_a_file_with_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "typo.yaml"
    shipped = (ROOT / "specs" / "mac.yaml").read_text()
    path.write_text(shipped.replace("use: memory.neural", "use: memory.nueral"))
    program = "import sys, titans_graph.cli as c; s = c.main(sys.argv[1:]); print(*sys.modules); sys.exit(s)"
    command = [sys.executable, "-c", program, "check", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: unknown component 'memory.nueral'" in done.stderr
    assert "did you mean 'memory.neural'?" in done.stderr
    assert not {"accelerate", "matplotlib"} & set(done.stdout.split())


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_closed_pipe_gives_141(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom titans_graph import runtime\nfrom titans_graph.cli import main\n"
        "runtime.graph = lambda spec: 'x' * 10_000_000\n"
        "import titans_graph.viz as viz\nviz.mermaid = lambda graph: graph\nsys.exit(main(['draw', 'mac']))\n"
    )
    command = f'{sys.executable} -c "$0" | head -c 1 > {os.devnull}; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command, program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("141", "")
