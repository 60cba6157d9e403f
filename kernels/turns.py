"""Turns at building and running compiled code: many threads may run, one alone may build.

While torch traces a graph, in whichever thread, it replaces ``Module.__call__`` and sets a flag for the whole process: a
compiled function that is called meanwhile in another thread raises an error, and one that Dynamo traces meanwhile gets guards
that never hold again. So building waits until nothing compiled runs, and what is compiled waits until nothing is built. Eager
code needs no turn: what is replaced passes its calls on.

A turn belongs to a context (:mod:`contextvars`), not to a thread, so that work handed to another thread goes on in the turn
of the one that waits for it.

What Dynamo keeps to see whether compiled code fits a call is not made for threads either: now and then code that fits is
said not to where others run at the same time. So nothing is built in a turn that others shared (:class:`OutOfTurn`): the call
begins again alone, and then finds the code that is there.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar, Token
from types import TracebackType

_TURN: ContextVar[str] = ContextVar("titans_graph_turn", default="")
_LOCK = threading.Lock()  # taken itself where nothing is waited for: a third of the time
_CHANGED = threading.Condition(_LOCK)
_BEGAN: ContextVar[int] = ContextVar("titans_graph_turn_began", default=-1)
"""``_shared`` when a turn at running began, -1 where it began beside others."""
_running = 0
_shared = 0  # turns at running that began while others ran
_building = False
_waiting = 0


class Running:
    """Context manager: a turn at running compiled code; inside another turn nothing changes."""

    def __enter__(self) -> None:
        global _running, _shared
        self.token: Token[str] | None = None
        if _TURN.get():
            return
        with _LOCK:
            while _building or _waiting:
                _CHANGED.wait()
            _running += 1
            _shared += _running > 1
            began = _shared if _running == 1 else -1
        self.began = _BEGAN.set(began)
        self.token = _TURN.set("running")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _running
        if self.token is None:
            return
        _TURN.reset(self.token)
        _BEGAN.reset(self.began)
        with _LOCK:
            _running -= 1
            if _waiting:
                _CHANGED.notify_all()


class OutOfTurn(Exception):
    """Others run compiled code, or did in this turn: what needs :class:`Building` at once must be begun again in that turn."""


class Building:
    """Context manager: the turn at building. A turn at running is given up meanwhile, and taken back.

    ``at_once``: OutOfTurn instead of waiting for others who run, and where others ran in the turn at running that is given up.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once

    def __enter__(self) -> None:
        global _running, _building, _waiting
        self.before = _TURN.get()
        if self.before == "building":
            return
        mine = self.before == "running"
        with _CHANGED:
            if self.at_once and (_building or _running > mine or (mine and _BEGAN.get() != _shared)):
                raise OutOfTurn
            _running -= mine
            _waiting += 1
            _CHANGED.notify_all()
            got = False
            try:
                while _building or _running:
                    _CHANGED.wait()
                got = _building = True
            finally:
                _waiting -= 1
                _running += mine and not got  # interrupted
                _CHANGED.notify_all()
        self.token = _TURN.set("building")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _running, _building
        if self.before == "building":
            return
        _TURN.reset(self.token)
        with _CHANGED:
            _building = False
            _running += self.before == "running"
            _CHANGED.notify_all()
