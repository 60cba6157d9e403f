"""What each component gives at one token, in plain loops, from what it reads and its own tensors. See naive.py.

Written from the docstrings of ``components/`` and the equations they name (arXiv 2501.00663); the memory is in
naive_memory.py. Nothing here is fast, and nothing is shared with the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.properties.naive_memory import Memory

if TYPE_CHECKING:
    from tests.properties.naive import Place, Value


class Part(Protocol):
    """A component in its place."""

    def out(self, port: str, t: int) -> Value:
        """The value of an output at a token."""


Map = Callable[["Place", Any, Tensor], Tensor]


class OnPieces:
    """A function of features, on every piece of one value alike."""

    def __init__(self, place: Place, function: Map) -> None:
        self.place, self.function = place, function

    def out(self, port: str, t: int) -> Value:
        """The same pieces, mapped."""
        (value,) = self.place.read("x", t)
        mapped = [self.function(self.place, self.place.parameters, p.value) if p.value.numel() else p.value for p in value]
        return tuple(p._replace(value=y) for p, y in zip(value, mapped, strict=True))


class OnStreams:
    """A function of one token of one or several streams."""

    def __init__(self, place: Place, function: Callable[[Place, Any, list[Tensor]], Tensor]) -> None:
        self.place, self.function = place, function

    def out(self, port: str, t: int) -> Value:
        """One timed piece."""
        values = [piece.value for value in self.place.read("x", t) for piece in value]
        return stream(self.function(self.place, self.place.parameters, values))


def stream(value: Tensor) -> Value:
    from tests.properties.naive import Piece

    return (Piece("", True, value),)


def fixed(value: Tensor) -> Value:
    from tests.properties.naive import Piece

    return (Piece("", False, value),)


def rms(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean of squares + eps)`` over the last axis."""
    return x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()


def _linear(place: Place, p: Any, x: Tensor) -> Tensor:
    y = x @ place.weights["project.weight"].T
    return y + place.weights["project.bias"] if p.bias else y


def _swiglu(place: Place, p: Any, x: Tensor) -> Tensor:
    gate, up = place.weights["gate_up.weight"].chunk(2)
    return (F.silu(x @ gate.T) * (x @ up.T)) @ place.weights["down.weight"].T


def _norm(place: Place, p: Any, x: Tensor) -> Tensor:
    return rms(x, p.eps) * place.weights["gain"]


def _add(place: Place, p: Any, values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum(0)


_SQUASH: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "tanh": torch.tanh,
    "none": lambda x: x,
}


def _product(place: Place, p: Any, values: list[Tensor]) -> Tensor:
    a, b = values
    f = _SQUASH[p.nonlinearity]
    return f(rms(a, p.eps) * place.weights["gain_a"]) * f(rms(b, p.eps) * place.weights["gain_b"])


def _residual(place: Place, p: Any, values: list[Tensor]) -> Tensor:
    a, b = values
    return a + place.weights["vector"] * b


def _sigmoid(place: Place, p: Any, values: list[Tensor]) -> Tensor:
    a, b = values
    wa, wb = place.weights["project.weight"].chunk(2, dim=1)
    g = _SQUASH["sigmoid"](a @ wa.T + b @ wb.T + place.weights["project.bias"])
    return g * a + (1 - g) * b


def _head(place: Place, p: Any, values: list[Tensor]) -> Tensor:
    return values[0] @ place.weights["project.weight"].T


class Tied:
    """Logits as products with the rows of a table."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def out(self, port: str, t: int) -> Value:
        """One logit per row."""
        x, table = self.place.stream("x", t), self.place.stream("table", t)
        p: Any = self.place.parameters
        return stream(torch.stack([p.scale * (x * row).sum() for row in table]))


class Embedding:
    """Each id's row of a table, and the table."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def out(self, port: str, t: int) -> Value:
        """The row, scaled, or the table, not scaled."""
        table = self.place.weights["embedding.weight"]
        p: Any = self.place.parameters
        return fixed(table) if port == "table" else stream(table[int(self.place.stream("x", t))] * p.scale)


class Persistent:
    """Learned tokens beside time."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def out(self, port: str, t: int) -> Value:
        """All of them, at every token."""
        return fixed(self.place.weights["tokens"] if "tokens" in self.place.weights else torch.zeros(0, 0))


class Concat:
    """All pieces of all values, in order."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def out(self, port: str, t: int) -> Value:
        """The pieces."""
        return tuple(piece for value in self.place.read("x", t) for piece in value)


