from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.data import model
from tests.training.stand_in import StandIn
from titans_graph.errors import UsageError
from titans_graph.training.generate import generate, sample


class Reciting(StandIn):
    """Says the bytes it was given, one after the other; its state counts the calls, ``calls`` holds their lengths."""

    def __init__(self, script: bytes) -> None:
        super().__init__(2)
        self.script = script
        self.calls: list[int] = []

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        self.calls.append(tokens.shape[1])
        told = 0 if state is None else state
        logits = torch.zeros(1, tokens.shape[1], 256)
        logits[0, -1, self.script[told]] = 1000.0
        return logits, told + 1


def test_the_prompt_is_read_at_once_and_the_rest_byte_by_byte() -> None:
    net = Reciting(b"hello")
    assert "".join(generate(net, "prompt", tokens=5)) == "hello"
    assert net.calls == [6, 1, 1, 1, 1]


def test_characters_come_when_they_are_complete() -> None:
    script = "aé€😀z".encode()
    assert list(generate(Reciting(script), "", tokens=len(script))) == ["a", "é", "€", "😀", "z"]


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (b"a\xffb", "a\ufffdb"),
        (b"\xe2\x82", "\ufffd"),
        (b"\xc3\xc3\xa9", "\ufffdé"),
        ("€".encode()[:2] + b"x", "\ufffdx"),
    ],
)
def test_bytes_that_form_no_character_are_replaced(script: bytes, text: str) -> None:
    assert "".join(generate(Reciting(script), "", tokens=len(script))) == text


def test_the_same_seed_gives_the_same_text() -> None:
    net = model()
    first = "".join(generate(net, "a", tokens=40, seed=3))
    torch.rand(5)
    assert "".join(generate(net, "a", tokens=40, seed=3)) == first
    assert "".join(generate(net, "a", tokens=40, seed=4)) != first


def test_streaming_draws_what_the_whole_prompt_would() -> None:
    net = model()
    text = "".join(generate(net, b"start ", tokens=12, temperature=0))
    content = b"start "
    for _ in range(12):
        logits, _ = net(torch.tensor([list(content)]))
        content += bytes([int(logits[0, -1].argmax())])
    assert text == content[6:].decode("utf-8", "replace")


def test_sampling() -> None:
    source = torch.Generator().manual_seed(0)
    logits = torch.zeros(300)
    logits[7], logits[9], logits[299] = 5.0, 4.0, 100.0
    assert sample(logits, 0, 0, source) == 7
    assert {sample(logits, 1.0, 1, source) for _ in range(20)} == {7}
    assert {sample(logits, 1.0, 2, source) for _ in range(60)} == {7, 9}
    assert max(sample(logits, 50.0, 0, source) for _ in range(200)) < 256
    assert {sample(logits, 1e-9, 0, source) for _ in range(9)} == {7}


def test_an_odd_prompt_is_no_trouble() -> None:
    assert len("".join(generate(model(), "\udcff", tokens=3))) <= 3
    assert list(generate(model(), "", tokens=0)) == []


@pytest.mark.parametrize("wrong", [{"tokens": -1}, {"top_k": -1}, {"temperature": -0.1}, {"temperature": float("nan")}])
def test_values_that_cannot_work_are_refused_at_the_call(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        generate(model(), "a", **wrong)
