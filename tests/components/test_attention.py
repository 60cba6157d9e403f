"""The attention family against a loop over tokens, its masks, and the rule that flex attention gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import EagerAndRecordGraphs

from tests.components.cases import CASES, DIM, SEQUENCE
from tests.components.harness import build, calls, close, document_starts, stream
from titans_graph.kernels.attention import (
    Visible,
    attend,
    dense_mask,
    flex_attend,
    flex_position,
    full_visible,
    num_blocks,
    to_blocks,
    window_visible,
)
from titans_graph.kernels.rotary import rotate
from titans_graph.shapes import stream as stream_of

STORIES = [[17], [5, 12], [1, 1, 6, 9]]


def _seen(component: Any, t: int, length: int) -> range:
    """The in-document positions that the token at position t of its document sees."""
    if hasattr(component, "window"):
        return range(max(0, t - component.window + 1), t + 1)
    if hasattr(component, "segment"):
        first = t // component.segment * component.segment
        return range(first, t + 1 if component.causal else min(first + component.segment, length))
    return range(t + 1)


def _place(component: Any, t: int) -> int:
    """The position that rotary angles come from."""
    return t % component.segment if hasattr(component, "segment") else t


def _turned(x: Tensor, position: int, base: float | None) -> Tensor:
    """Rotary positions by complex numbers: ``[heads, d]``."""
    if base is None:
        return x
    half = x.shape[-1] // 2
    angle = position * base ** (-torch.arange(half, dtype=torch.float64) * 2 / x.shape[-1])
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def _gain(x: Tensor, gain: Tensor | None) -> Tensor:
    return x if gain is None else x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def reference(component: Any, x: Any, row: int, story: list[int]) -> Tensor:
    """One row, token by token: ``[T, dim]``."""
    c, h, d = component, component.kv_heads, component.head_dim
    pieces = x if isinstance(x, tuple) else (x,)
    w_k, w_v = c.key_value.weight.view(2, h, d, -1)
    starts, rows = document_starts(story), []
    for token, start in enumerate(starts):
        t = token - start
        query = _gain((c.query.weight @ pieces[c.at][row, token]).view(c.heads, d), c.query_gain)
        query = _turned(query, _place(c, t), c.rotary)
        keys, values = [], []
        for piece, timed in zip(pieces, c.timed, strict=True):
            # A key that is not rotated stands at place 0.
            seen = [(piece[row, start + j], _place(c, j)) for j in _seen(c, t, starts.count(start))] if timed else []
            for element, place in seen if timed else [(element, 0) for element in piece]:
                keys.append(_turned(_gain(w_k @ element, c.key_gain), place, c.rotary))
                values.append(w_v @ element)
        heads = []
        for head in range(c.heads):
            group = head // (c.heads // h)
            scores = torch.stack([query[head] @ key[group] for key in keys]) / d**0.5
            heads.append(torch.stack([v[group] for v in values]).t() @ scores.softmax(0))
        rows.append(c.project.weight @ torch.cat(heads))
    return torch.stack(rows)


VARIANTS: dict[str, Callable[[], Any]] = {
    **{case.name: case.make for case in CASES if not case.name.startswith("conv")},
    "not causal": lambda: build("attention.segment", {"x": [SEQUENCE]}, keep="normed", heads=2, segment=4, causal=False),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_attention_equals_the_loop_over_tokens(name: str) -> None:
    component = VARIANTS[name]()
    period = getattr(component, "segment", 1)
    x: Any = torch.randn(3, 17, DIM, dtype=torch.float64)
    if len(component.timed) > 1:
        x = (torch.randn(3, DIM, dtype=torch.float64), torch.randn_like(x), x)
    actual, _ = stream(component, {"x": x}, calls(STORIES, (), period), poison=1e6)
    for row, story in enumerate(STORIES):
        close(actual[row], reference(component, x, row, story))


def test_reading_the_whole_segment_uses_the_part_that_came_earlier() -> None:
    component = build("attention.segment", {"x": [stream_of(DIM)]}, heads=2, segment=4, causal=False)
    x = torch.randn(1, 8, DIM, dtype=torch.float64)
    whole, _ = stream(component, {"x": x}, calls([[8]], (), 4))
    for cut, slack in ((2, 0), (2, 1), (6, 0)):
        parts, _ = stream(component, {"x": x}, calls([[8]], [cut], 4, slack), poison=1e6)
        segment_end = -(-cut // 4) * 4
        close(parts[:, cut:], whole[:, cut:])
        assert (parts[:, segment_end - 4 : cut] - whole[:, segment_end - 4 : cut]).abs().min() > 1e-9


def test_rotary_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 2, 8, dtype=torch.float64)

    def score(i: int, j: int) -> Tensor:
        return (rotate(q, torch.tensor([[i]]), 100.0) * rotate(k, torch.tensor([[j]]), 100.0)).sum()

    close(score(5, 3), score(100_005, 100_003))
    assert (score(5, 3) - score(5, 4)).abs() > 1e-6


def test_rotary_angles_are_exact_far_out_in_low_precision() -> None:
    x = torch.randn(1, 1, 2, 64)
    far = torch.tensor([[1_000_003]])
    expected = rotate(x.double(), far, 10000.0)
    torch.testing.assert_close(rotate(x, far, 10000.0).double(), expected, rtol=1e-5, atol=1e-5)
    assert rotate(x.bfloat16(), far, 10000.0).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["full", "window"])
def test_flex_attention_sees_what_the_mask_says(kind: str) -> None:
    """The form that CUDA gets inside torch.compile, run without both."""
    call = calls([[4, 9], [13]], [[6, 7]], 4)[1]
    clock, slots = call.clock, call.token.shape[1]
    q = torch.randn(2, slots, 4, 8, dtype=torch.float64)
    joined = torch.randn(2, 16 + slots, 2, 2, 2, 8, dtype=torch.float64)
    fixed = torch.randn(3, 2, 2, 8, dtype=torch.float64)

    def rule(position: Tensor) -> Visible:
        return full_visible(position, clock.lead, 16) if kind == "full" else window_visible(position, 16)

    expected = attend(q, joined, dense_mask(rule(clock.position), q, joined), fixed)
    close(flex_attend(q, joined, rule(flex_position(clock)), fixed), expected)
    close(
        flex_attend(q, joined[:, :, :1], rule(flex_position(clock)), None),
        attend(q, joined[:, :, :1], dense_mask(rule(clock.position), q, joined), None),
    )


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it is traced
@pytest.mark.parametrize("queries", [torch.bfloat16, torch.float32])
def test_flex_attention_follows_autocast(queries: torch.dtype) -> None:
    """Keys behind a cache in float32 are float32, and so are normalised queries; products are in autocast's type."""
    clock = calls([[6]], [], 4)[0].clock
    slots, graphs = clock.position.shape[1], EagerAndRecordGraphs()
    q, joined = torch.randn(1, slots, 2, 16, dtype=queries), torch.randn(1, 16 + slots, 1, 2, 2, 16)
    fixed = torch.randn(3, 2, 2, 16)

    def answer(q: Tensor, joined: Tensor, fixed: Tensor, position: Tensor) -> Tensor:
        return flex_attend(q, joined, window_visible(position, 16), fixed)

    compiled = torch.compile(answer, backend=graphs, fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = attend(q, joined, dense_mask(window_visible(clock.position, 16), q, joined), fixed)
        found = compiled(q, joined, fixed, flex_position(clock))
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    (call,) = (node for node in graphs.graphs[0].graph.nodes if str(node.target) == "flex_attention")
    assert {x.meta["example_value"].dtype for x in call.args[:3]} == {torch.bfloat16}


@pytest.mark.parametrize("slots", [2, 3, 4, 5, 8, 9, 17])
@pytest.mark.parametrize("window", [1, 2, 4, 16])
def test_window_blocks_equal_the_dense_window(slots: int, window: int) -> None:
    component = build("attention.window", {"x": [stream_of(DIM)]}, heads=2, window=window)
    x = torch.randn(1, slots + 3, DIM, dtype=torch.float64)
    parts, _ = stream(component, {"x": x}, calls([[slots + 3]], [3]))
    close(parts[0], reference(component, x, 0, [slots + 3]))


def test_the_window_takes_memory_in_proportion_to_the_length() -> None:
    component = build("attention.window", {"x": [stream_of(DIM)]}, heads=2, window=8)
    sizes = []
    for tokens in (512, 1024):
        largest = 0

        def watch(tensor: Tensor) -> Tensor:
            nonlocal largest
            largest = max(largest, tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
            stream(component, {"x": torch.randn(1, tokens, DIM, dtype=torch.float64)}, calls([[tokens]]))
        sizes.append(largest)
    assert sizes[1] <= 2.1 * sizes[0]


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17, 100])
def test_blocks_cover_the_length(length: int) -> None:
    count = num_blocks(length, 8)
    blocks = to_blocks(torch.arange(length)[None, :, None], count, 8)
    assert count == 1 if length <= 8 else count >= 2
    assert torch.equal(blocks.reshape(-1)[:length], torch.arange(length))


def test_the_full_cache_grows_to_the_room_it_is_given() -> None:
    component = build("attention.full", {"x": [stream_of(DIM)]}, heads=2)
    _, state = stream(component, {"x": torch.randn(1, 40, DIM, dtype=torch.float64)}, calls([[40]], [10]))
    assert component.grows
    assert state["cache"].shape == (1, 40, 1, 2, 2, 4)
