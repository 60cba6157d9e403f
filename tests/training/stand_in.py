"""A small recurrent model with the interface that the trainer asks for, so that these tests need no compiler."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """What ``summary`` returns."""

    parameters: int
    state_bytes: int
    flops: float
    grows: bool = False


class StandIn(nn.Module):
    """An embedding, one exponential average per feature as state, and a head. Streams exactly."""

    def __init__(self, dim: int = 16, name: str = "stand-in", vocabulary: int = 256) -> None:
        super().__init__()
        self.dim, self.name, self.vocabulary = dim, name, vocabulary
        self.embedding = nn.Embedding(vocabulary, dim)
        self.decay = nn.Parameter(torch.zeros(dim))
        self.head = nn.Linear(dim, vocabulary)

    @property
    def spec(self) -> str:
        return json.dumps({"name": self.name, "dim": self.dim, "vocabulary": self.vocabulary})

    @property
    def fingerprint(self) -> str:
        return f"{self.name}-{self.dim}-{self.vocabulary}"

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        keep = torch.sigmoid(self.decay)
        x = self.embedding(tokens)
        carried = state if state is not None else x.new_zeros(len(x), self.dim)
        outputs = []
        for t in range(x.shape[1]):
            carried = keep * carried + (1 - keep) * x[:, t]
            outputs.append(carried)
        return self.head(torch.stack(outputs, 1)), carried

    def compile(self) -> Callable[..., tuple[Tensor, Tensor]]:  # type: ignore[override]
        return self.__call__

    def summary(self) -> Size:
        return Size(sum(p.numel() for p in self.parameters()), 4 * self.dim, 2.0 * self.dim * self.vocabulary)


def build(path: str, **parameters: Any) -> StandIn:
    """From a spec file written by :attr:`StandIn.spec`, or from a name."""
    if Path(path).is_file():
        return StandIn(**json.loads(Path(path).read_text()))
    return StandIn(name=Path(path).name, **parameters)
