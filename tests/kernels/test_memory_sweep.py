"""Several chunks in one call of a native body: the same numbers as a chunk at a time, whatever lies between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_memory_cases import GRADIENT_BAR, Case, assert_close, call, gradients, make
from titans_graph.kernels import memory_walk
from titans_graph.kernels.memory import memory_scan
from titans_graph.kernels.memory_products import kept_width
from titans_graph.kernels.memory_walk import Flags, Walk, pieces
from titans_graph.kernels.native import Native
from titans_graph.kernels.native_calls import Part, PerThread, run_parts, threads_for
from titans_graph.kernels.networks import parse_network

run_scan: Any = memory_scan  # Called with unpacked lists, which no checker follows.
MLP = {"mlp": {"hidden": 16, "activation": "gelu"}}


def all_of(
    case: Case, every: int | None, together: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], dict[int, list[int]]]:
    """All results and gradients of a case, and how many chunks went together, by the number of a body's results."""
    numbers: dict[int, list[int]] = {}
    made, called = Native.calls, Native.__call__

    def single(self: Native, *args: Any, **options: Any) -> list[Tensor]:
        numbers.setdefault(len(self.results), []).append(1)
        return called(self, *args, **options)

    def counted(self: Native, args: Any, out: Any, number: int, *, backward: bool = False) -> Part:
        numbers.setdefault(len(out), []).append(number)
        return made(self, args, out, number, backward=backward)

    monkeypatch.setattr(memory_walk, "TOGETHER", together)
    monkeypatch.setattr(Native, "calls", counted)
    monkeypatch.setattr(Native, "__call__", single)
    static = case.network, case.objective, case.read, case.chunk, case.bounded
    options = {"every": every, "kernel": "compiled"}
    y, *ends = run_scan(*static, *case.state.values(), *case.tokens.values(), case.valid, case.position, **options)
    results = [y, *(x for end in ends for x in end)]
    found = [*results, *gradients(case, results)]
    monkeypatch.setattr(Native, "calls", made)
    monkeypatch.setattr(Native, "__call__", called)
    return found, numbers


def plain(case: Case) -> None:
    """Every chunk is full."""


def restarting(case: Case) -> None:
    """One row begins a new sequence at the fourth chunk."""
    case.position[1] = (torch.arange(44) - 12) % 44


def all_restarting(case: Case) -> None:
    """All rows begin a new sequence at the sixth chunk."""
    case.position[:] = (torch.arange(44) - 20) % 44


def ragged(case: Case) -> None:
    """Rows end at different places: one inside the last chunk, one many chunks before."""
    case.valid[0, 42:] = False
    case.valid[1, 21:] = False


def resumed(case: Case) -> None:
    """One row goes on inside a chunk of an earlier call, the other begins a chunk of a later one."""
    case.position[0] = torch.arange(44) + 4
    case.valid[0, :2] = False
    case.position[1] = torch.arange(44) + 4
    case.valid[1, :8] = False


def apart(case: Case) -> None:
    """Heads lie side by side, as in a component."""
    for name in ("q", "k", "v"):
        case.tokens[name] = case.tokens[name].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


