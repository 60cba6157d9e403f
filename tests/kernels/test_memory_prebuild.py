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
from titans_graph.kernels.memory_compile import COMING, Argument, Body, Signature, compiled, fresh_body, pullback
from titans_graph.kernels.memory_ops import form_of

ROOT = Path(__file__).resolve().parents[2]
FORM = form_of("linear", "l2", "after", False)


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


def build_here(size: int) -> tuple[Body, Body]:
    inputs = memory_prebuild.arguments(FORM.network, 2, 4, size, torch.float32)
    first, second = memory_prebuild.forward_and_backward(inputs)
    body = fresh_body(FORM, 1)
    forward = compiled((FORM, None), body, tensors(first))
    return forward, compiled((FORM, len(inputs)), pullback(body, len(inputs)), tensors(second))


SCRIPT = """
from torch._dynamo.utils import counters
import torch
from titans_graph.kernels import memory_prebuild
from titans_graph.kernels.memory_compile import COMING
from test_memory_prebuild import FORM, build_here
memory_prebuild.prebuild(FORM, 2, 4, 3, torch.float32, backward=True)
assert len(COMING) == 2
build_here(3)
assert not COMING
print(counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.nightly
def test_bodies_of_the_other_process_are_found(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True, capture_output=True, text=True)
    assert run.stdout == "2\n"
    assert len(list(tmp_path.glob("titans_graph-*"))) == 3


def test_where_the_other_process_fails_nobody_waits(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    memory_prebuild.prebuild(FORM, 2, 4, 3, torch.float32, backward=True)
    assert len(COMING) == 2
    for wait in COMING.values():
        wait()
    assert not list(cache.glob("titans_graph-*"))


def test_nothing_is_asked_for_twice(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    memory_prebuild.prebuild(FORM, 2, 4, 3, torch.float32, backward=False)
    COMING.clear()
    memory_prebuild.prebuild(FORM, 2, 4, 3, torch.float32, backward=False)
    assert not COMING
    memory_prebuild.prebuild(FORM, 2, 4, 3, torch.float32, backward=True)
    assert COMING
