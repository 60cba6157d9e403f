"""Float32 products as bfloat16 pieces on a matrix unit: how exact they are, what is packed, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_memory_cases import Case, call, make
from tests.kernels.test_native import SIZES, built, random
from titans_graph.kernels import memory_compile, native, native_pieces, native_source
from titans_graph.kernels.native_pieces import _Packing, available, in_pieces
from titans_graph.kernels.native_program import HEAD, Call, Pack, PackedSum, Program, RunningSum, Sum, Value

bmm = torch.bmm
needs_unit = pytest.mark.skipif(not available(), reason="this processor has no matrix unit (AMX)")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sum that can goes to the matrix unit, however small."""
    monkeypatch.setattr(_Packing, "_worthwhile", lambda self, step: True)
    monkeypatch.setattr(native, "_LOADED", {})
    monkeypatch.setattr(native, "_place", lambda key: None)


def single(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, dtype=torch.float32, seed=seed)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).detach().norm() / want.detach().norm())


def sums(*args: Tensor) -> list[Tensor]:
    """For every size: a product with either side transposed, and sums with signs of both kinds."""
    results = []
    for a, b in zip(args[::2], args[1::2], strict=True):
        left, right = (a * 2).mT.contiguous().mT, (b * 2).mT.contiguous().mT
        results += [bmm(a, b), bmm(left, b), bmm(a, right), bmm(left, right), -bmm(a, b)]
        results.append(bmm(a, b) - bmm(left, b) - bmm(a, right))
    return results


@needs_unit
@pytest.mark.compile
@pytest.mark.usefixtures("always")
def test_as_exact_as_float32() -> None:
    sides = [single(3, *shape) for m, k, n in [*SIZES, (65, 96, 31), (33, 32, 32)] for shape in ((m, k), (k, n))]
    got = built(sums, sides)(*sides)
    for mine, plain, exact in zip(got, sums(*sides), sums(*(x.double() for x in sides)), strict=True):
        assert error(mine, exact) < max(2e-7, 1.2 * error(plain, exact)), mine.shape


@needs_unit
@pytest.mark.compile
@pytest.mark.usefixtures("always")
def test_hard_numbers() -> None:
    """All bits of every entry count, sums cancel, sizes differ widely; and what is not finite spoils its own row alone."""

    def body(a: Tensor, b: Tensor) -> list[Tensor]:
        return [bmm(a, b)]

    a, b = single(1, 40, 64), single(1, 64, 48)
    run = built(body, [a, b])

    def check(a: Tensor, b: Tensor) -> None:
        # Relative to the products that are summed, as rounding is.
        largest = bmm(a.double().abs(), b.double().abs())
        assert ((run(a, b)[0].double() - bmm(a.double(), b.double())).abs() <= 4e-7 * largest + 1e-36).all()

    bits = torch.arange(40 * 64).view(1, 40, 64) * 6547 % (1 << 23)
    check((bits + (127 << 23)).int().view(torch.float32), b)
    check(torch.cat([a, -a * (1 + 2**-20)], 2)[:, :, 32:96], torch.cat([b, b], 1)[:, 32:96])
    check(a * torch.logspace(-30, 0, 64), b * torch.logspace(0, 30, 64)[:, None])
    small = a * 2**-102
    assert error(run(small, b)[0], bmm(small.double(), b.double())) < 2e-7
    check(a * 2**-114, b)
    for bad in (float("nan"), float("inf"), 3.4e38):
        wrong = a.clone()
        wrong[0, 3, 5] = bad
        got = run(wrong, b)[0]
        assert not got[0, 3].isfinite().any()
        assert got[0, torch.arange(40) != 3].isfinite().all()


