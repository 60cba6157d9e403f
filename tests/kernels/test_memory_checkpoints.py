"""Checkpoints of a scan: where they lie, and that gradients do not depend on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.test_memory_cases import Case, assert_close, gradients, make
from titans_graph.errors import UsageError
from titans_graph.kernels.memory import memory_scan
from titans_graph.kernels.memory_checkpoints import EVERY, owned, slots, storage

run_scan: Any = memory_scan  # Called with unpacked lists, which no checker follows.


def call(case: Case, every: int | None, kernel: str = "auto") -> list[Tensor]:
    """All results of the case's scan with checkpoints ``every`` chunks."""
    static = case.network, case.objective, case.read, case.chunk, case.bounded
    options = {"every": every, "kernel": kernel}
    y, *ends = run_scan(*static, *case.state.values(), *case.tokens.values(), case.valid, case.position, **options)
    return [y, *(x for end in ends for x in end)]


@pytest.mark.parametrize("every", [1, 2, 3, 5, 9])
def test_gradients_do_not_depend_on_checkpoints(every: int) -> None:
    case = make({"mlp": {"hidden": 4}}, slots=20, chunk=4, bounded=True)
    case.position[1] = (torch.arange(20) - 8) % 20  # A row that restarts between two checkpoints.
    want = call(case, 4)
    assert_close(gradients(case, call(case, every)), gradients(case, want), 1e-12)


def test_many_chunks() -> None:
    """More than one checkpoint by default, and a last stretch that is shorter."""
    case = make({"mlp": {"hidden": 4}}, slots=4 * (2 * EVERY + 3), chunk=4)
    assert_close(gradients(case, call(case, None)), gradients(case, call(case, 1)), 1e-12)


@pytest.mark.compile
def test_far_fewer_than_chunks() -> None:
    """One checkpoint at the start costs no more places than there are chunks in a stretch."""
    case = make({"mlp": {"hidden": 4}}, slots=44, chunk=4)
    got = gradients(case, call(case, 10**9, "compiled"))
    assert_close(got, gradients(case, call(case, 1)), 1e-12)


@given(steps=st.integers(1, 40), every=st.integers(1, 12), rows=st.integers(0, 3))
def test_there_are_slots_enough(steps: int, every: int, rows: int) -> None:
    state = [torch.zeros(rows, 2, 3), torch.zeros(rows, 1)]
    flat = storage(steps, every, state)
    # No compiled region may take the number of checkpoints for a constant, as it does with sizes of 1.
    assert rows == 0 or all(x.numel() > 1 for x in flat)
    for slot, x in zip(slots(flat, steps, every, state), state, strict=True):
        assert slot.shape == (-(-steps // every), *x.shape)
        assert slot[(steps - 1) // every].shape == x.shape


def test_what_is_not_owned_is_copied() -> None:
    whole = torch.randn(4, 3)
    given = [whole, whole, torch.randn(2, 6)[:, :3], torch.randn(3, 4).mT, torch.randn(5)[:2]]
    got = owned(given)
    assert all(torch.equal(a, b) for a, b in zip(got, given, strict=True))
    assert all(x.is_contiguous() and x.untyped_storage().nbytes() == 4 * x.numel() for x in got)
    assert got[0] is whole
    assert len({x.untyped_storage().data_ptr() for x in got}) == len(got)


def test_spacings_below_one_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        call(make("linear"), 0)


def test_checkpoints_of_a_kernel_without_any_are_refused() -> None:
    """The token-by-token truth has none: what it cannot keep to is an error, not ignored."""
    with pytest.raises(UsageError, match=r"every=2 .* not of reference: take kernel='chunk' or 'compiled'"):
        call(make("linear"), 2, "reference")


def test_a_batch_without_rows() -> None:
    case = make("linear", batch=0)
    assert all(g.shape == x.shape for g, x in zip(gradients(case, call(case, None)), case.leaves(), strict=True))
