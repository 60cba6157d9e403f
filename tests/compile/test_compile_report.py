"""Compiled models: no graph break, few variants, no recompile after warm-up, the same numbers as eager ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

import titans_graph as tg
from tests.models import BLOCKS, MODELS, example, small

pytestmark = [
    pytest.mark.compile,
    # torch.compile itself looks at .grad of region inputs.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
]

LENGTHS = (1, 7, 64, 65, 1000)


@pytest.fixture(autouse=True)
def _clean_compiler() -> Iterator[None]:
    """Every test counts its own compilations; what torch keeps per function is dropped."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_no_recompiles(name: str, *, training: bool) -> tg.Compiled:
    """Warm up, then run all lengths forth and back; everything equals the eager model and nothing is compiled anew."""
    model = small(name, torch.float32)
    fast = model.compile()
    report = fast.warm_up(2, training=training)
    assert report.breaks == 0
    per_function = 1 if training else 2
    assert all(len(r.variants) <= per_function for r in report.functions.values()), report.text()
    with torch.set_grad_enabled(training):
        for tokens in (*LENGTHS, *reversed(LENGTHS)):
            x = example(model, 2, tokens)
            want, state = model(x)
            got, fast_state = fast(x)
            assert (want - got).abs().max() < 1e-4
            again, _ = model(x, state)
            fast_again, _ = fast(x, fast_state)
            assert (again - fast_again).abs().max() < 1e-3
    assert fast.report().recompiles == 0, fast.report().text()
    return fast


@pytest.mark.parametrize("name", MODELS)
def test_no_recompiles_over_lengths(name: str) -> None:
    check_no_recompiles(name, training=False)


def test_training_compiles_each_region_once_with_equal_gradients() -> None:
    fast = check_no_recompiles("mac", training=True)
    model = small("mac", torch.float32)
    x = example(model, 2, 40)
    grads = []
    for m in (model, fast):
        m.zero_grad(set_to_none=True)
        m(x)[0].logsumexp(-1).mean().backward()
        grads.append({n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for n, g in grads[0].items():
        assert (g - grads[1][n]).norm() <= 1e-3 * max(1e-3, float(g.norm())), n


@pytest.mark.nightly
@pytest.mark.parametrize("name", [n for n in (*MODELS, *BLOCKS) if n != "mac"])
def test_training_regions_of_all_specs(name: str) -> None:
    check_no_recompiles(name, training=True)


@pytest.mark.nightly
@pytest.mark.parametrize("name", BLOCKS)
def test_no_recompiles_for_blocks(name: str) -> None:
    check_no_recompiles(name, training=False)


def test_functions_do_not_grow_with_layers() -> None:
    counts = [len(tg.load("mac", layers=n, dim=16, heads=2, hidden=4).compilation.lowered.codes) for n in (1, 2, 5)]
    assert all(a == b for a, b in itertools.pairwise(counts[1:]))
    assert counts[0] == counts[1]


def test_a_machine_without_compiler_runs_eagerly_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from titans_graph.runtime import compiled

    compiled._warn_once.cache_clear()
    monkeypatch.setattr(compiled, "compiler_works", lambda: False)
    model = small("lmm", torch.float32)
    with pytest.warns(UserWarning, match="runs uncompiled"):
        fast = model.compile()
    model.compile()
    x = example(model, 2, 20)
    assert torch.equal(fast(x)[0], model(x)[0])
    assert not fast.report().compiled


def test_the_reference_runs_as_it_is_between_compiled_regions() -> None:
    """Tracing it would write out every token, and fails on the text of a network's graph."""
    graph = {"nodes": {"a": {"use": "fast.linear", "size": 3}, "b": {"use": "tanh"}, "y": {"use": "fast.linear"}}}
    b = tg.Builder(dim=4)
    stream = b.input("x", ["B", "T", "dim"])
    b.output(b.add("memory.neural", stream, heads=1, chunk=2, network=graph, kernel="reference"))
    model = b.build()
    fast = model.compile()
    x = torch.randn(2, 5, 4)
    with torch.no_grad():
        assert (fast(x)[0] - model(x)[0]).abs().max() < 1e-6
    assert fast.report().variants == 0
