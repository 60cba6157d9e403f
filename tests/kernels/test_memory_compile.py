"""The scan as an operator: registration, compiled regions, activation checkpointing, and the compiled bodies."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.test_memory_cases import STATE, Case, assert_close, call, gradients, make
from titans_graph.errors import UsageError
from titans_graph.kernels import memory_compile, memory_ops
from titans_graph.kernels.memory import memory_scan, memory_step

# Called with unpacked lists, which no checker follows.
run_scan: Any = memory_scan
run_step: Any = memory_step

NETWORK = {"mlp": {"hidden": 5}}


def inputs(case: Case) -> tuple[list[list[Tensor]], list[Tensor], Tensor, Tensor]:
    """The tensors of a case as a compiled function takes them."""
    return [case.state[n] for n in STATE], list(case.tokens.values()), case.valid, case.position


def test_operator_registration() -> None:
    case = make(NETWORK, slots=8)
    state, tokens, valid, position = inputs(case)
    # A row that goes on: where all begin, nothing is written to the first checkpoint, and its content is any.
    going_on = position + 4 * torch.arange(len(position))[:, None]
    args = (case.network, "l2", "after", 4, True, False, 2, *state, tokens, valid, going_on)
    found = torch.library.opcheck(memory_ops.scan_op, args)
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kernel", ["chunk", pytest.param("compiled", marks=pytest.mark.compile)])
def test_no_checkpoint_is_read_where_all_rows_begin(kernel: str) -> None:
    case = make(NETWORK, slots=16)
    state, tokens, valid, position = inputs(case)
    form, count = (case.network, "l2", "after", 4, False, kernel == "compiled", 2), len(state[0])
    with torch.no_grad():
        y, *ends = memory_ops.scan_op(*form, *state, tokens, valid, position)
        ends, saved = ends[: 3 * count], ends[3 * count :]
        cotangents = [torch.ones_like(x) for x in (y, *ends)]
        args = *form, state[0], *state[3:], tokens, valid, position
        want = memory_ops.backward_op(*args, saved, cotangents)
        weights = [*state[1], *state[2]]
        for kept, x in zip(saved, weights, strict=False):
            kept[: x.numel()] = torch.nan
        assert_close(memory_ops.backward_op(*args, saved, cotangents), want, 0.0)
        for kept, x in zip(saved, weights, strict=False):
            kept[x.numel() :] = torch.nan
        assert any(bool(x.isnan().any()) for x in memory_ops.backward_op(*args, saved, cotangents))


def test_activation_checkpointing() -> None:
    case = make(NETWORK, slots=8)
    plain = call(case)
    again: Any = torch.utils.checkpoint.checkpoint(lambda: call(case), use_reentrant=False)
    assert_close(again, plain, 1e-14)
    assert_close(gradients(case, again), gradients(case, plain), 1e-14)


def test_autocast_does_not_reach_the_memory() -> None:
    case = make(NETWORK)
    case = case._replace(
        state={n: [x.detach().float() for x in v] for n, v in case.state.items()},
        tokens={n: x.detach().float() for n, x in case.tokens.items()},
    )
    plain = call(case)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(call(case), plain, strict=True))


def test_backward_without_saving_is_an_error() -> None:
    case = make("linear")
    state, tokens, valid, position = inputs(case)
    result = memory_ops.scan_op(case.network, "l2", "after", 4, False, False, 0, *state, tokens, valid, position)
    with pytest.raises(UsageError, match="without gradients"):
        result[0].sum().backward()


def test_the_choice_of_kernel_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    memory_ops._announce.cache_clear()
    with caplog.at_level(logging.INFO, "titans_graph.kernels"):
        call(make("linear"))
        call(make("linear"))
        call(make("linear"), "reference")
    messages = [r.getMessage() for r in caplog.records]
    assert sum("kernel chunk" in m for m in messages) == 1
    assert sum("kernel reference" in m for m in messages) == 1


def test_without_a_compiler_bodies_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_compile, "compiler_available", lambda: False)
    monkeypatch.setattr(memory_compile, "build", lambda body, args: pytest.fail("built without a compiler"))
    case = make("linear", dim=2)
    assert_close(call(case, "compiled"), call(case), 1e-14)


def test_a_missing_compiler_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.cpp_builder as builder

    def missing() -> str:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(builder, "get_cpp_compiler", missing)
    assert not memory_compile.compiler_available.__wrapped__()


@pytest.mark.compile
def test_full_graph_with_any_number_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for all lengths of two chunks and more; the bodies themselves stay eager here."""
    monkeypatch.setattr(memory_compile, "compiler_available", lambda: False)
    graphs = CompileCounterWithBackend("aot_eager")

    def scan(state: list[list[Tensor]], tokens: list[Tensor], valid: Tensor, position: Tensor) -> list[Tensor]:
        doubled = [t * 2 for t in tokens[:3]] + tokens[3:]
        y, *ends = run_scan(network, "l2", "after", 4, True, *state, *doubled, valid, position)
        return [y, *(x for end in ends for x in end)]

    network = make(NETWORK).network
    fast = torch.compile(scan, fullgraph=True, backend=graphs, dynamic=True)
    for slots in (8, 12, 24, 40):
        case = make(NETWORK, slots=slots)
        got, want = fast(*inputs(case)), scan(*inputs(case))
        assert_close(got, want, 1e-12)
        assert_close(gradients(case, got), gradients(case, want), 1e-12)
    assert graphs.frame_count == 1


@pytest.mark.compile
def test_a_step_fuses_into_the_callers_region() -> None:
    case = make(NETWORK, slots=1, bounded=True)

    def step(state: list[list[Tensor]], tokens: list[Tensor], valid: Tensor, position: Tensor) -> list[Tensor]:
        y, *ends = run_step(case.network, "l2", "after", 4, True, *state, *tokens, valid, position)
        return [y, *(x for end in ends for x in end)]

    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = fast(*inputs(case)), call(case._replace(chunk=1), "reference")
    assert_close(got, want, 1e-12)
    assert_close(gradients(case, got), gradients(case, want), 1e-12)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_bodies_equal_eager_ones() -> None:
    memory_compile._COMPILED.clear()
    for slots in (8, 16):
        case = make("linear", slots=slots)
        got, want = call(case, "compiled"), call(case)
        assert_close(got, want, 1e-12)
        assert_close(gradients(case, got), gradients(case, want), 1e-12)
    assert len(memory_compile._COMPILED) == 3
