"""Packed sequences: equal to the sequences run apart, forward and backward, on every kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import titans_graph as tg
from titans_graph.errors import UsageError
from titans_graph.kernels.triton_config import available

LENGTHS = (5, 0, 37, 16, 1)
DIM, HEADS = 16, 2
NETWORKS: dict[str, Any] = {"linear": "linear", "mlp": {"mlp": {"hidden": 16}}, "swiglu": {"swiglu": {"hidden": 4}}}


def inputs(network: Any, shared: bool, dtype: torch.dtype) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """State and tokens, all leaves."""
    g = torch.Generator().manual_seed(0)
    total, count = sum(LENGTHS), 1 if shared else len(LENGTHS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    shapes = tg.fast_weights(network, DIM)
    state = {kind: {n: normal(count, HEADS, *s) for n, s in shapes.items()} for kind in ("weights", "momenta")}
    state = {kind: {n: (0.2 * w).detach().requires_grad_() for n, w in named.items()} for kind, named in state.items()}
    tokens: dict[str, Any] = {n: (normal(1, HEADS, total, DIM) / DIM**0.5).detach().requires_grad_() for n in "qkv"}
    for n in ("step", "log_momentum", "log_keep"):
        gate = torch.rand(1, HEADS, total, generator=g, dtype=torch.float64).to(dtype)
        tokens[n] = (0.1 * gate if n == "step" else (0.3 + 0.6 * gate).log()).requires_grad_()
    return state, tokens


def offsets() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0)


def apart(network: Any, state: dict[str, dict[str, Tensor]], tokens: dict[str, Any], **options: Any) -> list[Tensor]:
    """y and the ends of all sequences, one call each."""
    ys: list[Tensor] = []
    ends: list[list[Tensor]] = []
    for i, (a, b) in enumerate(zip(offsets(), offsets()[1:], strict=False)):
        row = {kind: {n: w[i % w.shape[0]][None] for n, w in named.items()} for kind, named in state.items()}
        initial = tg.MemoryState.initial(row["weights"], row["momenta"])
        streams: dict[str, Any] = {n: x[:, :, a:b] for n, x in tokens.items()}
        y, after = tg.neural_memory(network, None, state=initial, **streams, **options)
        ys.append(y)
        ends.append([*after.weights.values(), *after.momenta.values()])
    return [torch.cat(ys, 2), *(torch.cat(parts) for parts in zip(*ends, strict=True))]


def together(network: Any, state: dict[str, dict[str, Tensor]], tokens: dict[str, Any], **options: Any) -> list[Tensor]:
    y, now, moving = tg.neural_memory_packed(
        network, state["weights"], momenta=state["momenta"], cu_seqlens=offsets(), **tokens, **options
    )
    return [y, *now.values(), *moving.values()]


def with_gradients(results: list[Tensor], state: dict[str, dict[str, Tensor]], tokens: dict[str, Tensor]) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    total = torch.stack([(x.double() * torch.randn(x.shape, generator=g, dtype=torch.float64)).sum() for x in results]).sum()
    leaves = [w for named in state.values() for w in named.values()] + list(tokens.values())
    return [x.detach().double() for x in (*results, *torch.autograd.grad(total, leaves))]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("read", ["after", "before", "chunk"])
@pytest.mark.parametrize("name", NETWORKS)
def test_packed_sequences_are_those_run_apart(name: str, read: str, shared: bool) -> None:
    network = NETWORKS[name]
    state, tokens = inputs(network, shared, torch.float64)
    options = {"chunk": 16, "read": read}
    got = with_gradients(together(network, state, tokens, **options), state, tokens)
    want = with_gradients(apart(network, state, tokens, **options), state, tokens)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not available(), reason=str(available().why))
@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_triton_takes_packed_sequences_as_they_are(name: str) -> None:
    network = NETWORKS[name]
    state, tokens = inputs(network, True, torch.float64)
    want = with_gradients(together(network, state, tokens, chunk=16), state, tokens)
    state, tokens = inputs(network, True, torch.float32)
    got = with_gradients(together(network, state, tokens, chunk=16, kernel="triton"), state, tokens)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_nothing_but_empty_sequences() -> None:
    state, tokens = inputs("linear", False, torch.float64)
    none = {n: x[:, :, :0] for n, x in tokens.items()}
    weights = state["weights"]
    y, now, _ = tg.neural_memory_packed("linear", weights, cu_seqlens=torch.zeros(6, dtype=torch.int64), **none, chunk=16)
    assert y.shape == (1, HEADS, 0, DIM)
    torch.testing.assert_close(now["w"], weights["w"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": torch.tensor([0.0, 59.0])}, "whole numbers"),
        ({"cu_seqlens": torch.tensor([0])}, "whole numbers"),
        ({"cu_seqlens": torch.tensor([0, 60])}, "rise from 0 to the number of tokens, 59"),
        ({"cu_seqlens": torch.tensor([0, 9, 5, 59])}, "rise from 0"),
        ({"cu_seqlens": torch.tensor([1, 59])}, "rise from 0"),
        ({"q": torch.zeros(2, HEADS, 59, DIM)}, "one row"),
        ({"weights": {"w": torch.zeros(3, HEADS, DIM, DIM)}}, "one axis of 5 sequences, or of 1"),
        ({"momenta": {"v": torch.zeros(5, HEADS, DIM, DIM)}}, "momenta of linear must be"),
        ({"read": "later"}, "read is one of"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    state, tokens = inputs("linear", False, torch.float64)
    call: dict[str, Any] = {"weights": state["weights"], "cu_seqlens": offsets(), **tokens} | changes
    with pytest.raises(UsageError, match=message):
        tg.neural_memory_packed("linear", call.pop("weights"), **call)
