"""What is no tensor is refused by name, with the shape that is wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import titans_graph as tg
from titans_graph.errors import UsageError


def call(**changed: Any) -> Any:
    given: dict[str, Any] = {name: torch.zeros(2, 3, 5, 4) for name in "qkv"}
    given["step"] = torch.zeros(2, 3, 5)
    weights = {"w": torch.zeros(2, 3, 4, 4)}
    return tg.neural_memory("linear", weights, **(given | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"step": 0.1}, r"step must be a tensor \[2, 3, 5\], for example torch.full\(\(2, 3, 5\), 0.1\), not 0.1"),
        ({"step": None}, r"step must be a tensor \[2, 3, 5\], not None"),
        ({"log_momentum": -1}, r"log_momentum must be a tensor \[2, 3, 5\], for example"),
        ({"log_keep": [0.0]}, r"log_keep must be a tensor \[2, 3, 5\], not \[0.0\]"),
        ({"k": "k"}, r"k must be a tensor \[2, 3, 5, 4\], not 'k'"),
        ({"q": 1.0}, r"q must be a tensor \[B, H, T, d\], not a float"),
        ({"q": torch.zeros(3)}, r"q must be a tensor \[B, H, T, d\], not of shape \[3\]"),
    ],
)
def test_numbers_in_place_of_tensors(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(**changed)


def test_the_gates_that_may_be_left_out_may() -> None:
    y, _ = call(log_momentum=None, log_keep=None)
    assert y.shape == (2, 3, 5, 4)


def test_packed_documents_refuse_the_same() -> None:
    x = torch.zeros(1, 2, 6, 4)
    ends: Any = {"cu_seqlens": torch.tensor([0, 6]), "step": 0.1}
    with pytest.raises(UsageError, match=r"step must be a tensor \[1, 2, 6\]"):
        tg.neural_memory_packed("linear", {"w": torch.zeros(1, 2, 4, 4)}, x, x, x, **ends)
