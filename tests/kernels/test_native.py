"""Chunk bodies as one C++ function: sums of products, the recorded program, its place in memory, and what falls back."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_memory_cases import assert_close
from tests.kernels.test_memory_products import arguments
from titans_graph.kernels import memory_compile, native, native_program
from titans_graph.kernels.memory_chunk import Form
from titans_graph.kernels.memory_compile import ADVANCE, FORWARD, PULLBACK, body_of, build
from titans_graph.kernels.memory_objectives import parse_objective
from titans_graph.kernels.memory_products import kept_width
from titans_graph.kernels.native import run_into
from titans_graph.kernels.native_graph import SUM
from titans_graph.kernels.native_program import Call, Program, RunningSum, Sum, Unsupported
from titans_graph.kernels.native_source import _Writer, source_of
from titans_graph.kernels.networks import parse_network

Body = Callable[..., Sequence[Tensor]]
aten, bmm = torch.ops.aten, torch.bmm

SIZES = [(1, 1, 1), (2, 3, 5), (6, 17, 64), (7, 65, 33), (13, 40, 1), (64, 1, 16), (64, 64, 256), (21, 100, 130), (4, 9, 48)]
SIZES += [(1, 7, 373), (1, 65, 33), (1, 256, 64), (1, 1, 20)]
"""Rows, inner size and columns: around every tile and every vector, the sizes of the usual memory, and single rows."""


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed), dtype=dtype)


def built(body: Body, args: Sequence[Tensor]) -> native.Native:
    made = build(body, args)
    assert isinstance(made, native.Native), "not built here"
    return made


def operations(graph: torch.fx.GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def products(*args: Tensor) -> list[Tensor]:
    """For every size: a product, one with each side transposed, and sums and differences of several."""
    results = []
    for a, b in zip(args[::2], args[1::2], strict=True):
        right, left = b.mT.contiguous().mT, a.mT.contiguous().mT
        results += [bmm(a, b), bmm(left, b), bmm(a, right), bmm(left, right)]
        results.append(bmm(2 * a, b) - bmm(left, right) - bmm(a * 0.5, b) + b.sum(1, keepdim=True))
        results.append(bmm(a, -b) - bmm(b.mT, a.mT).mT)
    return results


@pytest.mark.compile
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.float64, 1e-14)])
def test_sums_of_products(dtype: torch.dtype, bar: float) -> None:
    sides = [random(3, *shape, dtype=dtype) for m, k, n in SIZES for shape in ((m, k), (k, n))]
    assert_close(list(built(products, sides)(*sides)), products(*sides), bar)


def test_sums_are_gathered() -> None:
    a, b, c = random(1, 4, 5), random(1, 5, 6), random(1, 4, 6)

    def body(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
        twice = bmm(a, b)
        return [bmm(a, b) - (c - bmm(b.mT, a.mT).mT - bmm(-a, b)), twice * twice + twice]

    graph = native.gathered(body, [a, b, c])
    sums = [node for node in graph.graph.nodes if node.target is SUM]
    assert sorted(len(node.args[2]) for node in sums) == [1, 3]
    assert next(node.args[2] for node in sums if len(node.args[2]) == 3) == [1, 1, -1]
    assert not {aten.bmm.default, aten.neg.default} & set(operations(graph))
    assert_close(graph(a, b, c), body(a, b, c), 1e-14)


def filled(x: Tensor) -> Tensor:
    """Zeros until one column is set."""
    result = x.new_zeros(x.shape)
    result[..., 1] = x[..., 0]
    return result


@pytest.mark.parametrize(
    "body",
    [
        lambda a, b: [bmm(a, b) + bmm(a[:, :1], b)],  # a product broadcast over the rows of another
        lambda a, b: [bmm(a, b) + 1, torch.add(bmm(a, b), bmm(a, b), alpha=3)],
        lambda a, b: [bmm(a, b).mT + a[:, 0, 0]],  # transposed, and added to a number
        lambda a, b: [(s := bmm(a, b)) + s, s - s * s],
        lambda a, b: [bmm(a, b) - (bmm(a, b) + bmm(a, b)).mT.mT],
        lambda a, b: [bmm(b, b) + bmm(b, b).mT],  # both sides are one tensor
        lambda a, b: [bmm(a, b) + a.new_zeros(1, 4, 4), bmm(a, b) + a.new_zeros(1, 1, 4)],
        lambda a, b: [bmm(a, b) + ((a > 0) + (b > 0)), bmm(a, b) + (bmm(a.float(), b.float()) + bmm(b.float(), b.float()))],
        lambda a, b: [bmm(a, b) - filled(a), filled(b) - bmm(b, a)],
        lambda a, b: [bmm(x := a.clone(), b) + bmm(x.mul_(2), b)],
    ],
)
def test_gathering_changes_nothing(body: Body) -> None:
    a, b = random(1, 4, 4), random(1, 4, 4, seed=1)
    assert_close(list(native.gathered(body, [a, b])(a, b)), list(body(a, b)), 1e-14)


@pytest.mark.compile
def test_products_of_other_shapes() -> None:
    def body(a: Tensor, b: Tensor) -> list[Tensor]:
        table = (torch.arange(6.0).to(a) * torch.arange(3.0).to(a)[:, None]).cumsum(0)
        rows = torch.einsum("...d,...d->...", a, a)
        return [a @ b, (a @ b).sum(1) + table, rows, rows.sum(-1)[:, :1, None] * filled(a)[:, 0], (a[:, 1] * 2).cumsum(-2)]

    a, b = random(3, 2, 3, 5), random(3, 2, 5, 6)
    assert_close(list(built(body, [a, b])(a, b)), body(a, b), 1e-13)


NETWORKS: list[Any] = [
    pytest.param({"mlp": {"hidden": 8, "depth": 3, "activation": "gelu", "residual": True}}, "l2", "before", id="mlp"),
    pytest.param("linear", {"huber": {"delta": 0.3}}, "after", marks=pytest.mark.nightly, id="linear-huber"),
    pytest.param({"swiglu": {"hidden": 8}}, {"lp": {"p": 3}}, "chunk", marks=pytest.mark.nightly, id="swiglu-lp"),
    pytest.param({"lowrank": 1}, "dot", "after", marks=pytest.mark.nightly, id="lowrank-dot"),
]


@pytest.mark.compile
@pytest.mark.parametrize(("network", "objective", "read"), NETWORKS)
def test_bodies(network: Any, objective: Any, read: str) -> None:
    args, cotangents = arguments(network)
    form = Form(parse_network(network), parse_objective(objective), read, bounded=False)
    count = (len(args) - 7) // 2
    kept = kept_width(form.network, 3) > 0
    forward = body_of(form, FORWARD, count, kept=kept)
    results = list(forward(*args))
    assert_close(list(built(forward, args)(*args)), results, 1e-13)
    known = results[-1:] if kept else []
    for kind, given in (
        (PULLBACK, [*args, *known, *cotangents]),
        (ADVANCE, [*args[: 2 * count], *args[2 * count + 1 :], *known]),
    ):
        body = body_of(form, kind, count, kept=kept)
        assert_close(list(built(body, given)(*given)), list(body(*given)), 1e-13)


def small(a: Tensor, b: Tensor) -> list[Tensor]:
    """Results of one storage, one of them twice, and one whose rows are read column by column."""
    both = torch.stack([bmm(a, b), bmm(a, b).exp()], 1)
    return [both[:, 0], both[:, 1], both, bmm(a.mT, a), torch.where(a > 0, a, 0.0).cumsum(-2)]


@pytest.mark.compile
def test_rows_threads_and_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random(5, 6, 7), random(5, 7, 9)
    run = built(small, [a, b])
    assert_close(list(run(a, b)), small(a, b), 1e-14)
    for row in range(5):
        alone = run(a[row : row + 1], b[row : row + 1])
        assert all(torch.equal(x[0], y[row]) for x, y in zip(alone, run(a, b), strict=True))
    one = b[:1].expand(5, 7, 9)
    assert all(map(torch.equal, run(a.mT.contiguous().mT, one), run(a, one.contiguous())))
    for threads in (2, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert all(map(torch.equal, run(a, b), run(a, b)))
        assert_close(list(run(a, b)), small(a, b), 1e-14)


@pytest.mark.compile
@pytest.mark.parametrize("kind", [native.Native, None])
def test_results_go_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    monkeypatch.setattr(native, "_LOADED", {})
    a, b = random(3, 6, 7), random(3, 7, 9)
    body: Any = built(small, [a, b]) if kind else small
    want = small(a, b)
    wide = [torch.full((3, 4, *x.shape[1:]), torch.nan, dtype=x.dtype) for x in want]
    out = [None, *(x[:, 2] for x in wide[1:4])]
    got = run_into(body, [a, b], out)
    assert len(got) == len(want)
    assert_close(got, want, 1e-13)
    for target, result, around in zip(out[1:], got[1:], wide[1:], strict=False):
        assert target is result
        assert around[:, [0, 1, 3]].isnan().all()


@pytest.mark.compile
def test_threads_share_a_body() -> None:
    cases = [(random(4, 6, 7, seed=i), random(4, 7, 9, seed=i)) for i in range(4)]
    run = built(small, cases[0])
    want = [run(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(50):
            got = list(pool.map(lambda case: run(*case), cases))
            assert all(
                torch.equal(x, y) for mine, yours in zip(got, want, strict=True) for x, y in zip(mine, yours, strict=True)
            )


@pytest.mark.compile
def test_the_source_is_kept_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a, b = random(2, 3, 4), random(2, 4, 5)
    monkeypatch.setattr(native, "_place", lambda key: tmp_path / "sub" / f"{key}.json")
    write = native_program.written

    def again() -> native.Native:
        monkeypatch.setattr(native, "_LOADED", {})
        return built(small, [a, b])

    again()
    (kept,) = (tmp_path / "sub").iterdir()
    monkeypatch.setattr(native, "written", lambda *_: pytest.fail("written twice"))
    assert_close(list(again()(a, b)), small(a, b), 1e-14)
    text = kept.read_text()
    monkeypatch.setattr(native, "written", write)
    for damaged in (text[:-20], "[]", json.dumps({"text": ""})):
        kept.write_text(damaged)
        again()
        assert kept.read_text() == text
    monkeypatch.setattr(native, "_LOADED", {})
    built(small, [a.float(), b.float()])
    assert len(list((tmp_path / "sub").iterdir())) == 2


@pytest.mark.compile
def test_what_is_unknown_is_left_to_inductor(caplog: pytest.LogCaptureFixture) -> None:
    def body(a: Tensor) -> list[Tensor]:
        return [a.sort(-1).values, bmm(a, a.mT)]

    a = random(2, 3, 4)
    with caplog.at_level(logging.INFO, "titans_graph.kernels"):
        made = build(body, [a])
    assert not isinstance(made, native.Native)
    assert "no native body" in caplog.text
    assert_close(list(made(a)), body(a), 1e-14)


def test_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, flags = torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.bool)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for meant in ([wide, flags], [wide.double()]):
        assert native.worthwhile(meant)
    fewer = [wide[:3], flags[:3]]  # more than half of the threads would be idle
    for other in (fewer, [wide.bfloat16()], [wide, wide.double()], [wide, flags[:1]], [wide.to("meta")]):
        assert not native.worthwhile(other)


def test_other_threads_compile_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.async_compile import AsyncCompile

    theirs: list[str] = []
    mine: list[str] = []
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda self, kinds, text: theirs.append(text))
    compiler: Any = object.__new__(AsyncCompile)
    with native_program._kernels_taken_by(mine.append):
        other = threading.Thread(target=lambda: compiler.cpp_pybinding([], "theirs"))
        other.start()
        other.join()
        compiler.cpp_pybinding([], "mine")
    compiler.cpp_pybinding([], "after")
    assert (theirs, mine) == (["theirs", "after"], ["mine"])


@pytest.mark.compile
@pytest.mark.parametrize("save", [True, False])
def test_other_threads_write_as_ever(monkeypatch: pytest.MonkeyPatch, save: bool) -> None:
    from torch._inductor.graph import GraphLowering

    theirs: list[str] = []
    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(theirs.append) if save else None)

    def compiling(*_: Any, **__: Any) -> None:
        other = threading.Thread(target=lambda: call(GraphLowering.save_output_code, "theirs"))
        other.start()
        other.join()
        call(GraphLowering.save_output_code, "mine")

    failed: list[Exception] = []

    def call(function: Any, text: str) -> None:
        try:
            function(text)
        except Exception as problem:
            failed.append(problem)

    monkeypatch.setattr(torch._inductor, "compile", compiling)
    graph = native.gathered(lambda a: [a * 2], [random(1, 2, 2)])
    assert native_program.written(graph, [random(1, 2, 2)]) == "mine"
    assert not failed
    assert theirs == (["theirs"] if save else [])


def test_storages_that_live_at_once_lie_apart() -> None:
    program = Program(1, [(10, torch.float32)], kernels=['extern "C"  void  kernel()'])
    value = program.dense((1, 10), torch.float32)
    chain = [program.dense((1, 10 * n), torch.float64) for n in (1, 3, 2, 5, 1)]
    program.steps = [Call(0, (value, chain[0])), *(Call(0, pair) for pair in pairwise(chain))]
    program.steps.append(Call(0, (chain[-1], chain[1])))  # alive from the second step to the last
    program.results = (program.dense((1, 3), torch.float32),)
    writer = _Writer(program)
    life = {v.slot: [t for t, s in enumerate(program.steps) if v in s.values] for v in (value, *chain)}
    for a in life:
        for b in life:
            if a < b and life[a][0] <= life[b][-1] and life[b][0] <= life[a][-1]:
                apart = writer.at[a] + writer._bytes(a) <= writer.at[b] or writer.at[b] + writer._bytes(b) <= writer.at[a]
                assert apart, (a, b)
    assert writer.top < sum(map(writer._bytes, life))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p, x, y: p.steps.append(RunningSum(x._replace(stride=(12, 1, 4)), y)),
        lambda p, x, y: p.steps.append(Sum((x,), (x._replace(stride=(12, 3, 5)),), (1,), y)),
        lambda p, x, y: p.steps.append(Sum((x,), (y._replace(dtype=torch.float64),), (1,), y)),
        lambda p, x, y: p.steps.append(RunningSum(x._replace(size=(3, 2, 2, 1)), y)),
        lambda p, x, y: p.kernels.append("void other()"),
        lambda p, x, y: setattr(p, "results", (x._replace(stride=(12, 1, 3)),)),
    ],
)
def test_refused(wrong: Callable[[Program, Any, Any], None]) -> None:
    program = Program(0, [])
    x, y = program.dense((1, 3, 4), torch.float32), program.dense((1, 3, 4), torch.float32)
    program.results = (y,)
    wrong(program, x, y)
    with pytest.raises(Unsupported):
        source_of(program)


def test_the_choice_is_made_by_the_compiled_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing native body is no error; where nothing fits it is not even tried."""
    tried: list[int] = []
    monkeypatch.setattr(memory_compile, "native", lambda *_: tried.append(1))
    monkeypatch.setattr(memory_compile, "worthwhile", lambda args: False)
    monkeypatch.setattr(torch._inductor, "compile", lambda *_, **__: small)
    assert build(small, [random(1, 2, 2)] * 2) is small
    assert not tried
