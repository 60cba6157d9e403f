"""Several chunks in one call of a native body: the same numbers as a chunk at a time, whatever lies between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_memory_cases import GRADIENT_BAR, Case, assert_close, call, gradients, make
from titans_graph.kernels import memory_walk
from titans_graph.kernels.memory import memory_scan
from titans_graph.kernels.memory_checkpoints import AUTOMATIC
from titans_graph.kernels.memory_compile import FORWARD, PULLBACK
from titans_graph.kernels.memory_products import kept_width
from titans_graph.kernels.memory_walk import Flags, Walk, pieces
from titans_graph.kernels.native import Native
from titans_graph.kernels.networks import parse_network

run_scan: Any = memory_scan  # Called with unpacked lists, which no checker follows.
MLP = {"mlp": {"hidden": 16, "activation": "gelu"}}


def all_of(case: Case, every: int, together: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[int]]:
    """All results and gradients of a case, and how many chunks every call of a body ran through."""
    calls: list[int] = []
    run = Native._call

    def counted(self: Native, args: Any, out: Any) -> None:
        calls.append(len(args))
        run(self, args, out)

    monkeypatch.setattr(memory_walk, "TOGETHER", together)
    monkeypatch.setattr(Native, "_call", counted)
    static = case.network, case.objective, case.read, case.chunk, case.bounded
    options = {"every": every, "kernel": "compiled"}
    y, *ends = run_scan(*static, *case.state.values(), *case.tokens.values(), case.valid, case.position, **options)
    results = [y, *(x for end in ends for x in end)]
    found = [*results, *gradients(case, results)]
    monkeypatch.setattr(Native, "_call", run)
    return found, calls


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
        (plain, AUTOMATIC, "after", 2),
        (plain, 3, "chunk", 2),
        (restarting, AUTOMATIC, "before", 2),
        (restarting, 4, "after", 2),
        (restarting, 1, "after", 2),
        (all_restarting, AUTOMATIC, "after", 2),
        (all_restarting, 4, "after", 2),
        (ragged, AUTOMATIC, "after", 2),
        (ragged, 2, "after", 2),
        (resumed, AUTOMATIC, "after", 2),
        (apart, AUTOMATIC, "after", 2),
        (apart, 2, "after", 1),
    ],
)
def test_the_same_as_one_at_a_time(change: Any, every: int, read: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(MLP, read=read, slots=44, chunk=4, bounded=True, batch=rows, heads=2 if rows > 1 else 1)
    change(case)
    want, single = all_of(case, every, 1, monkeypatch)
    got, joined = all_of(case, every, 5, monkeypatch)
    assert set(single) == {1}
    assert 1 < max(joined) <= 5
    assert sum(joined) == sum(single)
    assert_close(got, want, 1e-13)
    truth = call(case, "reference")
    assert_close(got, [*truth, *gradients(case, truth)], GRADIENT_BAR)


@pytest.mark.compile
@pytest.mark.parametrize(("hidden", "bounded", "width"), [(4, False, 0), (16, False, 13), (4, True, 0), (16, True, 13)])
def test_without_gradients(hidden: int, bounded: bool, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoints: the state of a stretch goes to two places in turns, and the last of them is what comes out."""
    case = make({"mlp": {"hidden": hidden}}, slots=44, chunk=4, bounded=bounded)
    assert kept_width(parse_network(case.network), 3, 4, "after") == width
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
    made._bodies = {(kind, False): object.__new__(Native) for kind in (FORWARD, PULLBACK)}
    return made


def test_which_chunks_go_together() -> None:
    it = walk("restart", "full", "full", "restart", "full", "part", "full", "late", "full", "full")
    assert [it.together(c, FORWARD) for c in range(10)] == [3, 2, 1, 2, 1, 1, 1, 1, 2, 1]
    assert [it.together(c, PULLBACK, backward=True) for c in range(10)] == [1, 2, 3, 1, 2, 1, 1, 1, 1, 2]
    assert walk(*["full"] * 100).together(0, FORWARD) == memory_walk.TOGETHER
    it._bodies = {}
    assert it.together(0, FORWARD) == 1


def test_pieces_are_views_where_rows_are_dense() -> None:
    x = torch.randn(2, 3, 12, 5)
    for i, part in enumerate(pieces(x, 4, 1, 2)):
        assert torch.equal(part, x[:, :, 4 + 4 * i : 8 + 4 * i].flatten(0, 1))
        assert part.data_ptr() == x[:, :, 4 + 4 * i :].data_ptr()
    for i, part in enumerate(pieces(x.mT.contiguous().mT, 4, 0, 3)):
        assert torch.equal(part, x[:, :, 4 * i : 4 + 4 * i].flatten(0, 1))
        assert part.stride()[1:] == (5, 1)


@pytest.mark.compile
def test_calls_that_do_not_fit_each_other_are_refused() -> None:
    from titans_graph.kernels.native import native

    x = torch.randn(2, 3, 4)
    body = native(lambda a: [a * 2], [x])
    assert body is not None
    out = torch.empty(2, 3, 4), torch.empty(2, 3, 4)
    body.sweep([[x], [out[0]]], [[out[0]], [out[1]]])
    assert torch.equal(out[1], 4 * x)
    wide = torch.empty(2, 6, 4)[:, :3]
    for args, results in (([x.mT.contiguous().mT], [out[0]]), ([x], [wide])):
        with pytest.raises(ValueError, match="as far apart as in the first"):
            body.sweep([[x], args], [[out[1]], results])
