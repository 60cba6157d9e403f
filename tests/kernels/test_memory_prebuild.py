"""Chunk bodies built by another process: found in the cache afterwards, and built here where that process fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from titans_graph.kernels import memory_compile, memory_prebuild
from titans_graph.kernels.memory_compile import ADVANCE, COMING, FORWARD, PULLBACK, Argument, Signature, body_of, compiled
from titans_graph.kernels.memory_ops import form_of
from titans_graph.kernels.memory_products import kept_width
from titans_graph.kernels.networks import parse_network

ROOT = Path(__file__).resolve().parents[2]
FORM = form_of(parse_network({"mlp": {"depth": 2, "hidden": 8}}).text(), "l2", "after", True)
WIDTH = kept_width(FORM.network, 3)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache on disk, nothing built and nothing asked for."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(memory_compile, "_COMPILED", {})
    monkeypatch.setattr(memory_prebuild, "_ASKED", set[Signature]())
    yield tmp_path
    COMING.clear()
    for child in memory_prebuild.CHILDREN:
        child.wait()


def tensors(arguments: list[Argument]) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype) for dtype, shape in arguments]


KINDS = (FORWARD, PULLBACK, ADVANCE)


def ask(*kinds: str) -> None:
    memory_prebuild.prebuild(FORM, kinds, 2, 4, 3, torch.float32)


def build_here() -> None:
    """Every body, as the operators build it."""
    inputs = memory_prebuild.arguments(FORM.network, 2, 4, 3, torch.float32)
    for kind in KINDS:
        form = memory_prebuild.form_for(FORM, kind)
        body = body_of(form, kind, len(inputs) // 2 - 3, kept=WIDTH > 0)
        compiled((form, kind), body, tensors(memory_prebuild.all_arguments(kind, inputs, WIDTH)))


SCRIPT = """
from torch._dynamo.utils import counters
import torch
from titans_graph.kernels import memory_prebuild
from titans_graph.kernels.memory_compile import COMING
from test_memory_prebuild import KINDS, ask, build_here
ask(*KINDS)
assert len(COMING) == 3
build_here()
assert not COMING
print(counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.nightly
def test_bodies_of_the_other_process_are_found(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True, capture_output=True, text=True)
    assert run.stdout == "3\n"
    assert len(list(tmp_path.glob("titans_graph-*"))) == 4


def test_where_the_other_process_fails_nobody_waits(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    ask(FORWARD, PULLBACK)
    assert len(COMING) == 2
    for wait in COMING.values():
        wait()
    assert not list(cache.glob("titans_graph-*"))


def test_nothing_is_asked_for_twice(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    ask(FORWARD)
    COMING.clear()
    ask(FORWARD)
    assert not COMING
    ask(FORWARD, PULLBACK)
    assert COMING