class Slice:
    """One piece by name."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def out(self, port: str, t: int) -> Value:
        """The piece."""
        ((kept,),) = [[p for p in v if p.name == self.place.parameters.keep] for v in self.place.read("x", t)]
        return (kept,)


class Convolution:
    """``y_t = sum_j w_j x_(t-j)`` over the tokens there are."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def out(self, port: str, t: int) -> Value:
        """One token."""
        p: Any = self.place.parameters
        taps = self.place.weights["weight"]
        y = sum(taps[:, j] * self.place.stream("x", t - j) for j in range(p.kernel) if j <= t)
        assert isinstance(y, Tensor)
        y = y + self.place.weights["bias"] if p.bias else y
        return stream(F.silu(y) if p.activation == "silu" else y)


def turned(x: Tensor, position: int, base: float) -> Tensor:
    """Rotary positions: features i and i + d/2 as a complex number, times ``exp(1j * position * base^(-2i/d))``."""
    half = x.shape[-1] // 2
    angle = torch.tensor([position * base ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


class Attention:
    """Softmax over the elements a query sees: all fixed ones, and of every timed piece those of the tokens in reach."""

    def __init__(self, place: Place) -> None:
        self.place, self.p = place, place.parameters
        self.memo: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def visible(self, t: int) -> range:
        """The tokens that token t sees."""
        return range(t + 1)

    def position(self, t: int) -> int:
        """Where token t stands for its rotary angles."""
        return t

    def out(self, port: str, t: int) -> Value:
        """One token of the kept piece, attended."""
        p: Any = self.p
        (value,) = self.place.read("x", t)
        timed = [piece for piece in value if piece.timed]
        own = timed[0] if p.keep is None else next(piece for piece in timed if piece.name == p.keep)
        q = (own.value @ self.place.weights["query.weight"].T).reshape(p.heads, -1)
        q = rms(q, 1e-6) * self.place.weights["query_gain"] if p.qk_norm else q
        q = q if p.rotary is None else turned(q, self.position(t), p.rotary)
        seen = [pair for piece in value if not piece.timed for element in piece.value for pair in [self.pair(element, None)]]
        for s in self.visible(t):
            seen += self.elements(s)
        mixed = []
        group = p.heads // (p.kv_heads or p.heads)
        for h in range(p.heads):
            scores = torch.stack([(q[h] * k[h // group]).sum() for k, _ in seen]) / math.sqrt(q.shape[-1])
            weights = scores.softmax(0)
            mixed.append((weights[:, None] * torch.stack([v[h // group] for _, v in seen])).sum(0))
        return stream(torch.cat(mixed) @ self.place.weights["project.weight"].T)

    def elements(self, s: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of all timed pieces at one token."""
        if s not in self.memo:
            (value,) = self.place.read("x", s)
            self.memo[s] = [self.pair(piece.value, self.position(s)) for piece in value if piece.timed]
        return self.memo[s]

    def pair(self, element: Tensor, position: int | None) -> tuple[Tensor, Tensor]:
        """Key and value ``[kv_heads, size]``; the key turned where the element has a position."""
        p: Any = self.p
        k, v = (element @ self.place.weights["key_value.weight"].T).reshape(2, p.kv_heads or p.heads, -1)
        k = rms(k, 1e-6) * self.place.weights["key_gain"] if p.qk_norm else k
        return (k if position is None or p.rotary is None else turned(k, position, p.rotary)), v


class WindowAttention(Attention):
    """The last ``window`` tokens, this one among them."""

    def visible(self, t: int) -> range:
        """The window."""
        p: Any = self.p
        return range(max(0, t - p.window + 1), t + 1)


class SegmentAttention(Attention):
    """The token's segment, up to itself or, not causal, all of it."""

    @property
    def size(self) -> int:
        """Tokens per segment."""
        p: Any = self.p
        return int(p.segment or self.place.segment or 64)

    def visible(self, t: int) -> range:
        """The segment."""
        p: Any = self.p
        first = t - t % self.size
        return range(first, t + 1 if p.causal else min(first + self.size, self.place.tokens))

    def position(self, t: int) -> int:
        """The place in the segment."""
        return t % self.size


def _on(kind: type[OnPieces] | type[OnStreams], function: Any) -> Callable[[Place], Part]:
    return lambda place: kind(place, function)


PARTS: dict[str, Callable[[Place], Part]] = {
    "add": _on(OnStreams, _add),
    "attention.full": Attention,
    "attention.segment": SegmentAttention,
    "attention.window": WindowAttention,
    "conv.causal": Convolution,
    "embedding": Embedding,
    "gate.product": _on(OnStreams, _product),
    "gate.residual": _on(OnStreams, _residual),
    "gate.sigmoid": _on(OnStreams, _sigmoid),
    "head.linear": _on(OnStreams, _head),
    "head.tied": Tied,
    "linear": _on(OnPieces, _linear),
    "memory.neural": Memory,
    "mlp.swiglu": _on(OnPieces, _swiglu),
    "norm.rms": _on(OnPieces, _norm),
    "sequence.concat": Concat,
    "sequence.slice": Slice,
    "tokens.persistent": Persistent,
}
