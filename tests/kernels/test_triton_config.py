"""Configurations of the Triton kernels: what is looked up where, what a file may say, what the autotuner remembers."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from titans_graph.errors import UsageError
from titans_graph.kernels import triton_config, triton_tune
from titans_graph.kernels.triton_config import ARCHS, CONFIG_FILE, Config, Rule, Sizes, config, default, override, table_arch

ROOT = Path(__file__).resolve().parents[2]
SIZES = Sizes(chunk=64, dim=64, hidden=256, activation="silu")


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """Write a file of rules and name it in the environment."""

    def write(entries: object) -> None:
        path = tmp_path / "rules.json"
        path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
        monkeypatch.setenv(CONFIG_FILE, str(path))
        triton_config._read_rules.cache_clear()

    monkeypatch.setattr(triton_config, "kernels", lambda: {"scan": None, "read": None})
    return write


def test_every_field_comes_from_the_first_rule_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (
        Rule("scan", "sm_90", {"hidden": 256}, {"tile": 64}),
        Rule("scan", config={"num_warps": 8, "tile": 16}),
        Rule(config={"num_warps": 4, "num_stages": 3, "tile": 32}),
    )
    monkeypatch.setattr("titans_graph.kernels.triton_table.TABLE", table)
    triton_config._default.cache_clear()
    try:
        assert default("scan", SIZES, "sm_90") == Config(8, 3, 64)
        assert default("scan", SIZES, "sm_80") == Config(8, 3, 16)
        assert default("read", SIZES, "sm_90") == Config(4, 3, 32)
    finally:
        triton_config._default.cache_clear()


@pytest.mark.parametrize(
    ("arch", "taken"),
    [
        *(("sm_80", "sm_80"), ("sm_86", "sm_80"), ("sm_90", "sm_90"), ("sm_100", "sm_100"), ("sm_103", "sm_100")),
        *(("sm_120", "sm_80"), ("gfx942", "gfx942"), ("gfx950", "gfx942")),
    ],
)
def test_other_architectures_take_the_nearest(arch: str, taken: str) -> None:
    assert table_arch(arch) == taken
    assert taken in ARCHS


def test_an_override_holds_inside_its_block(rules: Callable[[object], None], caplog: pytest.LogCaptureFixture) -> None:
    triton_config._announce.cache_clear()
    rules([{"kernel": "scan", "sizes": {"dim": 64}, "config": {"tile": 128}}])
    with caplog.at_level(logging.INFO, "titans_graph.kernels"):
        assert config("scan", SIZES, "sm_90").tile == 128
        with override("scan", Config(2, 1, 16), hidden=256):
            assert config("scan", SIZES, "sm_90") == Config(2, 1, 16)
            assert config("scan", SIZES, "sm_90") == Config(2, 1, 16)
            assert config("scan", Sizes(64, 64), "sm_90").tile == 128
        assert config("scan", SIZES, "sm_90").tile == 128
    said = [record.message for record in caplog.records if "kernel scan" in record.message]
    assert len(said) == 3, "each choice is logged once"


def test_a_file_fits_by_architecture_and_sizes(rules: Callable[[object], None]) -> None:
    rules([
        {"kernel": "scan", "arch": "sm_80", "config": {"num_warps": 2}},
        {"sizes": {"dim": 128}, "config": {"num_stages": 5}},
    ])  # fmt: skip
    assert config("scan", SIZES, "sm_80").num_warps == 2
    assert config("scan", SIZES, "sm_90") == default("scan", SIZES, "sm_90")
    assert config("read", Sizes(64, 128), "sm_90").num_stages == 5


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[", "cannot be read as JSON"),
        ({}, "must hold a list"),
        ([3], "rule 1: a rule is an object"),
        ([{"kernle": "scan"}], "did you mean 'kernel'"),
        ([{}, {"kernel": "scna"}], "rule 2: no kernel 'scna'; did you mean 'scan'"),
        ([{"sizes": {"dims": 3}}], "did you mean 'dim'"),
        ([{"config": {"warps": 3}}], "unknown key 'warps'"),
        ([{"config": 3}], "sizes and config are objects"),
        ([{"config": {"num_warps": 3}}], "num_warps must be a power of 2; got 3"),
        ([{"config": {"num_warps": 0}}], "num_warps must be a power of 2; got 0"),
        ([{"config": {"num_stages": 0}}], "num_stages must be 1 or more; got 0"),
        ([{"config": {"tile": "32"}}], "tile must be a power of 2 or 0; got '32'"),
    ],
)
def test_a_wrong_file_is_refused(rules: Callable[[object], None], entries: object, message: str) -> None:
    rules(entries)
    with pytest.raises(UsageError, match=message):
        config("scan", SIZES, "sm_90")


def test_a_missing_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_FILE, "nowhere.json")
    with pytest.raises(UsageError, match=r"nowhere\.json cannot be read"):
        config("scan", SIZES, "sm_90")


def test_measured_configurations_are_kept_and_damage_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(triton_tune.CACHE, str(tmp_path / "deep"))
    triton_tune.remember("one", Config(8, 1, 64), 0.5)
    triton_tune.remember("two", Config(4, 2, 32), 0.25)
    name = str(triton_tune.cache_file())
    assert triton_tune._remembered(name) == {"one": Config(8, 1, 64), "two": Config(4, 2, 32)}
    assert [p.name for p in Path(name).parent.iterdir()] == [Path(name).name], "no part of a file is left behind"
    Path(name).write_text("{")
    triton_tune._remembered.cache_clear()
    assert triton_tune._remembered(name) == {}
    assert "written anew" in caplog.text
    triton_tune.remember("three", Config(), 1.0)
    assert triton_tune._remembered(name) == {"three": Config()}


def test_tuning_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(triton_tune.AUTOTUNE, raising=False)
    assert not triton_tune.enabled()
    with triton_tune.autotune():
        assert triton_tune.enabled()
        with triton_tune.autotune(False):
            assert not triton_tune.enabled()
    monkeypatch.setenv(triton_tune.AUTOTUNE, "1")
    assert triton_tune.enabled()


def test_the_tables_choice_is_measured_first() -> None:
    start = Config(8, 1, 64)
    tried = triton_tune.candidates(start, SIZES)
    assert tried[0] == start
    assert len(set(tried)) == len(tried) > 6
    assert all(c.tile == 0 for c in triton_tune.candidates(Config(4, 2, 0), SIZES))


@pytest.mark.skipif(not triton_config.importable(), reason="needs triton")
@pytest.mark.parametrize("interpret", ["0", "1"])
def test_kernel_files_import_in_both_modes(interpret: str) -> None:
    """Compiled functions or interpreted ones, and nothing else of the project is needed."""
    program = """
import sys
for name in ("networkx", "yaml", "safetensors"):
    sys.modules[name] = None
from titans_graph.kernels import triton_config
names = list(triton_config.kernels())
kinds = {type(k.function).__name__ for k in triton_config.kernels().values()}
print(bool(triton_config.available()), kinds <= {sys.argv[1]})
"""
    kind = "InterpretedFunction" if interpret == "1" else "JITFunction"
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    command = [sys.executable, "-c", program, kind]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    can_run = interpret == "1" or torch.cuda.is_available()
    assert done.stdout.split() == [str(can_run), "True"]


def test_without_triton_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not triton_config.available()
    assert triton_config.available().why == "triton is not installed"
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no GPU" in triton_config.available().why
