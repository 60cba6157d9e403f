"""benchmarks/gpu.py without a GPU: every row's check at tiny sizes, in a process that has torch and triton alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from titans_graph.kernels.triton_config import importable

ROOT = Path(__file__).resolve().parents[1]

ALONE = """
import runpy, sys
for name in ("networkx", "yaml", "safetensors"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ALONE, str(ROOT / "benchmarks/gpu.py"), *arguments]
    environment = {**kept, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not importable(), reason="needs triton")
def test_every_check_passes_and_a_second_start_goes_on(tmp_path: Path) -> None:
    out = "--out", str(tmp_path), "--dry-run"
    first = run(*out, "--only", "peak", "linear_forward")
    assert first.returncode == 0, first.stderr
    log = tmp_path / "gpu.json"
    stamp = json.loads(log.read_text())["rows"]["linear_forward"]
    cut = run(*out, "--seconds", "-1")
    assert cut.returncode == 3, cut.stderr
    assert "time ran out before linear_training, deep256_forward" in cut.stdout
    content = json.loads(log.read_text())
    content["rows"]["peak"] |= {"failed": ["raised"], "errors": {"raised": 1.0}}
    log.write_text(json.dumps(content))
    done = run(*out)
    assert done.returncode == 0, done.stdout + done.stderr
    rows: dict[str, Any] = json.loads(log.read_text())["rows"]
    assert list(rows) == list(gpu.jobs())
    assert rows["linear_forward"] == stamp, "a finished row is not measured again"
    for key, row in rows.items():
        assert row["failed"] == []
        assert all(error < 1e-4 for error in row.get("errors", {}).values()), key
    assert sum("errors" in row for row in rows.values()) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["gpu.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: no GPU; --dry-run")
    assert not list(tmp_path.iterdir())


def test_a_row_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path), "--dry-run", "--only", "nothing")
    assert done.returncode == 2
    assert "no row 'nothing'; there are: peak, linear_forward" in done.stderr


def test_results_of_another_machine_are_not_gone_on_with(tmp_path: Path) -> None:
    about = {"device": "one"}
    log = gpu.Log(tmp_path, about, again=False)
    log.put("peak", {"failed": []})
    assert "peak" in gpu.Log(tmp_path, about, again=False)
    assert "peak" not in gpu.Log(tmp_path, about, again=True)
    assert "peak" not in gpu.Log(tmp_path, {"device": "two"}, again=False)
    (tmp_path / "gpu.json").write_text("{")
    assert "peak" not in gpu.Log(tmp_path, about, again=False)


def test_a_failed_check_and_what_raises_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(dry: bool) -> gpu.Result:
        raise RuntimeError("no room")

    result = gpu.attempted(broken, True)
    assert result["failed"] == ["raised"]
    assert "CHECK FAILED: raised inf" in gpu.line("deep", result, 0.0)
    assert "no room" in capsys.readouterr().err
    bad = {"title": "t", "failed": ["y"], "errors": {"y": 0.25, "d_q": 0.0}}
    assert gpu.line("deep", bad, 0.0).endswith("CHECK FAILED: y 0.25")


def test_a_gpu_that_answers_no_more_takes_no_other_row_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After an error inside a kernel every call fails: the rows behind it are left, and measured first the next time."""
    done: list[str] = []

    def job(key: str) -> gpu.Result:
        done.append(key)
        if key == "two":
            raise RuntimeError("an illegal memory access")
        return {"title": key, "failed": []}

    todo = {key: partial(lambda key, _: job(key), key) for key in ("one", "two", "three")}
    for answers, expected in ((False, ["one", "two"]), (True, ["three", "two"])):
        monkeypatch.setattr(gpu, "alive", lambda answers=answers: answers)
        done.clear()
        assert gpu.measure(todo, gpu.Log(tmp_path, {}, again=False), False, time.monotonic() + 60) == 1
        assert done == expected
        assert ("the GPU answers this process no more; not measured: three" in capsys.readouterr().out) is not answers


@pytest.mark.parametrize(
    ("value", "unit", "verdict"),
    [(0.3, "ms", "stretch met"), (0.5, "ms", "met"), (1.2, "ms", "MISSED by 2.00 x"), (0.6, "ms", "met")],
)
def test_times_are_at_most_the_target(value: float, unit: str, verdict: str) -> None:
    assert gpu.judged(value, unit, 0.6, 0.35, "")["verdict"] == verdict


def test_rates_are_at_least_the_target() -> None:
    assert [gpu.judged(v, "M/s", 60, 110, "")["verdict"] for v in (30, 60, 110)] == ["MISSED by 2.00 x", "met", "stretch met"]
    shown = gpu.line("deep", {"title": "t", "failed": [], "tflops": 80.0, **gpu.judged(60, "M/s", 60, 110, "none")}, 800.0)
    assert "60.000 M/s" in shown
    assert "10.0 %" in shown
    assert ">= 60 (110)" in shown
