"""Turns at building and running, hammered by many threads."""

from __future__ import annotations

import contextvars
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from titans_graph.kernels import turns
from titans_graph.kernels.turns import Building, OutOfTurn, Running


def test_nothing_runs_while_something_is_built() -> None:
    inside = {"running": 0, "building": 0}
    seen: list[tuple[int, int]] = []
    guard = threading.Lock()

    def note(kind: str, by: int) -> None:
        with guard:
            inside[kind] += by
            seen.append((inside["running"], inside["building"]))

    def work(seed: int) -> int:
        draw = random.Random(seed)
        refused = 0
        for _ in range(60):
            way = draw.randrange(4)
            if way == 0:
                with Running():
                    note("running", 1)
                    time.sleep(0)
                    note("running", -1)
            elif way == 1:
                with Building():
                    note("building", 1)
                    with Running(), Building():  # a turn within a turn
                        time.sleep(0)
                    note("building", -1)
            else:
                with Running():
                    note("running", 1)
                    note("running", -1)
                    try:
                        with Building(at_once=way == 3):
                            note("building", 1)
                            time.sleep(0)
                            note("building", -1)
                    except OutOfTurn:
                        refused += 1
                    note("running", 1)
                    note("running", -1)
        return refused

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert all(building <= 1 and not (running and building) for running, building in seen)
    assert (turns._running, turns._building, turns._waiting) == (0, False, 0)


@pytest.mark.parametrize("first", [True, False], ids=["began first", "began second"])
def test_a_turn_that_others_shared_is_none_for_building_at_once(first: bool) -> None:
    """What was found to need building beside others may have been found by mistake, though they are gone by now."""

    def other() -> None:
        with Running():
            pass

    def began_first() -> None:
        with Running():
            pool.submit(other).result()
            at_once()

    def began_second() -> None:
        entered, leave = threading.Event(), threading.Event()

        def stay() -> None:
            with Running():
                entered.set()
                leave.wait()

        staying = pool.submit(stay)
        entered.wait()
        with Running():
            leave.set()
            staying.result()
            at_once()

    def at_once() -> None:
        with Building(at_once=True):
            pass

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(OutOfTurn):
            began_first() if first else began_second()
        with Running():
            at_once()
    assert (turns._running, turns._building, turns._waiting) == (0, False, 0)


def test_a_turn_is_given_back_after_an_error() -> None:
    for turn in (Running, Building):
        with pytest.raises(KeyError), turn():
            raise KeyError
    with Running(), pytest.raises(KeyError), Building():
        raise KeyError
    assert (turns._running, turns._building, turns._waiting) == (0, False, 0)


def test_a_thread_that_is_waited_for_goes_on_in_the_turn_of_the_waiter() -> None:
    def build() -> str:
        with Building():
            return "built"

    for turn in (Running, Building):
        with turn(), ThreadPoolExecutor(1) as pool:
            assert pool.submit(contextvars.copy_context().run, build).result(timeout=60) == "built"
    assert (turns._running, turns._building, turns._waiting) == (0, False, 0)


def test_an_interrupted_wait_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        entered, leave = threading.Event(), threading.Event()

        def runner() -> None:
            with Running():
                entered.set()
                leave.wait()

        held = pool.submit(runner)
        entered.wait()
        with Running(), monkeypatch.context() as patch:
            patch.setattr(turns._CHANGED, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt), Building():
                pytest.fail("another thread runs")
            assert turns._running == 2
        leave.set()
        held.result()
    assert (turns._running, turns._building, turns._waiting) == (0, False, 0)
