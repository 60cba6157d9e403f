from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.training.data import model
from titans_graph.errors import DataError
from titans_graph.training.evaluate import bits_per_byte, restart_of

TEXT = torch.tensor(list(b"a text of some forty bytes, read in parts"), dtype=torch.uint8)


def uniform(tokens: Tensor, state: Any = None) -> tuple[Tensor, None]:
    return torch.zeros(*tokens.shape, 256), None


def test_a_model_that_knows_nothing_needs_eight_bits() -> None:
    assert bits_per_byte(uniform, TEXT) == pytest.approx(8.0)
    assert bits_per_byte(uniform, TEXT, restart=7) == pytest.approx(8.0)


@given(st.integers(1, 50))
def test_the_stream_does_not_depend_on_its_pieces(piece: int) -> None:
    net = model()
    assert bits_per_byte(net, TEXT, piece=piece) == pytest.approx(bits_per_byte(net, TEXT, piece=1000), rel=1e-5)


@given(st.integers(1, 50), st.integers(1, 60))
def test_restarts_are_what_they_say(restart: int, piece: int) -> None:
    net = model()
    total = 0.0
    for start in range(0, len(TEXT) - 1, restart):
        window = TEXT[start : start + restart + 1]
        total += bits_per_byte(net, window) * (len(window) - 1)
    found = bits_per_byte(net, TEXT, restart=restart, piece=piece)
    assert found == pytest.approx(total / (len(TEXT) - 1), rel=1e-5)


def test_every_byte_but_the_first_is_scored_once() -> None:
    seen: list[int] = []

    def spy(tokens: Tensor, state: Any = None) -> tuple[Tensor, None]:
        seen.extend(tokens.flatten().tolist())
        return uniform(tokens)

    bits_per_byte(spy, TEXT, restart=7, piece=14)
    assert seen == TEXT[:-1].tolist()


@pytest.mark.parametrize(("restart", "calls"), [(0, [14, 14, 12]), (7, [14, 14, 7, 5])])
def test_progress_counts_the_scored_bytes(restart: int, calls: list[int]) -> None:
    told: list[int] = []
    bits_per_byte(uniform, TEXT, restart=restart, piece=14, progress=told.append)
    assert told == calls
    assert sum(told) == len(TEXT) - 1


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(DataError):
        bits_per_byte(uniform, TEXT[:1])


def test_restart_follows_the_state() -> None:
    assert restart_of(-1, 512, grows=False) == 0
    assert restart_of(-1, 512, grows=True) == 512
    assert restart_of(0, 512, grows=True) == 0
    assert restart_of(9, 512, grows=False) == 9


def test_no_gradient_is_kept() -> None:
    assert math.isfinite(bits_per_byte(model(), TEXT))
    assert torch.is_grad_enabled()
