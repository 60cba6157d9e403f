"""Threads that use compiled models, compile them, and warm them up at the same time: the same bits as alone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import titans_graph as tg
from tests.models import MODELS, example, small
from tests.runtime.test_threads import Job, jobs, same, together
from titans_graph.kernels.turns import Running
from titans_graph.runtime.compiled import compiler_works

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(not compiler_works(), reason="no C++ compiler"),
    # torch.compile itself looks at .grad of region inputs.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
]


def linear() -> tg.Model:
    """A model that is compiled quickly."""
    torch.manual_seed(0)
    b = tg.Builder(dim=8)
    x = b.input("x", ["B", "T", "dim"])
    b.output(b.add("add", x, b.add("memory.neural", x, heads=1, chunk=4, network="linear", conv=0).recall))
    model: tg.Model = b.build()
    return model


def compiled_in_threads(model: tg.Model, busy: tg.Model) -> None:
    """Four threads use a model that nobody has compiled yet, while a fifth warms up another one."""
    work = jobs(model)
    fast = model.compile()
    racing = jobs(fast)
    warm: Job = lambda: [torch.tensor(busy.compile().warm_up(2).recompiles)]  # noqa: E731
    *found, _ = together([*racing, warm])
    alone = [job() for job in racing]
    assert same(found, alone)
    assert same(together(racing, 3), alone)
    for a, b in zip(alone, [job() for job in work], strict=True):
        assert all(torch.allclose(s, t, atol=1e-4) for s, t in zip(a, b, strict=True))
    # Whole and single tokens without gradients, whole with: racing threads built nothing twice.
    assert all(len(r.variants) <= 2 for r in fast.report().functions.values())


def test_compiled_while_others_compile() -> None:
    compiled_in_threads(linear(), linear())


@pytest.mark.nightly
@pytest.mark.parametrize("name", MODELS)
def test_shipped_specs_compiled_while_others_compile(name: str) -> None:
    compiled_in_threads(small(name, torch.float32), small("lmm", torch.float32))


def test_a_compilation_that_finds_others_running_begins_again_alone() -> None:
    fast = linear().compile()
    x = example(fast, 2, 8)
    entered, leave = threading.Event(), threading.Event()

    def runner() -> None:
        with Running():
            entered.set()
            leave.wait()

    with ThreadPoolExecutor(2) as pool, torch.no_grad():
        running = pool.submit(runner)
        entered.wait()

        def call() -> Any:
            with torch.no_grad():
                return fast(x)[0]

        calling = pool.submit(call)
        time.sleep(0.5)
        assert not calling.done()
        assert fast.report().variants == 0
        leave.set()
        running.result()
        first = calling.result()
    with torch.no_grad():
        assert torch.equal(fast(x)[0], first)
    assert fast.report().variants == 1


def test_warming_up_keeps_gradients_that_are_being_collected() -> None:
    model = linear()
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    report = model.compile().warm_up(2, training=True)
    assert report.variants >= 1
    assert all(p.grad is not None and bool((p.grad == 3.0).all()) for p in model.parameters())
