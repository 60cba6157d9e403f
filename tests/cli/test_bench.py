"""``titans-graph bench memory``: its counts, its figures, and what it says of bad usage."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from titans_graph.bench import layer, memory, report
from titans_graph.bench.memory import Case
from titans_graph.bench.report import Figure, one_thread
from titans_graph.cli import main
from titans_graph.errors import UsageError

Capture = pytest.CaptureFixture[str]


def test_operations_are_those_of_the_formulas() -> None:
    """64 -> 256 -> 64 at chunk 64: 450.6 thousand forward, 1,359.9 thousand backward with recomputation."""
    assert memory.operations(Case()) == (450_560.0, 1_359_872.0)
    assert memory.operations(Case(dim=64, hidden=128)) == (237_568.0, 720_896.0)


def test_figures_say_whether_their_aim_is_met() -> None:
    assert Figure("a", 51, "%", at_least=50).text().endswith(">= 50     met")
    assert Figure("a", 5.6, "KB", at_most=5.5).text().endswith("<= 5.5    MISSED")
    assert Figure("a", 1, "s").met is None


def test_the_measured_call_is_the_memory() -> None:
    case = Case(heads=2, dim=4, hidden=6, chunk=4, kernel="chunk")
    inputs = memory.Inputs.make(case, 10)
    y, state = memory.forward(case, inputs)
    assert y.shape == (1, 2, 10, 4)
    assert state.phase == 2
    assert all(x.requires_grad for x in inputs.leaves())


def test_settings_are_put_back() -> None:
    threads = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
def test_peaks_are_those_of_the_process_itself() -> None:
    ballast = torch.ones(100_000_000)
    peak = memory.peak_memory(Case(heads=1, dim=4, hidden=4, chunk=4, kernel="chunk"), 8)
    assert peak < layer.resident("VmRSS") - 200_000_000
    assert ballast.sum() > 0


@linux
def test_a_call_of_a_layer_has_a_peak() -> None:
    run = layer.training(lambda x: (x * 2).square() * torch.ones(20_000, 1, 1), 8)
    run()
    assert layer.peak(run) > 0.9 * 20_000 * 8 * layer.DIM * 4


OTHER = """
import sys
if sys.argv[2] == "per-chunk":
    sys.exit("no such package")
print('hello\\nanswer: {"bytes": 3e6}', flush=True)
if sys.argv[2] == "default-compiled":
    sys.exit("out of memory")
for _ in sys.stdin:
    print("answer: 2.5", flush=True)
"""


@pytest.fixture
def other(tmp_path: Path) -> str:
    """A stand-in for an interpreter with titans-pytorch: always as fast as it says, and it knows one setting less."""
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}{OTHER}")
    script.chmod(0o755)
    return str(script)


def test_a_turn_is_as_many_calls_as_fill_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.4, 0.7, 1.2, 0.0, 5.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    calls: list[int] = []
    assert layer.turn(lambda: calls.append(1)) == pytest.approx(0.4)
    assert len(calls) == 3
    assert layer.turn(lambda: calls.append(1)) == 5.0
    assert len(calls) == 4


def test_two_layers_take_turns(other: str) -> None:
    with report.serving(other, "per-token", 8) as one, report.serving(other, "ours", 8) as two:
        assert [one.seconds(), two.seconds(), one.seconds()] == [2.5] * 3
        assert one.bytes == two.bytes == 3e6
    with (
        pytest.raises(UsageError, match=r"layer.py per-chunk 8 failed:\s+no such package"),
        report.serving(other, "per-chunk", 8),
    ):
        pass
    with (
        pytest.raises(UsageError, match=r"default-compiled 8 failed:\s+out of memory"),
        report.serving(other, "default-compiled", 8) as one,
    ):
        one.seconds()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "memory", "--only", "speed,size"], "--only size: the parts are"),
        (["bench", "memory", "--only", "peer"], "needs --peer PYTHON"),
        (["bench", "memory", "--only", "peer", "--peer", "/no/python"], "no such interpreter"),
    ],
)
def test_bad_usage(arguments: list[str], message: str, capsys: Capture) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.nightly
def test_it_runs(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "memory.json"
    assert main(["bench", "memory", "--quick", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())["figures"]
    assert {f["name"] for f in figures} >= {"forward", "forward + backward", "slowest length over fastest"}
    assert "forward, share of the products' rate" in capsys.readouterr().out
