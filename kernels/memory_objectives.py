"""Objectives of a neural memory: the loss whose gradient is the surprise (arXiv 2501.00663, equation 12).

Every objective is a sum over coordinates of a function of prediction and value, one token at a time. The table is the
whole list; a new objective is one entry.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from titans_graph.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


class ObjectiveError(UsageError):
    """The description of a memory objective cannot be understood; the message says what is allowed."""


@dataclass(frozen=True)
class Objective:
    """One objective: its name and number-valued option (0.0 where it has none)."""

    name: str
    option: float = 0.0

    def loss(self, prediction: Tensor, value: Tensor) -> Tensor:
        """The summed loss of ``prediction`` against ``value``, both ``[..., d]``; a scalar."""
        return _TABLE[self.name].loss(prediction, value, self.option).sum()

    def text(self) -> str:
        """The canonical description: ``l2``, ``dot``, or JSON such as ``{"huber": {"delta": 1.0}}``."""
        entry = _TABLE[self.name]
        return json.dumps({self.name: {entry.option: self.option}}) if entry.option else self.name


@dataclass(frozen=True)
class _Entry:
    loss: Callable[[Tensor, Tensor, float], Tensor]
    option: str = ""
    default: float = 0.0
    least: float = 0.0


def _l2(prediction: Tensor, value: Tensor, option: float) -> Tensor:
    return (prediction - value).square()


def _dot(prediction: Tensor, value: Tensor, option: float) -> Tensor:
    return -prediction * value


def _huber(prediction: Tensor, value: Tensor, delta: float) -> Tensor:
    """e^2 / 2 up to ``delta``, then delta * (|e| - delta / 2). Written with a clamp: one formula on both sides."""
    error = prediction - value
    near = error.clamp(-delta, delta)
    return near * (error - near / 2)


def _lp(prediction: Tensor, value: Tensor, p: float) -> Tensor:
    return (prediction - value).abs().pow(p)


_TABLE: dict[str, _Entry] = {
    "l2": _Entry(_l2),
    "dot": _Entry(_dot),
    "huber": _Entry(_huber, "delta", 1.0, 1e-6),
    # Below p = 2 the curvature is infinite where the error is zero, so gradients through the memory would not exist.
    "lp": _Entry(_lp, "p", 3.0, 2.0),
}


def parse_objective(description: str | Mapping[str, Any] | Objective) -> Objective:
    """An objective from ``"l2"``, ``"dot"``, ``{"huber": {"delta": 1.0}}``, ``{"lp": {"p": 3}}``, or their JSON text.

    Raises :class:`ObjectiveError` for unknown names and options and for values out of range.
    """
    if isinstance(description, Objective):
        return description
    if isinstance(description, str):
        return _parse_text(description)
    return _parse(description)


@lru_cache(maxsize=64)
def _parse_text(text: str) -> Objective:
    if not text.lstrip().startswith("{"):
        return _parse({text.strip().strip('"'): {}})
    try:
        return _parse(json.loads(text))
    except json.JSONDecodeError as problem:
        raise ObjectiveError(f"objective {text!r} is not JSON: {problem}") from None


def _parse(description: Any) -> Objective:
    if not isinstance(description, Mapping) or len(description) != 1:
        raise ObjectiveError(f"an objective is a name or one {{name: options}}, not {description!r}")
    name, options = next(iter(description.items()))
    if name not in _TABLE:
        raise ObjectiveError(f"unknown objective {name!r}; known here: {', '.join(_TABLE)}")
    entry = _TABLE[name]
    if not isinstance(options, Mapping | None) or set(options or {}) - {entry.option}:
        allowed = repr(entry.option) if entry.option else "no option"
        raise ObjectiveError(f"objective {name!r} takes {allowed}, not {options!r}")
    value = (options or {}).get(entry.option, entry.default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not entry.least <= value < float("inf"):
        raise ObjectiveError(f"{name}: {entry.option} must be a number of at least {entry.least}, not {value!r}")
    return Objective(name, float(value))