@needs_unit
@pytest.mark.compile
def test_threads_each_have_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(a: Tensor, b: Tensor) -> list[Tensor]:
        return [bmm(a, b), bmm(a, b).exp()]

    a, b = single(5, 64, 64), single(5, 64, 128)
    run = built(body, [a, b])
    want = run(a, b)
    for threads in (2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert all(map(torch.equal, run(a, b), want))


@needs_unit
@pytest.mark.compile
def test_several_chunks_of_a_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory of the usual proportions: its bodies use the unit in every chunk of a call, and differ from float64 no more."""
    case = make({"mlp": {"hidden": 64}}, dim=32, chunk=32, slots=32 * 7, batch=1, heads=3)
    with torch.no_grad():
        case.tokens["step"] *= 1e-3  # Such weights are stable at that.
    texts: list[str] = []
    source_of = native_source.source_of

    def source(program: Program) -> Any:
        texts.append((made := source_of(program)).text)
        return made

    def found(case: Case, kernel: str) -> list[Tensor]:
        results = call(case, kernel)
        total = torch.stack([r.double().square().sum() for r in results]).sum()
        return [*results, *torch.autograd.grad(total, case.leaves(), allow_unused=True, materialize_grads=True)]

    monkeypatch.setattr(native, "source_of", source)
    monkeypatch.setattr(native, "_place", lambda key: None)
    rounded = case._replace(
        state={n: [x.detach().float().requires_grad_() for x in values] for n, values in case.state.items()},
        tokens={n: x.detach().float().requires_grad_() for n, x in case.tokens.items()},
    )
    want, errors = found(case, "chunk"), []
    for unit in (True, False):
        monkeypatch.setattr(native, "_LOADED", {})
        monkeypatch.setattr(memory_compile, "_COMPILED", {})
        monkeypatch.setattr(native_pieces, "available", lambda unit=unit: unit)
        errors.append([error(x, y) for x, y in zip(found(rounded, "compiled"), want, strict=True) if y.any()])
    assert ["sum_of_pieces" in text for text in texts] == [True] * 3 + [False] * 3
    assert max(errors[0]) < 1e-5
    assert sum(errors[0]) < 1.2 * sum(errors[1])


@needs_unit
@pytest.mark.compile
def test_a_process_uses_what_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that may not is not given what was written for one that may."""
    texts: list[str] = []
    source_of = native_source.source_of

    def source(program: Program) -> Any:
        texts.append((made := source_of(program)).text)
        return made

    monkeypatch.setattr(native, "_LOADED", {})
    monkeypatch.setattr(native, "_place", lambda key: None)
    monkeypatch.setattr(native, "source_of", source)
    a, b = single(1, 64, 64), single(1, 64, 256)

    def body(a: Tensor, b: Tensor) -> list[Tensor]:
        return [bmm(a, b)]

    built(body, [a, b])
    monkeypatch.setattr(native_pieces, "available", lambda: False)
    built(body, [a, b])
    assert ["sum_of_pieces" in text for text in texts] == [True, False]


@needs_unit
def test_it_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITANS_GRAPH_AMX", "0")
    assert not available.__wrapped__()
    monkeypatch.setenv("TITANS_GRAPH_AMX", "1")
    assert available.__wrapped__()


def program() -> tuple[Program, Value, Value, Value]:
    """A program without steps, with arguments ``a`` and ``w`` of 64 by 64 and ``b`` of 64 by 256."""
    p = Program(0, [], kernels=[f"{HEAD}const float* in_ptr0,\n float* out_ptr0)", f"{HEAD}float* in_out_ptr0)"])
    return p, p.dense((1, 64, 64), torch.float32), p.dense((1, 64, 64), torch.float32), p.dense((1, 64, 256), torch.float32)


def add(p: Program, left: list[Value], right: list[Value], signs: list[int]) -> Value:
    out = p.dense((1, left[0].size[1], right[0].size[2]), torch.float32)
    p.steps.append(Sum(tuple(left), tuple(right), tuple(signs), out))
    return out


def packs(p: Program) -> list[tuple[int, bool, bool]]:
    return [(s.x.slot, s.left, s.minus) for s in in_pieces(p).steps if isinstance(s, Pack)]


def test_what_several_sums_read_is_packed_once() -> None:
    p, a, w, b = program()
    y = add(p, [a], [b], [1])
    add(p, [w], [b], [1])
    add(p, [a, w], [y, b], [1, 1])
    assert packs(p) == [(a.slot, True, False), (b.slot, False, False), (w.slot, True, False), (y.slot, False, False)]
    made = in_pieces(p)
    assert [s.deep for s in made.steps if isinstance(s, PackedSum)] == [(2,), (2,), (2, 2)]
    assert len(p.steps) == 3, "the program that was given has changed"


@pytest.mark.parametrize("write", ["kernel", "in place", "unknown", "sum", "running sum"])
def test_what_was_written_since_is_packed_again(write: str) -> None:
    p, a, w, b = program()
    add(p, [a], [b], [1])
    steps: dict[str, Any] = {
        "kernel": Call(0, (a, b)),
        "in place": Call(1, (b,)),
        "unknown": Call(1, (b, a)),
        "sum": Sum((w,), (b,), (1,), b),
        "running sum": RunningSum(b, b),
    }
    p.steps.append(steps[write])
    add(p, [a], [b], [1])
    again = packs(p)[2:] if write != "sum" else packs(p)[3:]
    assert (b.slot, False, False) in again
    assert ((a.slot, True, False) in again) == (write == "unknown")


def test_signs_go_where_they_cost_nothing() -> None:
    p, a, w, b = program()
    add(p, [a, w], [b, b], [1, -1])  # b is read with its own sign as well
    add(p, [w], [b], [-1])
    assert packs(p) == [(a.slot, True, False), (b.slot, False, False), (w.slot, True, True)]
    p, a, w, b = program()
    add(p, [a], [b], [1])
    add(p, [a], [b], [-1])  # one of them twice
    assert len(packs(p)) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v._replace(dtype=torch.float64),
        lambda v: v._replace(size=(2, 64, 64)),
        lambda v: v._replace(stride=(4096, 130, 2)),
    ],
)
def test_what_the_unit_cannot_do_is_left_alone(change: Callable[[Value], Value]) -> None:
    p, a, _, b = program()
    step = Sum((change(a),), (b._replace(dtype=change(a).dtype),), (1,), p.dense((change(a).size[0], 64, 256), change(a).dtype))
    p.steps.append(step)
    assert in_pieces(p).steps == [step]


def test_small_products_are_not_worth_packing() -> None:
    p, a, _, b = program()
    rows = a._replace(size=(1, 4, 64))
    add(p, [rows], [b], [1])
    assert in_pieces(p).steps == p.steps
    for _ in range(3):
        add(p, [a], [b], [1])
    assert sum(isinstance(s, PackedSum) for s in in_pieces(p).steps) == 3
