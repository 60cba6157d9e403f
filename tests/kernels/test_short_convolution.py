"""The short convolution of a compiled region: its operator against tensor operations, in every shape it takes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.components.harness import close
from titans_graph.kernels import convolution, native_convolution
from titans_graph.kernels.convolution import convolution_op, short_convolution

native = pytest.mark.skipif(native_convolution.library(1) is None, reason="this machine has no C++ compiler")

SHAPES = {
    "usual": (2, 24, 4, 3, 32),
    "one head": (1, 9, 4, 1, 96),
    "columns that fill no vector": (3, 7, 4, 2, 19),
    "one column": (2, 5, 3, 2, 1),
    "blocks of columns": (2, 6, 2, 1, 150),
    "fewer tokens than taps": (2, 2, 7, 2, 16),
    "most taps": (1, 70, 64, 1, 5),
}
"""Batch, slots, taps, heads, size of a head."""


def arguments(case: str, dtype: torch.dtype, *, bias: bool) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """x, tail, weight, and a bias; position, lead and end as packed rows have them, at random."""
    batch, slots, taps, heads, size = SHAPES[case]
    g = torch.Generator().manual_seed(0)
    shapes = [(batch, slots, heads * size), (batch, taps - 1, heads * size), (heads * size, taps)]
    shapes += [(heads * size,)] if bias else []
    streams = [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]
    lead = torch.randint(0, slots + 1, (batch,), generator=g)
    end = torch.minimum(lead + torch.randint(0, slots + 1, (batch,), generator=g), torch.tensor(slots))
    return streams, (torch.randint(0, taps + 2, (batch, slots), generator=g), lead, end)


def results(run: Any, streams: Sequence[Tensor], rest: Sequence[Any]) -> list[Tensor]:
    """Both results, and the gradients of random sums of them."""
    ends = run(*streams, *[None] * (4 - len(streams)), *rest)
    g = torch.Generator().manual_seed(1)
    grads = torch.autograd.grad(ends, streams, [torch.randn(e.shape, generator=g, dtype=e.dtype) for e in ends])
    return [*ends, *grads]


@native
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("activated", "unit"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("case", SHAPES)
def test_the_operator_is_the_tensor_operations(case: str, activated: bool, unit: bool, bias: bool, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
            streams, clock = arguments(case, dtype, bias=bias)
            rest = [*clock, SHAPES[case][3], activated, unit]
            wanted = results(convolution._plain, streams, rest)
            for got, want in zip(results(convolution_op, streams, rest), wanted, strict=True):
                assert (got - want).abs().max() <= tolerance * max(1.0, float(want.detach().abs().max()))
    finally:
        torch.set_num_threads(before)


@native
def test_sums_over_many_tokens_are_exact() -> None:
    """A single-precision sum of all of them is wrong in the fifth digit, for weight and bias alike."""
    slots = 60_000
    g = torch.Generator().manual_seed(0)
    x, tail, weight, bias = (1 + torch.randn(s, generator=g) for s in ((1, slots, 3), (1, 1, 3), (3, 2), (3,)))
    clock = torch.full((1, slots), 5), torch.zeros(1, dtype=torch.int64), torch.full((1,), slots)
    found = []
    for dtype in (torch.float32, torch.float64):
        streams = [v.to(dtype).requires_grad_() for v in (x, tail, weight, bias)]
        y, _ = convolution_op(*streams, *clock, 1, False, False)
        found.append(torch.autograd.grad(y, streams, torch.full_like(y, 0.1))[2:])
    for got, want in zip(*found, strict=True):
        assert (got.double() - want).abs().max() <= 1e-6 * want.abs().max()


@native
def test_a_head_of_zeros_has_the_gradients_of_the_tensor_operations() -> None:
    x = torch.zeros(1, 5, 8, dtype=torch.float64)
    x[0, 2:] = 1e-13
    streams = [x.requires_grad_(), torch.zeros(1, 1, 8, dtype=x.dtype, requires_grad=True), torch.ones(8, 2, dtype=x.dtype)]
    streams[2].requires_grad_()
    clock = torch.arange(5)[None], torch.zeros(1, dtype=torch.int64), torch.full((1,), 5)
    rest = [*clock, 2, False, True]
    for got, want in zip(results(convolution_op, streams, rest), results(convolution._plain, streams, rest), strict=True):
        close(got, want)


@native
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_an_operator_of_torch(bias: bool) -> None:
    streams, clock = arguments("usual", torch.float64, bias=bias)
    torch.library.opcheck(convolution_op, (*streams, *[None] * (4 - len(streams)), *clock, 3, True, True))


@pytest.mark.parametrize("bias", [False, True])
def test_without_native_code_it_is_the_same(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_convolution, "compiler_available", lambda: False)
    streams, clock = arguments("columns that fill no vector", torch.float64, bias=bias)
    rest = [*clock, 2, True, True]
    for got, want in zip(results(convolution_op, streams, rest), results(convolution._plain, streams, rest), strict=True):
        close(got, want)


def test_more_taps_than_the_native_code_takes() -> None:
    assert native_convolution.library(native_convolution.MOST + 1) is None


def test_a_library_that_cannot_be_built_is_said_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native_convolution, "header", lambda name: "no C++")
    native_convolution._loaded.cache_clear()
    try:
        with caplog.at_level("INFO", "titans_graph.kernels"):
            assert native_convolution.library(4) is None
        assert "short convolution: no native code" in caplog.text
    finally:
        native_convolution._loaded.cache_clear()


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [1, 6])
def test_compiled_it_is_the_same(slots: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x, tail = (torch.randn(2, n, 6, generator=g).to(dtype).requires_grad_() for n in (slots, 3))
    weight = torch.randn(6, 4, generator=g).to(dtype).requires_grad_()
    position = torch.arange(slots).expand(2, slots) + torch.tensor([[0], [9]])
    lead, end = torch.tensor([0, slots // 2]), torch.full((2,), slots)
    clock = SimpleNamespace(valid=position >= 0, position=position, lead=lead, end=end, room=end)

    def loss(x: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
        y, after = short_convolution(x, tail, weight, None, clock, heads=2, activated=True, unit=True)
        assert y.dtype == after.dtype == dtype
        return (y * torch.arange(3.0, dtype=dtype)).sum() + after.sum()

    given = x, tail, weight
    want = torch.autograd.grad(loss(*given), given)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*given), given)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))
