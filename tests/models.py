"""Small models of every shipped spec, for tests of the whole pipeline."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import yaml

import titans_graph as tg
from titans_graph.spec import shipped

SMALL: dict[str, Any] = {
    "vocab": 13,
    "dim": 16,
    "layers": 2,
    "heads": 2,
    "hidden": 6,
    "persistent": 3,
    "segment": 8,
    "window": 5,
    "chunk": 4,
    "quick": 2,
}

ALL = tuple(sorted(shipped()))
MODELS = tuple(name for name in ALL if "/" not in name)
BLOCKS = tuple(name for name in ALL if "/" in name)
FOLDER = Path(str(tg.__file__)).parent / "specs"


@functools.cache
def parameters(name: str) -> frozenset[str]:
    """The names of a shipped spec's parameters."""
    return frozenset(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["parameters"])


def small(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any) -> tg.Model:
    """A small model of a shipped spec, with parameters moved away from their special initial values."""
    torch.manual_seed(seed)
    chosen = {**{k: v for k, v in SMALL.items() if k in parameters(name)}, **overrides}
    model = tg.load(name, **chosen).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def example(model: tg.Model, batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random input for a model: ids, or a stream."""
    generator = torch.Generator().manual_seed(seed)
    (kind,) = model.compilation.inputs.values()
    if kind.dim is None:
        return torch.randint(0, SMALL["vocab"], (batch, tokens), generator=generator)
    dtype = next(model.parameters()).dtype
    return torch.randn(batch, tokens, kind.dim, generator=generator, dtype=torch.float64).to(dtype)


def streamed(
    model: tg.Model, x: torch.Tensor, parts: list[int], document: torch.Tensor | None = None
) -> tuple[torch.Tensor, tg.State]:
    """The outputs of successive calls on parts of the given lengths, joined, and the last state."""
    assert sum(parts) == x.shape[1]
    outputs, state, at = [], None, 0
    for n in parts:
        ids = None if document is None else document[:, at : at + n]
        y, state = model(x[:, at : at + n], state, document=ids)
        outputs.append(y)
        at += n
    assert state is not None
    return torch.cat(outputs, dim=1), state
