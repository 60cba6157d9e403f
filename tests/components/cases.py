"""One case per stateful component variant: how to build it, random inputs for it, and its alignment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.components.harness import build
from titans_graph.shapes import Piece, Value, stream

DIM = 8
SEQUENCE = Value((Piece("prefix", 3), Piece("recalled"), Piece("normed")), DIM)


@dataclass(frozen=True)
class Case:
    """A stateful component to test."""

    name: str
    make: Callable[[], Any]
    period: int = 1
    sequence: bool = False

    def inputs(self, batch: int, tokens: int) -> dict[str, Any]:
        """Random inputs of ``tokens`` tokens."""
        if not self.sequence:
            return {"x": torch.randn(batch, tokens, DIM, dtype=torch.float64)}
        timed = torch.randn(2, batch, tokens, DIM, dtype=torch.float64)
        return {"x": (torch.randn(3, DIM, dtype=torch.float64), timed[0], timed[1])}


def _attention(kind: str, sequence: bool, **values: Any) -> Callable[[], Any]:
    keep: dict[str, Any] = {"keep": "normed"} if sequence else {}
    given = SEQUENCE if sequence else stream(DIM)
    return lambda: build(kind, {"x": [given]}, **keep, **values)


CASES = [
    Case("conv", lambda: build("conv.causal", {"x": [stream(DIM)]}, activation="silu", bias=True)),
    Case("conv-in-4", lambda: build("conv.causal", {"x": [stream(DIM)]}), period=4),
    Case("conv-2", lambda: build("conv.causal", {"x": [stream(DIM)]}, kernel=2)),
    Case("full", _attention("attention.full", False, heads=2)),
    Case("full-in-4", _attention("attention.full", False, heads=2), period=4),
    Case("full-pieces", _attention("attention.full", True, heads=4, kv_heads=2, qk_norm=True), sequence=True),
    Case("window", _attention("attention.window", False, heads=2, window=4)),
    Case("window-in-6", _attention("attention.window", False, heads=2, window=4), period=6),
    Case("window-1", _attention("attention.window", False, heads=2, window=1, rotary=None)),
    Case("window-pieces", _attention("attention.window", True, heads=4, kv_heads=1, window=5), sequence=True),
    Case("segment", _attention("attention.segment", False, heads=2, segment=4), period=4),
    Case("segment-1", _attention("attention.segment", False, heads=2, segment=1)),
    Case("segment-pieces", _attention("attention.segment", True, heads=2, segment=3, qk_norm=True), 3, True),
    Case("segment-in-6", _attention("attention.segment", False, heads=2, head_dim=6, segment=3), period=6),
]
