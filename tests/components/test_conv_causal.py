"""The causal convolution against a loop over taps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.components.harness import build, calls, close, document_starts, site, stream
from titans_graph.components.conv_causal import CausalConv
from titans_graph.shapes import stream as stream_of

STORIES = [[11], [5, 6], [1, 1, 2, 7]]


def reference(x: Tensor, weight: Tensor, story: list[int]) -> Tensor:
    """One row ``[T, D]``, token by token, tap by tap."""
    rows = []
    for t, start in enumerate(document_starts(story)):
        taps = range(min(weight.shape[1], t - start + 1))
        rows.append(sum((weight[:, j] * x[t - j] for j in taps), torch.zeros_like(x[0])))
    return torch.stack(rows)


@pytest.mark.parametrize("kernel", [2, 3, 4, 7])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_convolution_equals_the_loop(kernel: int, bias: bool, activation: str) -> None:
    conv = build("conv.causal", {"x": [stream_of(6)]}, kernel=kernel, bias=bias, activation=activation)
    x = torch.randn(3, 11, 6, dtype=torch.float64)
    actual, _ = stream(conv, {"x": x}, calls(STORIES), poison=1e6)
    for row, story in enumerate(STORIES):
        expected = reference(x[row], conv.weight, story)
        expected = expected if conv.bias is None else expected + conv.bias
        close(actual[row], F.silu(expected) if activation == "silu" else expected)


def test_it_starts_near_identity() -> None:
    conv = CausalConv(site("conv.causal", {"x": [stream_of(32)]}))
    x = torch.randn(2, 50, 32)
    y, _ = stream(conv, {"x": x}, calls([[50], [50]]))
    assert (y - x).std() < 0.1
    assert (y - x).abs().max() > 0


def test_the_tail_is_the_last_inputs() -> None:
    conv = build("conv.causal", {"x": [stream_of(4)]})
    x = torch.randn(1, 9, 4, dtype=torch.float64)
    _, state = stream(conv, {"x": x}, calls([[9]], [2, 3]))
    close(state["tail"], x[:, -3:])
