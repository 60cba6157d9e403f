"""Types of the values that flow along edges, and how time passes through a component.

Second stage of the pipeline: only :mod:`titans_graph.errors` stands before it. No torch here.

Shapes: ``B`` batch, ``T`` time (tokens), ``G`` grid slots of one call (see :class:`Clock`), ``D`` dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """One stretch of a sequence value. ``length`` None means one element per token (time map: i for token i);
    a number means that many elements that belong to no token (persistent tokens, an embedding table)."""

    name: str
    length: int | None = None

    @property
    def timed(self) -> bool:
        """Whether the piece has one element per token."""
        return self.length is None

    def text(self) -> str:
        """``T`` or the fixed length."""
        return "T" if self.length is None else str(self.length)


@dataclass(frozen=True)
class Value:
    """The type of a value: an ordered list of pieces with a common feature size.

    ``dim`` None means integer ids (tokens) without a feature axis. At run time a value of one piece is a tensor
    (``[B, T, dim]``, ``[B, T]`` for ids, ``[length, dim]`` for a fixed piece), one of several pieces a tuple of such.
    """

    pieces: tuple[Piece, ...]
    dim: int | None

    @property
    def single(self) -> Piece:
        """The only piece; callers make sure there is one."""
        assert len(self.pieces) == 1
        return self.pieces[0]

    @property
    def timed(self) -> bool:
        """Whether any piece has one element per token."""
        return any(p.timed for p in self.pieces)

    def is_stream(self) -> bool:
        """One timed piece with features: ``[B, T, dim]``."""
        return len(self.pieces) == 1 and self.pieces[0].timed and self.dim is not None

    def is_ids(self) -> bool:
        """Integer ids: ``[B, T]``."""
        return len(self.pieces) == 1 and self.pieces[0].timed and self.dim is None

    def is_fixed(self) -> bool:
        """Only pieces that belong to no token, e.g. ``[16, dim]``."""
        return not self.timed

    def named(self, name: str) -> Value:
        """The same value with its only piece renamed (values of several pieces keep their names)."""
        if len(self.pieces) != 1:
            return self
        return replace(self, pieces=(replace(self.pieces[0], name=name),))

    def text(self) -> str:
        """For people: ``[B, T, 64]``, ``[B, T]``, ``[16, 64]``, ``[B, 16 + T + T, 64]``."""
        lengths = " + ".join(p.text() for p in self.pieces)
        axes = ["B"] if self.timed else []
        axes.append(lengths)
        if self.dim is not None:
            axes.append(str(self.dim))
        return "[" + ", ".join(axes) + "]"


def stream(dim: int, name: str = "x") -> Value:
    """The type ``[B, T, dim]``."""
    return Value((Piece(name),), dim)


def ids(name: str = "tokens") -> Value:
    """The type ``[B, T]`` of integers."""
    return Value((Piece(name),), None)


def fixed(length: int, dim: int, name: str = "x") -> Value:
    """The type ``[length, dim]``: elements that belong to no token."""
    return Value((Piece(name, length),), dim)


UNKNOWN = Value((), None)
"""Stands for the type of a block's input whose declaration has a mistake, which is reported: nothing is said of it."""


@dataclass(frozen=True)
class Dependence:
    """How one output port depends in time on one input port.

    ``kind`` is one of

    - ``pointwise``  output t reads input t;
    - ``causal``     output t reads inputs up to and with t;
    - ``window``     output t reads inputs t - reach + 1 .. t;
    - ``segment``    output t reads *all* of its segment, later tokens too;
    - ``everything`` output t reads the whole sequence;
    - ``fixed``      the output belongs to no token, or the input does: no time passes;
    - ``state``      output t reads the input only through state, at least ``reach`` tokens late (``reach`` 0: from before
      the start of the enclosing segment). No direct feedthrough: a cycle through it is legal.
    """

    source: str
    target: str
    kind: str
    reach: int = 0

    @property
    def delayed(self) -> bool:
        """Whether the path carries a delay, so that a cycle through it is legal."""
        return self.kind == "state"

    @property
    def leaks(self) -> bool:
        """Whether an output may depend on later inputs."""
        return self.kind in ("segment", "everything")


@dataclass(frozen=True)
class Stage:
    """One call of a component inside a schedule: it needs ``inputs`` and gives ``outputs``.

    A component of several timings has several stages (the memory opens before attention and writes after it). Exactly
    one stage of a stateful component ``updates`` its state; the others read the state as it was at the start of the call.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    updates: bool = False


class Clock(NamedTuple):
    """Where the slots of one call stand in their documents; made by the layout, read by components.

    Tokens are laid on a grid of ``G`` slots a row so that every document starts a fresh chunk and segment: slot ``s`` of a
    run stands at in-document position ``position[b, s]``, and ``s`` and ``position`` agree modulo every chunk and segment.
    Slots without a token are invalid; within one document the tokens of one call are contiguous.

    valid     ``[B, G]`` bool: the slot holds a token of this call.
    position  ``[B, G]`` int64: in-document position of the slot (also meaningful for invalid slots of a row's run).
              ``valid & (position == 0)`` is where state restarts: nothing older may be read. A slot at distance j to the
              left (in this call, or in state) belongs to the same document exactly when ``j <= position``.
    lead      ``[B]`` int64: how many slots at the left were filled by earlier calls (the row's phase); their content is in
              state. Content of state ends just before slot ``lead``.
    end       ``[B]`` int64: one past the last valid slot, or ``lead`` where the row has no valid slot.
    room      ``[R]`` int64: 0..R-1, where R is the capacity that caches which grow with the sequence (full attention) must
              have after this call.

    A call of one token has ``G == 1``, ``lead == 0``, ``end == 1``; its slot in the segment is ``position % segment``.
    """

    valid: Tensor
    position: Tensor
    lead: Tensor
    end: Tensor
    room: Tensor


def common_dim(values: Sequence[Value]) -> int | None:
    """The feature size all values share, or None where they differ or have none."""
    dims = {v.dim for v in values}
    return dims.pop() if len(dims) == 1 else None
