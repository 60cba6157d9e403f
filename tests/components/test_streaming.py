"""Every stateful component: any split equals the whole, documents do not see each other, empty slots do no harm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.components.cases import CASES, Case
from tests.components.harness import POISON, calls, close, document_starts, rowwise, stream

STORIES = [[13], [5, 8], [1, 1, 4, 7]]
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each
@pytest.mark.parametrize("cuts", [[6], [1, 2, 3], [4, 8, 12], [9, 10], list(range(1, 13))], ids=str)
def test_any_split_equals_the_whole(case: Case, cuts: list[int]) -> None:
    component, inputs = case.make(), case.inputs(3, 13)
    whole, _ = stream(component, inputs, calls(STORIES, (), case.period))
    parts, _ = stream(component, inputs, calls(STORIES, cuts, case.period))
    close(parts, whole)


@each
def test_rows_may_be_cut_at_different_places(case: Case) -> None:
    component, inputs = case.make(), case.inputs(3, 13)
    whole, _ = stream(component, inputs, calls(STORIES, (), case.period))
    cuts = [[2, 0, 5], [2, 7, 5], [3, 7, 6], [13, 8, 6]]
    parts, _ = stream(component, inputs, calls(STORIES, cuts, case.period))
    close(parts, whole)


@each
def test_packed_documents_equal_the_same_documents_alone(case: Case) -> None:
    component, inputs = case.make(), case.inputs(3, 13)
    packed, _ = stream(component, inputs, calls(STORIES, [7], case.period))
    for row, story in enumerate(STORIES):
        for first in sorted(set(document_starts(story))):
            length = document_starts(story).count(first)
            alone = {port: rowwise(value, row, first, first + length) for port, value in inputs.items()}
            close(
                packed[row : row + 1, first : first + length],
                stream(component, alone, calls([[length]], (), case.period))[0],
            )


@each
@pytest.mark.parametrize("slack", [0, 1, 2])
def test_empty_slots_do_no_harm(case: Case, slack: int) -> None:
    component, inputs = case.make(), case.inputs(3, 13)
    clean, _ = stream(component, inputs, calls(STORIES, (), case.period))
    grids = calls(STORIES, [[6, 3, 6], [7, 3, 6], [7, 4, 12]], case.period, slack)
    poisoned, _ = stream(component, inputs, grids, poison=POISON)
    close(poisoned, clean)


@each
def test_no_token_reads_a_later_one_or_another_row(case: Case) -> None:
    component, inputs = case.make(), case.inputs(3, 13)
    whole, _ = stream(component, inputs, calls(STORIES, (), case.period))
    changed = {port: _changed_from(value, 6) for port, value in inputs.items()}
    other, _ = stream(component, changed, calls(STORIES, (), case.period))
    close(other[:, :6], whole[:, :6])
    close(other[1:], whole[1:])
    assert (other[0, 6:] - whole[0, 6:]).abs().amax(-1).min() > 1e-6


def _changed_from(value: object, first: int) -> object:
    """The same inputs with row 0 shifted from token ``first`` on."""
    if isinstance(value, tuple):
        return tuple(_changed_from(piece, first) for piece in value)
    assert isinstance(value, torch.Tensor)
    if value.dim() < 3:
        return value
    changed = value.clone()
    changed[0, first:] += torch.randn_like(changed[0, first:])
    return changed


@each
def test_gradients_reach_every_parameter_and_agree_across_splits(case: Case) -> None:
    component, inputs = case.make(), case.inputs(3, 13)
    found = []
    for cuts in ([], [3, 4, 9]):
        component.zero_grad()
        out, _ = stream(component, inputs, calls(STORIES, cuts, case.period), poison=POISON)
        torch.autograd.backward(out.square().sum())
        grads = {name: tensor.grad.clone() for name, tensor in component.named_parameters()}
        unseen = {name for name, grad in grads.items() if not grad.abs().sum() > 0}
        assert unseen <= _without_effect(case), unseen
        found.append(grads)
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-8, atol=1e-8)


def _without_effect(case: Case) -> set[str]:
    """A query that sees one key alone has no say: softmax of one score is 1."""
    return {"query.weight"} if case.name in ("window-1", "segment-1") else set()


@each
def test_state_keeps_shape_and_type(case: Case) -> None:
    component, inputs = case.make(), case.inputs(3, 13)
    before = component.initial_state(3)
    _, after = stream(component, inputs, calls(STORIES, [5], case.period))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert (tensor.dtype, tensor.shape) == (before[name].dtype, before[name].shape)
        assert tensor.shape[0] == 3
        assert 0 not in tensor.shape


@each
@given(data=st.data())
def test_random_stories_and_cuts(case: Case, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    lengths = st.lists(st.integers(1, 9), min_size=1, max_size=4)
    stories = data.draw(st.lists(lengths, min_size=1, max_size=2), label="stories")
    total = max(sum(story) for story in stories)
    steps = data.draw(st.lists(st.integers(0, total), max_size=4).map(sorted), label="cuts")
    cuts = [[min(step, sum(story)) for story in stories] for step in steps]
    component, inputs = case.make(), case.inputs(len(stories), total)
    whole, _ = stream(component, inputs, calls(stories, (), case.period))
    slack = data.draw(st.integers(0, 1), label="slack")
    parts, _ = stream(component, inputs, calls(stories, cuts, case.period, slack), poison=POISON)
    close(parts, whole)
