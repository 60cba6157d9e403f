"""The trainer with models of the shipped specs, tiny."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import titans_graph as tg
from tests.training.data import quick, small_text
from titans_graph.training import checkpoint, logs
from titans_graph.training.evaluate import bits_per_byte
from titans_graph.training.generate import generate
from titans_graph.training.loop import train

SIZES: dict[str, dict[str, Any]] = {
    "mac": {"dim": 16, "layers": 1, "heads": 2, "hidden": 4, "segment": 8, "chunk": 4, "persistent": 2},
    "transformer": {"dim": 16, "layers": 1, "heads": 2},
}


def small(name: str, seed: int = 0) -> tg.Model:
    torch.manual_seed(seed)
    return tg.load(name, **SIZES[name])


@pytest.mark.parametrize("name", SIZES)
def test_a_shipped_model_trains_resumes_and_generates(name: str, tmp_path: Path) -> None:
    config = quick(steps=4, length=20, checkpoint_every=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(small(name), small_text(), config, whole, progress=False, note=lambda text: None)
    train(small(name), small_text(), config, parts, progress=False, note=lambda text: None)
    checkpoint._remove(parts, [parts / "checkpoints" / "step-00000004"])  # as if killed before it was written
    train(small(name, seed=1), small_text(), config, parts, progress=False, note=lambda text: None)
    assert [r["loss"] for r in logs.read(whole) if r["kind"] == "train"] == [
        r["loss"] for r in logs.read(parts) if r["kind"] == "train"
    ]
    model = checkpoint.find(parts, print).model(tg.load)
    assert model.fingerprint == small(name).fingerprint
    weights = checkpoint.find(whole, print).weights()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert "".join(generate(model, "the ", tokens=8)) == "".join(generate(model, "the ", tokens=8))


def test_validation_is_one_stream() -> None:
    model = small("mac")
    stretch = small_text().stretch(50)
    assert bits_per_byte(model, stretch, piece=7) == pytest.approx(bits_per_byte(model, stretch), rel=1e-4)
