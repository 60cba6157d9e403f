"""What the training tests share: a small text and quick settings."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from tests.training.stand_in import StandIn
from titans_graph.tasks.text import Text
from titans_graph.training.config import TrainConfig
from titans_graph.training.loop import TrainResult, train

SENTENCE = b"the quick brown fox jumps over the lazy dog; "


@functools.cache
def small_text() -> Text:
    whole = torch.frombuffer(bytearray(SENTENCE * 30), dtype=torch.uint8)
    return Text("a sentence", whole[:1200], whole[1200:], "a sentence, thirty times")


def quick(**changes: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "steps": 6,
        "batch": 2,
        "length": 8,
        "warmup": 2,
        "learning_rate": 0.01,
        "eval_every": 3,
        "eval_bytes": 60,
        "checkpoint_every": 0,
        "device": "cpu",
    }
    return TrainConfig(**{**defaults, **changes})


def model(seed: int = 0, dim: int = 8, name: str = "stand-in") -> StandIn:
    torch.manual_seed(seed)
    return StandIn(dim, name)


def run(out: Path, config: TrainConfig | None = None, net: StandIn | None = None, **options: Any) -> TrainResult:
    options = {"note": lambda text: None, "progress": False, **options}
    return train(net or model(), small_text(), config or quick(), out, **options)
