"""What the doctor found, as values, as a table and as plain data. Part of the runtime; no tensors are kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

TOKENS = {
    "asked": "step asked for",
    "limit": "largest stable step",
    "step": "step taken",
    "momentum": "momentum",
    "keep": "keep (1 - alpha)",
    "surprise": "surprise",
    "crowding": "crowding",
}
"""What is measured at every token, with its name in the table."""

GROWN = 1e3
"""Growth of a fast weight's norm that is called divergence: weights that fit values to keys of unit length grow about as
large as the values, while weights that diverge are multiplied in every chunk, and soon pass any bound."""


@dataclass(frozen=True)
class Spread:
    """Smallest, median (the lower of two) and largest of many numbers."""

    minimum: float
    median: float
    maximum: float

    @staticmethod
    def of(x: Tensor) -> Spread:
        """Of a tensor ``[n]``; all NaN where one is."""
        return Spread(float(x.min()), float(x.median()), float(x.max()))


@dataclass(frozen=True)
class Head:
    """One head of one memory, over all rows of the batch.

    Over tokens: ``asked`` (theta from the token, before the cap), ``limit`` (the largest stable step at the token's
    crowding, the configured maximum momentum and the chunk's first weights; all NaN where it is not known), ``step``
    (theta as it is used), ``momentum`` eta, ``keep`` 1 - alpha, ``surprise`` (norm of the gradient by all fast weights at
    the chunk's first ones), ``crowding`` r. Over chunks, by fast weight: ``writes`` (norm of its change). By fast weight:
    its norm at the ``start`` and at the ``end``, the largest of the rows. ``above``: tokens whose step is larger than the
    limit.
    """

    head: int
    asked: Spread
    limit: Spread
    step: Spread
    momentum: Spread
    keep: Spread
    surprise: Spread
    crowding: Spread
    writes: Mapping[str, Spread]
    start: Mapping[str, float]
    end: Mapping[str, float]
    above: int

    @property
    def growth(self) -> float:
        """Norm of all fast weights at the end over that at the start."""
        first, last = (math.hypot(*norms.values()) for norms in (self.start, self.end))
        return last / first if first else math.inf if last else 1.0


@dataclass(frozen=True)
class Memory:
    """One memory: the path of its node, what it is, its objective's curvature (None: no bound known), and its heads."""

    node: str
    network: str
    objective: str
    chunk: int
    cap: str
    curvature: float | None
    heads: tuple[Head, ...]


@dataclass(frozen=True)
class NotFinite:
    """A NaN or infinity: the node, its output port (or ``state KEY``), and the token, None where it belongs to none.

    ``until``: where one of several tokens may be the cause, the last of them.
    """

    node: str
    port: str
    token: int | None
    until: int | None = None

    def text(self) -> str:
        """For people."""
        at = f" at token {self.token}" if self.until is None else f" in the chunk of tokens {self.token}-{self.until}"
        return f"{self.node}.{self.port}" + ("" if self.token is None else at)


@dataclass(frozen=True)
class Examination:
    """What a model did with ``rows`` x ``tokens``.

    ``parameters``: those that hold a NaN or infinity; ``input``: the first token of a floating-point input that does;
    ``first``: the first node in the order of execution whose output (or state) does.
    """

    model: str
    rows: int
    tokens: int
    parameters: tuple[str, ...]
    input: int | None
    first: NotFinite | None
    memories: tuple[Memory, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything wrong, one line each."""
        found = [f"parameter {name} is not finite" for name in self.parameters]
        if self.input is not None:
            found.append(f"the input is not finite at token {self.input}")
        if self.first is not None:
            found.append(f"the first output that is not finite: {self.first.text()}")
        for memory in self.memories:
            found += [_too_large(memory, head) for head in memory.heads if head.above]
            found += [line for head in memory.heads for line in _grown(memory, head)]
        return tuple(found)

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be judged, one line each."""
        return tuple(
            f"{m.node}: the largest stable step is not known for the objective {m.objective}; its steps were not judged"
            for m in self.memories
            if m.curvature is None
        )

    @property
    def sound(self) -> bool:
        """Whether everything was finite, nothing diverged, and no step was larger than the largest stable one, if known."""
        return not self.problems

    def text(self) -> str:
        """Tables for people, and what is wrong."""
        lines = [f"{self.model}: {self.rows} x {self.tokens:,} tokens"]
        for memory in self.memories:
            lines += ["", *_table(memory)]
        if not self.memories:
            lines.append("no memory in this model; looked for NaN and infinity alone")
        steps = "nothing diverged" if self.notes else "no step above the largest stable one"
        return "\n".join([*lines, "", *(self.problems or (f"sound: all finite, {steps}",)), *self.notes])

    def plain(self) -> dict[str, Any]:
        """Mappings, lists, numbers and words; None for a number that is not finite."""
        data: dict[str, Any] = _plain(dataclasses.asdict(self))
        for memory, shown in zip(self.memories, data["memories"], strict=True):
            for head, row in zip(memory.heads, shown["heads"], strict=True):
                row["growth"] = _plain(head.growth)
        return data | {"problems": list(self.problems), "notes": list(self.notes), "sound": self.sound}


def _too_large(memory: Memory, head: Head) -> str:
    why = "cap: keys with a max_step of at most 1 keeps it below" if memory.cap == "none" else "max_step is above 1"
    return (
        f"{memory.node} head {head.head}: the step is above the largest stable one at {head.above:,} tokens "
        f"(up to {_number(head.step.maximum)}, stable to {_number(head.limit.minimum)} at the most crowded); {why}"
    )


def _grown(memory: Memory, head: Head) -> Iterator[str]:
    """Weights that start below 1, at 0 perhaps, are held against 1: learning at all would multiply them by much."""
    for name, last in head.end.items():
        first = head.start[name]
        if GROWN * max(first, 1.0) < last < math.inf:
            yield (
                f"{memory.node} head {head.head}: the norm of {name} grew from {_number(first)} to {_number(last)}, more than "
                f"{GROWN:,.0f}-fold; the memory diverges (a smaller max_step) or its values are that large"
            )


def _table(memory: Memory) -> Iterator[str]:
    yield f"{memory.node}: {memory.network}, {memory.objective}, chunk {memory.chunk}, cap {memory.cap}"
    yield f"  {'':<24}{'head':>4}{'min':>11}{'median':>11}{'max':>11}"
    for key, title in TOKENS.items():
        if key == "limit" and memory.curvature is None:
            continue
        for head in memory.heads:
            yield _row(title, head.head, getattr(head, key))
            title = ""
    for name in memory.heads[0].writes:
        title = f"written a chunk, {name}"
        for head in memory.heads:
            yield _row(title, head.head, head.writes[name])
            title = ""
    yield f"  {'':<24}{'head':>4}{'start':>11}{'end':>11}{'growth':>11}"
    for name in memory.heads[0].start:
        title = f"norm, {name}"
        for head in memory.heads:
            first, last = head.start[name], head.end[name]
            yield _line(title, head.head, first, last, last / first if first else math.inf)
            title = ""


def _row(title: str, head: int, spread: Spread) -> str:
    return _line(title, head, spread.minimum, spread.median, spread.maximum)


def _line(title: str, head: int, *numbers: float) -> str:
    return f"  {title:<24}{head:>4}" + "".join(f"{_number(x):>11}" for x in numbers)


def _number(x: float) -> str:
    return f"{x:.4g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
