"""What a model says to input that does not fit, and what it does with none."""

from __future__ import annotations

import pytest
import torch

import titans_graph as tg
from tests.models import ALL, MODELS, example, small


@pytest.mark.parametrize("name", MODELS)
def test_ids_out_of_range_are_refused(name: str) -> None:
    model = small(name)
    for bad in (-1, 13):
        with pytest.raises(tg.InputError, match=r"ids must be in 0\.\.12"):
            model(torch.full((1, 4), bad))


@pytest.mark.parametrize("name", ALL)
def test_no_tokens_give_no_output_and_the_same_state(name: str) -> None:
    model = small(name)
    _, state = model(example(model, 2, 9))
    y, after = model(example(model, 2, 0), state)
    assert y.shape[:2] == (2, 0)
    assert after is state
    assert model(example(model, 2, 0))[0].shape[1] == 0


@pytest.mark.parametrize("name", ALL)
def test_an_empty_batch_runs(name: str) -> None:
    model = small(name)
    assert model(example(model, 0, 5))[0].shape[:2] == (0, 5)


def test_wrong_types_and_shapes_are_named() -> None:
    model, block = small("mac"), small("blocks/mac")
    with pytest.raises(tg.InputError, match=r"ids \[B, T\]"):
        model(torch.zeros(2, 3))
    with pytest.raises(tg.InputError, match=r"\[B, T, 16\]"):
        block(torch.zeros(2, 3, 8, dtype=torch.float64))
    with pytest.raises(tg.InputError, match="float32"):
        block(torch.zeros(2, 3, 16))
    with pytest.raises(tg.InputError, match="document"):
        model(torch.zeros(2, 3, dtype=torch.int64), document=torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(tg.InputError, match="0 or more"):
        model(torch.zeros(2, 3, dtype=torch.int64), document=torch.full((2, 3), -1))
    with pytest.raises(tg.InputError, match="tensor"):
        model([[1, 2]])
