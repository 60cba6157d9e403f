"""The layout: every token has one slot, slots agree with positions, and pieces see what calls of their own would see."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from titans_graph.runtime.layout import LEAST_PERIODS, SMALLEST_ROOM, Layout, grid_layout, pieces, room_for, token_layout
from titans_graph.shapes import Clock


@dataclass(frozen=True)
class Call:
    """What a call of the layout is given: rows with histories of their own, perhaps with documents."""

    position: Tensor
    document: Tensor
    ids: Tensor | None
    tokens: int
    period: int

    def layout(self) -> Layout:
        return grid_layout(self.position, self.document, self.ids, self.tokens, self.period)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    rows, tokens, period = draw(st.integers(1, 3)), draw(st.integers(1, 24)), draw(st.integers(1, 6))
    position = draw(st.lists(st.integers(0, 20), min_size=rows, max_size=rows))
    document = [draw(st.integers(0, 2)) if p else -1 for p in position]
    ids = None
    if draw(st.booleans()):
        row = st.lists(st.integers(0, 2), min_size=tokens, max_size=tokens)
        ids = torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))
    return Call(torch.tensor(position), torch.tensor(document), ids, tokens, period)


def positions(call: Call) -> list[list[int]]:
    """The in-document position of every token, counted one by one."""
    counted = []
    for row in range(call.position.shape[0]):
        at, current = int(call.position[row]), int(call.document[row])
        line = []
        for t in range(call.tokens):
            number = current if call.ids is None else int(call.ids[row, t])
            at = 0 if number != current else at
            line.append(at)
            at, current = at + 1, number
        counted.append(line)
    return counted


def slots(call: Call, layout: Layout) -> Tensor:
    coincide = torch.arange(call.tokens).expand(call.position.shape[0], -1)
    return coincide if layout.slot is None else layout.slot


@given(calls())
def test_every_token_has_one_valid_slot_and_slots_keep_the_order(call: Call) -> None:
    layout = call.layout()
    slot, valid = slots(call, layout), layout.clock.valid
    assert valid.shape[1] % call.period == 0
    assert valid.shape[1] >= LEAST_PERIODS * call.period
    assert bool((slot.diff(dim=1) > 0).all())
    assert bool(valid.gather(1, slot).all())
    assert valid.sum(1).tolist() == [call.tokens] * valid.shape[0]
    assert layout.used == int(slot.max()) + 1


@given(calls())
def test_positions_count_on_in_each_document(call: Call) -> None:
    layout = call.layout()
    counted = positions(call)
    assert layout.clock.position.gather(1, slots(call, layout)).tolist() == counted
    assert layout.position.tolist() == [row[-1] + 1 for row in counted]
    last = call.document if call.ids is None else call.ids[:, -1]
    assert torch.equal(layout.document, last)


@given(calls())
def test_slots_agree_with_positions_and_documents_start_periods(call: Call) -> None:
    layout = call.layout()
    valid, position = layout.clock.valid, layout.clock.position
    slot = torch.arange(valid.shape[1]).expand_as(valid)
    assert bool(((slot - position) % call.period == 0)[valid].all())
    assert bool((slot[valid & (position == 0)] % call.period == 0).all())


@given(calls())
def test_lead_and_end_bound_what_a_call_fills(call: Call) -> None:
    layout = call.layout()
    slot, counted = slots(call, layout), torch.tensor(positions(call))
    assert torch.equal(layout.clock.lead, counted[:, 0] % call.period)
    assert torch.equal(layout.clock.lead, slot[:, 0])
    assert torch.equal(layout.clock.end, slot[:, -1] + 1)


@given(calls())
def test_collecting_what_was_spread_gives_it_back(call: Call) -> None:
    layout = call.layout()
    x = torch.arange(call.position.shape[0] * call.tokens * 2).view(-1, call.tokens, 2)
    assert torch.equal(layout.collect(layout.spread(x)), x)
    assert torch.equal(layout.collect(layout.spread(x[..., 0])), x[..., 0])


def part(clock: Clock, row: int, size: int) -> Clock:
    """The first ``size`` slots of one row."""
    one = slice(row, row + 1)
    return Clock(clock.valid[one, :size], clock.position[one, :size], clock.lead[one], clock.end[one], clock.room)


def same_clock(a: Clock, b: Clock) -> None:
    assert torch.equal(a.valid, b.valid)
    assert torch.equal(a.lead, b.lead)
    assert torch.equal(a.end, b.end)
    assert torch.equal(a.position[a.valid], b.position[b.valid])


@given(calls(), st.data())
def test_pieces_see_what_calls_of_their_own_would_see(call: Call, data: st.DataObject) -> None:
    """A piece holds tokens of one document; a separate call of those tokens gives the same clock.

    Pieces may be shorter than the period (segments that divide a longer chunk), so the first of them may lie before ``lead``.
    """
    size = data.draw(st.sampled_from([n for n in range(1, call.period + 1) if call.period % n == 0]), label="size")
    layout = call.layout()
    slot, counted = slots(call, layout), positions(call)
    made = pieces(layout.clock, size, layout.used)
    assert len(made) == -(-layout.used // size)
    for n, piece in enumerate(made):
        for row, line in enumerate(counted):
            inside = [t for t in range(call.tokens) if int(slot[row, t]) // size == n]
            own = part(piece, row, size)
            if not inside:
                filled = min(max(int(slot[row, 0]) - n * size, 0), size)
                assert not own.valid.any()
                assert int(own.end) == int(own.lead) == filled
                continue
            start = torch.tensor([line[inside[0]]])
            alone = grid_layout(start, torch.tensor([0]), None, len(inside), size).clock
            same_clock(own, part(alone, 0, size))


@given(calls())
def test_a_single_token_stands_as_the_grid_would_place_it(call: Call) -> None:
    ids = None if call.ids is None else call.ids[:, :1]
    token = token_layout(call.position, call.document, ids)
    grid = grid_layout(call.position, call.document, ids, 1, call.period)
    assert torch.equal(token.clock.position[:, 0], grid.clock.position[grid.clock.valid])
    assert torch.equal(token.position, grid.position)
    assert torch.equal(token.document, grid.document)
    assert torch.equal(token.clock.room, grid.clock.room)
    assert token.clock.valid.all()


@given(st.lists(st.integers(0, 1 << 20), max_size=4))
def test_room_is_the_next_power_of_two(lengths: list[int]) -> None:
    room, longest = room_for(torch.tensor(lengths, dtype=torch.int64)), max(lengths, default=0)
    assert room.bit_count() == 1
    assert room >= max(longest, SMALLEST_ROOM)
    assert room == SMALLEST_ROOM or room < 2 * longest


@pytest.mark.parametrize(("length", "room"), [(0, 16), (16, 16), (17, 32), (32, 32), (1000, 1024), (1025, 2048)])
def test_room_at_its_borders(length: int, room: int) -> None:
    assert room_for(torch.tensor([length])) == room


def test_documents_of_one_row_worked_by_hand() -> None:
    """Three tokens on from position 3, then a document of two, in periods of four slots."""
    layout = grid_layout(torch.tensor([3]), torch.tensor([7]), torch.tensor([[7, 7, 7, 9, 9]]), 5, 4)
    valid = [int(v) for v in layout.clock.valid[0]]
    assert valid == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0]
    assert layout.slot is not None
    assert layout.slot.tolist() == [[3, 4, 5, 8, 9]]
    assert layout.clock.position[0, [3, 4, 5, 8, 9]].tolist() == [3, 4, 5, 0, 1]
    assert (layout.position.item(), layout.document.item(), layout.used) == (2, 9, 10)
    assert (layout.clock.lead.item(), layout.clock.end.item()) == (3, 10)
