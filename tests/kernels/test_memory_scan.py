"""The chunk-parallel scan against the token-by-token truth: outputs, final states and all gradients, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.test_memory_cases import (
    Case,
    assert_close,
    assert_matches_reference,
    call,
    gradients,
    make,
)
from titans_graph.errors import UsageError

MLP = {"hidden": 5, "activation": "silu"}
COVER = [
    ("linear", "l2", "after", False),
    ("linear", "dot", "before", False),
    ("linear", {"huber": {"delta": 0.3}}, "chunk", False),
    ({"mlp": {**MLP, "depth": 1}}, {"lp": {"p": 3}}, "after", True),
    ({"mlp": {**MLP, "depth": 2}}, "l2", "after", False),
    ({"mlp": {**MLP, "depth": 2, "activation": "gelu"}}, {"huber": {"delta": 0.5}}, "before", True),
    ({"mlp": {**MLP, "depth": 2, "activation": "relu2"}}, "l2", "chunk", True),
    ({"mlp": {**MLP, "depth": 3, "residual": True}}, "l2", "after", True),
    ({"mlp": {**MLP, "depth": 3, "activation": "relu2", "residual": True}}, "dot", "before", False),
    ({"mlp": {**MLP, "depth": 4, "activation": "gelu"}}, {"lp": {"p": 2.5}}, "after", False),
    ({"mlp": {"hidden": 3, "depth": 4, "residual": True}}, "l2", "before", False),
    ({"swiglu": {"hidden": 5}}, "l2", "after", True),
    ({"swiglu": {"hidden": 2}}, {"huber": {"delta": 1.0}}, "chunk", False),
]


@pytest.mark.parametrize(("network", "objective", "read", "bounded"), COVER)
def test_matches_the_reference(network: Any, objective: Any, read: str, bounded: bool) -> None:
    assert_matches_reference(make(network, objective, read, bounded=bounded))


@pytest.mark.parametrize("read", ["after", "before", "chunk"])
def test_fast_vectors_and_weights_used_twice(read: str) -> None:
    assert_matches_reference(make("test_tied", read=read))
    assert_matches_reference(ragged(make("test_tied", {"huber": {"delta": 0.5}}, read, slots=16, batch=4)))


def test_the_comparison_can_fail() -> None:
    case = make("linear")
    got, want = call(case), call(case, "reference")
    with pytest.raises(AssertionError, match="result 3"):
        assert_close([*got[:3], got[3] + 1e-6], want, 1e-9)


def ragged(case: Case) -> Case:
    """Four rows of four chunks of 4: resumed at slot 2 and ended early; two documents; a whole chunk of lead; empty."""
    slots = torch.arange(16)
    valid = torch.stack([
        (slots >= 2) & (slots < 10),
        (slots < 6) | ((slots >= 8) & (slots < 13)),
        slots >= 6,
        slots < 0,
    ])  # fmt: skip
    position = torch.stack([slots + 8, torch.where(slots < 8, slots, slots - 8), slots + 16, slots])
    return case._replace(valid=valid, position=position)


@pytest.mark.parametrize(
    ("network", "objective", "read", "bounded"),
    [
        ("linear", "l2", "after", False),
        ({"mlp": {**MLP, "depth": 2}}, "l2", "before", True),
        ({"mlp": {"depth": 3, "hidden": 3, "residual": True}}, {"huber": {"delta": 0.5}}, "chunk", False),
        ({"swiglu": {"hidden": 4}}, {"lp": {"p": 3}}, "after", False),
    ],
)
def test_ragged_rows_match_the_reference(network: Any, objective: Any, read: str, bounded: bool) -> None:
    assert_matches_reference(ragged(make(network, objective, read, bounded=bounded, slots=16, batch=4)))


def test_invalid_slots_change_nothing_exactly() -> None:
    case = ragged(make({"mlp": {"hidden": 5}}, slots=16, batch=4))
    _, *ends = call(case)
    before = [x for name in ("anchor", "weights", "momenta") for x in case.state[name]]
    for old, new in zip(before, ends, strict=True):
        assert torch.equal(old[3], new[3])


def test_what_stands_in_invalid_slots_does_not_matter() -> None:
    case = ragged(make({"mlp": {"hidden": 5}}, slots=16, batch=4))
    junk = {n: torch.where(case.valid.view(4, 1, 16, *[1] * (x.dim() - 3)), x, x + 7) for n, x in case.tokens.items()}
    results = call(case), call(case._replace(tokens=junk))
    assert_close(results[1], results[0], 1e-14)
    assert not bool(results[0][0].permute(0, 2, 1, 3)[~case.valid].any())


@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("network", ["linear", {"mlp": {"hidden": 5}}])
def test_hostile_gates(network: Any, read: str) -> None:
    """Keep and momentum exactly 0 (log -inf) and exactly 1, mixed; a step of exactly 0."""
    case = make(network, read=read, slots=16, chunk=8)
    g = torch.Generator().manual_seed(3)
    for name in ("log_momentum", "log_keep"):
        pick = torch.randint(0, 3, case.tokens[name].shape, generator=g)
        hostile = case.tokens[name].detach().clone()
        hostile[pick == 0] = -torch.inf
        hostile[pick == 1] = 0.0
        case.tokens[name] = hostile.requires_grad_()
    case.tokens["step"].detach()[:, :, ::5] = 0.0
    results = call(case)
    assert all(bool(x.isfinite().all()) for x in [*results, *gradients(case, results)])
    # The truth multiplies gates, so its own gradient at log 0 is that of exp(log gate): zero, not undefined.
    assert_matches_reference(case)


@pytest.mark.parametrize("chunk", [1, 2, 12])
def test_chunk_sizes(chunk: int) -> None:
    assert_matches_reference(make({"mlp": {"hidden": 4}}, chunk=chunk))


def test_the_chunk_is_part_of_the_model() -> None:
    results = [call(make("linear", chunk=c))[0] for c in (4, 12)]
    assert float((results[0] - results[1]).detach().abs().max()) > 1e-4


def test_chunk_one_without_momentum_is_the_delta_rule() -> None:
    """W_t = W_{t-1} (I - beta k k^T) + beta k v^T with beta = 2 * step, keep 1, momentum 0."""
    case = make("linear", chunk=1)
    case.tokens["log_momentum"] = torch.full_like(case.tokens["step"], -torch.inf)
    case.tokens["log_keep"] = torch.zeros_like(case.tokens["step"])
    y, _, weights, _ = call(case)
    q, k, v, beta = *(case.tokens[n] for n in ("q", "k", "v")), 2 * case.tokens["step"]
    memory = case.state["initial_weights"][0]
    for t in range(q.shape[2]):
        key, error = k[:, :, t, :, None], v[:, :, t, None] - k[:, :, t, None] @ memory
        memory = memory + beta[:, :, t, None, None] * key @ error
        assert_close([y[:, :, t]], [(q[:, :, t, None] @ memory).squeeze(-2)], 1e-12)
    assert_close([weights], [memory], 1e-12)


def test_gated_delta_rule_by_substitution() -> None:
    """S_t = alpha S_{t-1} (I - beta k k^T) + beta k v^T: keep alpha, 2 step = alpha beta, v / alpha; no momentum."""
    case = make("linear", chunk=1)
    alpha, beta = case.tokens["log_keep"].exp(), 0.3 * torch.ones_like(case.tokens["step"])
    v = case.tokens["v"]
    tokens = {
        **case.tokens,
        "v": v / alpha[..., None],
        "step": alpha * beta / 2,
        "log_momentum": torch.full_like(alpha, -torch.inf),
    }
    y = call(case._replace(tokens=tokens))[0]
    memory = case.state["initial_weights"][0]
    for t in range(v.shape[2]):
        key, a, b = case.tokens["k"][:, :, t, :, None], alpha[:, :, t, None, None], beta[:, :, t, None, None]
        decayed = a * (memory - b * key @ (key.mT @ memory))
        memory = decayed + b * key @ v[:, :, t, None]
        assert_close([y[:, :, t]], [(case.tokens["q"][:, :, t, None] @ memory).squeeze(-2)], 1e-12)


@pytest.mark.parametrize(("change", "message"), [({"read": "later"}, "read is one of"), ({"chunk": 5}, "whole number")])
def test_wrong_calls_say_what_is_allowed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(make("linear")._replace(**change))


def test_unknown_kernel() -> None:
    with pytest.raises(UsageError, match="compiled"):
        call(make("linear"), kernel="triton-please")


def test_half_precision_tokens_keep_a_full_precision_memory() -> None:
    case = make("linear")
    tokens = {n: x.to(torch.bfloat16) for n, x in case.tokens.items()}
    y, *ends = call(case._replace(tokens=tokens))
    assert y.dtype == torch.bfloat16
    assert all(x.dtype == torch.float64 for x in ends)
    wide = call(case._replace(tokens={n: x.to(torch.float64) for n, x in tokens.items()}))
    assert torch.equal(y, wide[0].to(torch.bfloat16))


def test_without_gradients_nothing_is_kept() -> None:
    case = make("linear")
    with torch.no_grad():
        assert_close(call(case), call(case, "reference"), 1e-9)
