"""Checkpoints of a scan: the rule, and that gradients do not depend on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.test_memory_cases import Case, assert_close, gradients, make
from titans_graph.errors import UsageError
from titans_graph.kernels import memory_checkpoints
from titans_graph.kernels.memory import memory_scan
from titans_graph.kernels.memory_checkpoints import AUTOMATIC, ROOM, SPARE, WIDEST, slots, spacing

run_scan: Any = memory_scan  # Called with unpacked lists, which no checker follows.


def call(case: Case, every: int, kernel: str = "auto") -> list[Tensor]:
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


@pytest.mark.parametrize("room", [0, 2, 3, 5])
def test_the_rule_at_its_edges(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make({"mlp": {"hidden": 4}}, slots=20, chunk=4)
    size = sum(x.numel() * 8 for n in ("weights", "momenta") for x in case.state[n])
    monkeypatch.setattr(memory_checkpoints, "ROOM", room * size)
    assert spacing(5, AUTOMATIC, size) == {0: 4, 2: 4, 3: 2, 5: 1}[room]
    assert_close(gradients(case, call(case, AUTOMATIC)), gradients(case, call(case, 1)), 1e-12)


@given(steps=st.integers(1, 5000), size=st.integers(0, 2 * ROOM), every=st.sampled_from([AUTOMATIC, 1, 2, 3, 7]))
def test_there_are_slots_enough(steps: int, size: int, every: int) -> None:
    gap = spacing(steps, every, size)
    needed = -(-steps // gap)
    assert needed + SPARE <= slots(steps, every, size)
    if every == AUTOMATIC:
        assert gap == WIDEST or needed * size <= ROOM


def test_spacings_below_one_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        call(make("linear"), 0)


def test_checkpoints_of_a_kernel_without_any_are_refused() -> None:
    """The token-by-token truth has none: what it cannot keep to is an error, not ignored."""
    with pytest.raises(UsageError, match=r"every=2 .* not of reference: take kernel='chunk' or 'compiled'"):
        call(make("linear"), 2, "reference")


def test_a_batch_without_rows() -> None:
    case = make("linear", batch=0)
    assert all(g.shape == x.shape for g, x in zip(gradients(case, call(case, AUTOMATIC)), case.leaves(), strict=True))
