from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_graph.errors import UsageError
from titans_graph.training.config import TrainConfig, learning_rate


def test_the_schedule_rises_to_the_peak_and_falls_to_the_floor() -> None:
    config = TrainConfig(steps=21, warmup=10, learning_rate=1.0, floor=0.1)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 4) == pytest.approx(0.5)
    assert learning_rate(config, 9) == pytest.approx(1.0)
    assert learning_rate(config, 10) == pytest.approx(1.0)
    assert learning_rate(config, 15) == pytest.approx(0.55)
    assert learning_rate(config, 20) == pytest.approx(0.1)


@given(st.integers(1, 300), st.integers(0, 400), st.floats(0, 1))
def test_every_rate_is_positive_and_at_most_the_peak(steps: int, warmup: int, floor: float) -> None:
    config = TrainConfig(steps=steps, warmup=warmup, floor=floor, learning_rate=0.5)
    rates = [learning_rate(config, step) for step in range(steps)]
    assert all(0 <= rate <= 0.5 + 1e-12 and math.isfinite(rate) for rate in rates)
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("steps", True),
        ("batch", -1),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", "fast"),
        ("floor", 1.5),
        ("beta2", 1.0),
        ("precision", "fp8"),
        ("keep", 0),
    ],
)
def test_a_wrong_value_is_named(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        TrainConfig(**{name: value})  # type: ignore[arg-type]


def test_every_default_has_a_meaning_and_a_reason() -> None:
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["doc"], field.name
        assert field.metadata["reason"], field.name


def test_plain_and_back() -> None:
    config = TrainConfig(steps=5, compile=True)
    assert TrainConfig.from_plain(config.plain()) == config
    with pytest.raises(UsageError, match="did you mean 'steps'"):
        TrainConfig.from_plain({"stpes": 3})


def test_the_identity_holds_what_decides_the_weights() -> None:
    identity = TrainConfig().identity()
    assert {"steps", "seed", "length", "compile"} <= identity.keys()
    assert not {"eval_every", "checkpoint_every", "keep"} & identity.keys()