@pytest.mark.compile
@pytest.mark.parametrize(
    ("change", "every", "read", "rows"),
    [
        (plain, None, "after", 2),
        (plain, 3, "chunk", 2),
        (restarting, None, "before", 2),
        (restarting, 4, "after", 2),
        (restarting, 1, "after", 2),
        (all_restarting, None, "after", 2),
        (all_restarting, 4, "after", 2),
        (ragged, None, "after", 2),
        (ragged, 2, "after", 2),
        (resumed, None, "after", 2),
        (apart, None, "after", 2),
        (apart, 2, "after", 1),
    ],
)
def test_the_same_as_one_at_a_time(
    change: Any, every: int | None, read: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(MLP, read=read, slots=44, chunk=4, bounded=True, batch=rows, heads=2 if rows > 1 else 1)
    change(case)
    want, single = all_of(case, every, 1, monkeypatch)
    got, joined = all_of(case, every, 5, monkeypatch)
    forward, pullback = 7, 10
    assert {n for numbers in single.values() for n in numbers} == {1}
    # Between two checkpoints backward.
    assert 1 < max(joined[forward]) <= 5
    assert max(joined[pullback]) == 1 if every == 1 else 1 < max(joined[pullback]) <= 5
    # A chunk that began in an earlier call has a body of its own.
    assert (
        sum(joined[forward])
        == sum(joined[pullback])
        == sum(single[forward])
        == sum(single[pullback])
        == 11 - (change is resumed)
    )
    assert_close(got, want, 1e-13)
    truth = call(case, "reference")
    assert_close(got, [*truth, *gradients(case, truth)], GRADIENT_BAR)


@pytest.mark.compile
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_have_places_of_their_own(threads: int) -> None:
    case = make(MLP, slots=44, chunk=4, batch=3)
    truth = call(case, "reference")
    want = [*truth, *gradients(case, truth)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(5):
            got = call(case, "compiled")
            assert_close([*got, *gradients(case, got)], want, GRADIENT_BAR)
    finally:
        torch.set_num_threads(before)


@pytest.mark.compile
@pytest.mark.parametrize(("hidden", "bounded", "width"), [(4, False, 0), (16, False, 3), (4, True, 0), (16, True, 3)])
def test_without_gradients(hidden: int, bounded: bool, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoints: the state of a stretch goes to two places in turns, and the last of them is what comes out."""
    case = make({"mlp": {"hidden": hidden}}, slots=44, chunk=4, bounded=bounded)
    assert kept_width(parse_network(case.network), 3) == width
    static = case.network, case.objective, case.read, case.chunk, case.bounded
    found = []
    for together in (1, 4):
        monkeypatch.setattr(memory_walk, "TOGETHER", together)
        with torch.no_grad():
            y, *ends = run_scan(
                *static, *case.state.values(), *case.tokens.values(), case.valid, case.position, kernel="compiled"
            )
        found.append([y, *(x for end in ends for x in end)])
    assert_close(found[1], found[0], 1e-14)


def walk(*kinds: str) -> Walk:
    """A walk over chunks of these kinds, none of them computed: ``full``, ``restart``, ``late`` or ``part``."""
    made = object.__new__(Walk)
    none = torch.zeros(1, dtype=torch.bool)
    made.flags = [Flags(none, none, k != "late", k == "restart", k == "late", k != "part", all_restart=False) for k in kinds]
    return made


def test_which_chunks_go_together() -> None:
    it = walk("restart", "full", "full", "restart", "full", "part", "full", "late", "full", "full")
    assert [it.together(c) for c in range(10)] == [3, 2, 1, 2, 1, 1, 1, 1, 2, 1]
    assert [it.together(c, backward=True) for c in range(10)] == [1, 2, 3, 1, 2, 1, 1, 1, 1, 2]
    assert walk(*["full"] * 100).together(0) == memory_walk.TOGETHER


def test_pieces_are_views_where_rows_are_dense() -> None:
    x = torch.randn(2, 3, 12, 5)
    for i, part in enumerate(pieces(x, 4, 1, 2).unbind(0)):
        assert torch.equal(part, x[:, :, 4 + 4 * i : 8 + 4 * i].flatten(0, 1))
        assert part.data_ptr() == x[:, :, 4 + 4 * i :].data_ptr()
    for i, part in enumerate(pieces(x.mT.contiguous().mT, 4, 0, 3).unbind(0)):
        assert torch.equal(part, x[:, :, 4 * i : 4 + 4 * i].flatten(0, 1))
        assert part.stride()[1:] == (5, 1)


@pytest.fixture
def doubled() -> Native:
    """A body of one argument ``[N, 3, 4]``."""
    from titans_graph.kernels.native import native

    body = native(lambda a: [a * 2], [torch.zeros(1, 3, 4)])
    assert body is not None
    return body


@pytest.mark.compile
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_goes_through_all_calls(doubled: Native, threads: int) -> None:
    """Results of one are arguments of the next: of a place of the row, of one of the thread, and from the last to the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, out = torch.randn(5, 3, 4), torch.empty(2, 5, 3, 4)
        assert threads_for(5) == threads
        there = PerThread(torch.empty(threads, 3, 4))  # However many threads there are by the time of the call.
        steps = [doubled.calls([[x, there]], [[there, out[0]]], 2), doubled.calls([out[:1]], [out[1:]], 1)]
        run_parts(steps, 5)
        assert torch.equal(out[0], 4 * x)
        assert torch.equal(out[1], 8 * x)
        run_parts([doubled.calls([[there, x]], [[out[0], there]], 2, backward=True)], 5)
        assert torch.equal(out[0], 4 * x)
    finally:
        torch.set_num_threads(before)


@pytest.mark.compile
def test_calls_that_do_not_fit_are_refused(doubled: Native) -> None:
    x, y = torch.randn(2, 3, 4), torch.empty(2, 2, 3, 4)
    rows = x.mT.contiguous().mT
    given: list[list[Tensor | PerThread]] = [[x, rows], [x, PerThread(rows)]]
    for args in given:
        with pytest.raises(ValueError, match=r"needs rows with strides \(4, 1\); got \(1, 3\)"):
            doubled.calls([args], [y], 2)
    with pytest.raises(ValueError, match="strides"):
        doubled.calls([y.mT.contiguous().mT], [y], 2)
    with pytest.raises(ValueError, match="2 calls, and 1 places"):
        doubled.calls([[x]], [y], 2)
