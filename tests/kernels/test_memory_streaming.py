"""Any split of the tokens over calls, down to one token, gives the whole: outputs, final states and gradients."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.test_memory_cases import STATE, Case, assert_close, call, gradients, make
from titans_graph.kernels.memory import memory_read, memory_scan, memory_step

# Called with unpacked lists, which no checker follows.
run_scan: Any = memory_scan
run_step: Any = memory_step


def laid_out(x: Tensor, lead: int, chunk: int, axis: int) -> Tensor:
    """The part ``x`` on a grid of whole chunks: ``lead`` slots on the left were filled by earlier calls."""
    length = x.shape[axis]
    size = -(-(lead + length) // chunk) * chunk
    shape = list(x.shape)
    shape[axis] = lead
    left = x.new_full(shape, 3)
    shape[axis] = size - lead - length
    return torch.cat([left, x, x.new_full(shape, 3)], axis)


def run_parts(case: Case, cuts: list[int], steps: bool = False) -> list[Tensor]:
    """The case's tokens in several calls cut at ``cuts``; with ``steps``, parts of one token go through memory_step."""
    total = case.valid.shape[1]
    edges = [0, *sorted(set(cuts)), total]
    state = [list(case.state[n]) for n in STATE]
    static = case.network, case.objective, case.read, case.chunk, case.bounded
    outputs = []
    for start, stop in pairwise(edges):
        if start == stop:
            continue
        tokens = [x[:, :, start:stop] for x in case.tokens.values()]
        position = torch.arange(start, stop).expand(case.valid.shape[0], -1)
        if steps and stop - start == 1:
            y, *ends = run_step(*static, *state, *tokens, torch.ones_like(position, dtype=torch.bool), position)
            outputs.append(y)
        else:
            lead = start % case.chunk
            grid = [laid_out(x, lead, case.chunk, 2) for x in tokens]
            valid = laid_out(torch.ones_like(position), lead, case.chunk, 1) == 1
            place = (start - lead + torch.arange(valid.shape[1])).expand_as(valid)
            y, *ends = run_scan(*static, *state, *grid, valid, place)
            outputs.append(y[:, :, lead : lead + stop - start])
        state = [*ends, *state[3:]]
    return [torch.cat(outputs, 2), *(x for values in state[:3] for x in values)]


SPLIT_CASES = [
    ("linear", "l2", "after", False),
    ({"mlp": {"hidden": 4}}, "l2", "before", True),
    ({"mlp": {"depth": 2, "hidden": 3, "residual": True}}, "dot", "chunk", False),
    ({"swiglu": {"hidden": 4}}, {"huber": {"delta": 0.5}}, "after", True),
    ("test_tied", "l2", "after", False),
]


@pytest.mark.parametrize(("network", "objective", "read", "bounded"), SPLIT_CASES)
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 12), max_size=5), steps=st.booleans())
def test_any_split_equals_the_whole(
    network: Any, objective: Any, read: str, bounded: bool, cuts: list[int], steps: bool
) -> None:
    case = make(network, objective, read, bounded=bounded)
    whole, parts = call(case), run_parts(case, cuts, steps)
    assert_close(parts, whole, 1e-12)
    assert_close(gradients(case, parts), gradients(case, whole), 1e-10)


@pytest.mark.parametrize(("network", "objective", "read", "bounded"), SPLIT_CASES)
def test_step_by_step_equals_the_whole(network: Any, objective: Any, read: str, bounded: bool) -> None:
    case = make(network, objective, read, bounded=bounded)
    whole, parts = call(case), run_parts(case, list(range(12)), steps=True)
    assert_close(parts, whole, 1e-12)
    assert_close(gradients(case, parts), gradients(case, whole), 1e-10)


def test_a_step_without_a_token_changes_nothing() -> None:
    case = make({"mlp": {"hidden": 4}}, slots=4)
    state = [case.state[n] for n in STATE]
    tokens = [x[:, :, :1] for x in case.tokens.values()]
    valid, position = torch.tensor([[True], [False]]), torch.tensor([[5], [0]])
    y, *ends = run_step(case.network, "l2", "after", 4, False, *state, *tokens, valid, position)
    assert not bool(y[1].any())
    for old, new in zip(state[:3], ends, strict=True):
        assert all(torch.equal(a[1], b[1]) for a, b in zip(old, new, strict=True))
    assert not torch.equal(ends[1][0][0], state[1][0][0])


@pytest.mark.parametrize("network", ["linear", {"mlp": {"hidden": 4}}, {"swiglu": {"hidden": 4}}])
def test_reading_is_the_scan_with_nothing_written(network: Any) -> None:
    case = make(network)
    case.tokens["step"] = torch.zeros_like(case.tokens["step"])
    case.tokens["log_keep"] = torch.zeros_like(case.tokens["step"])
    case.state["initial_momenta"] = [torch.zeros_like(x) for x in case.state["initial_momenta"]]
    read = memory_read(case.network, case.state["initial_weights"], case.tokens["q"])
    assert_close([read], [call(case)[0]], 1e-12)
