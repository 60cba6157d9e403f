"""One model in several threads, each with states of its own: the same bits as alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import titans_graph as tg
from tests.models import MODELS, example, small
from titans_graph.training.generate import generate

PARTS = [9, 1, 1, 2, 7]
THREADS = 4
Job = Callable[[], list[Tensor]]


@pytest.fixture
def switch_often() -> Iterator[None]:
    """Threads give way to each other 500 times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def streaming(model: tg.Model, x: Tensor) -> list[Tensor]:
    """Outputs of calls on parts, and the last state."""
    outputs, state, at = [], None, 0
    with torch.no_grad():
        for n in PARTS:
            y, state = model(x[:, at : at + n], state)
            outputs.append(y)
            at += n
    assert state is not None
    return [*outputs, *(t for tensors in state.nodes.values() for t in tensors.values())]


def gradients(model: tg.Model, x: Tensor) -> list[Tensor]:
    """Of all parameters, without touching their ``grad``."""
    y, _ = model(x)
    return list(torch.autograd.grad(y.square().mean(), list(model.parameters())))


def jobs(model: tg.Model) -> list[Job]:
    """One for each thread: two stream, two differentiate, on inputs of their own."""
    inputs = [example(model, 2, sum(PARTS), seed=seed) for seed in range(THREADS)]
    return [
        (lambda x=x, way=way: way(model, x))  # type: ignore[misc]
        for x, way in zip(inputs, (streaming, gradients, streaming, gradients), strict=True)
    ]


def together(work: list[Job], times: int = 1) -> list[list[list[Tensor]]]:
    """The results of each job, ``times`` over, all threads starting at once."""
    start = threading.Barrier(len(work))

    def run(job: Job) -> list[list[Tensor]]:
        start.wait()
        return [job() for _ in range(times)]

    with ThreadPoolExecutor(len(work)) as pool:
        return [f.result() for f in [pool.submit(run, job) for job in work]]


def same(found: list[list[list[Tensor]]], alone: list[list[Tensor]]) -> bool:
    return all(
        len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
        for results, b in zip(found, alone, strict=True)
        for a in results
    )


@pytest.mark.parametrize("name", ["mac", "transformer", *(pytest.param(n, marks=pytest.mark.nightly) for n in MODELS)])
@pytest.mark.usefixtures("switch_often")
def test_eager(name: str) -> None:
    model = small(name, torch.float32)
    work = jobs(model)
    found = together(work, 3)
    assert same(found, [job() for job in work])


@pytest.mark.usefixtures("switch_often")
def test_generation() -> None:
    model = small("lmm", torch.float32, vocab=256)
    prompts = ["a", "the quick", "", "brown fox jumps"]

    def text(prompt: str, seed: int) -> str:
        return "".join(generate(model, prompt, tokens=20, seed=seed))

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(text, prompts, range(THREADS)))
    assert found == [text(prompt, seed) for seed, prompt in enumerate(prompts)]


@pytest.mark.usefixtures("switch_often")
def test_the_doctor_looks_at_its_own_call_alone() -> None:
    model = small("mac", torch.float32)
    x, other = example(model, 2, 20), example(model, 3, 31, seed=1)
    alone = tg.doctor(model, x).plain()
    done = threading.Event()

    def use() -> None:
        while not done.is_set():
            streaming(model, other)

    with ThreadPoolExecutor(1) as pool:
        using = pool.submit(use)
        try:
            found = [tg.doctor(model, x).plain() for _ in range(3)]
        finally:
            done.set()
        using.result()
    assert found == [alone] * 3
