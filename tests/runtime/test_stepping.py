"""Single tokens without gradients leave a state in a form of its own; whoever looks sees the state of any other call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch.utils.checkpoint import checkpoint

import titans_graph as tg
from tests.models import example, small, streamed
from titans_graph.runtime.state import Stepping


def held(state: tg.State) -> Stepping:
    """The states that single tokens left."""
    assert isinstance(state.nodes, Stepping)
    return state.nodes


def close(a: tg.State, b: tg.State) -> None:
    """Two states agree in every tensor that matters: not in rings of keys, whose later slots are never read."""
    for node, tensors in a.nodes.items():
        assert tensors.keys() == b.nodes[node].keys()
        for key, t in tensors.items():
            if key.split(".")[0] in ("anchor", "weights", "momenta", "opening"):
                assert (t - b.nodes[node][key]).abs().max() <= 1e-9, (node, key)


@pytest.mark.parametrize("name", ["mac", "lmm", "twin"])
@pytest.mark.parametrize("tokens", [8, 13])
def test_single_tokens_leave_the_state_of_the_whole(name: str, tokens: int) -> None:
    model = small(name)
    x = example(model, 2, tokens)
    with torch.no_grad():
        _, stepped = streamed(model, x, [1] * tokens)
        _, whole = model(x)
    assert any("ring.shares" in node for node in held(stepped).held.values())
    close(stepped, whole)


def test_a_token_writes_no_weights_unless_they_are_due() -> None:
    model = small("lmm", chunk=8).requires_grad_(False)
    x = example(model, 1, 12)
    _, state = streamed(model, x[:, :10], [1] * 10)
    _, after = model(x[:, 10:11], state)
    (node,) = [n for n, tensors in held(state).held.items() if "ring.shares" in tensors][:1]
    old, new = held(state).held[node], held(after).held[node]
    fast = [k for k in old if k.split(".")[0] in ("anchor", "weights", "momenta")]
    assert all(old[k] is new[k] for k in fast)
    assert not torch.equal(state.nodes[node][fast[-1]], after.nodes[node][fast[-1]])


def test_a_state_of_single_tokens_is_a_value(tmp_path: Path) -> None:
    model = small("mac").requires_grad_(False)
    x = example(model, 3, 24)
    _, state = streamed(model, x[:, :11], [1] * 11)
    leaves = [t.clone() for t in pytree.tree_leaves(state)]
    order = [2, 0, 0]
    state.save(tmp_path / "s.safetensors")
    states = [state.fork(), state.detach(), tg.State.load(model, tmp_path / "s.safetensors"), state.reset([])]
    for n in (1, 13):
        want, _ = streamed_from(model, x[:, 11:], [13], state)
        for other in states:
            got, _ = streamed_from(model, x[:, 11:], [1] * n + [13 - n] * (n < 13), other)
            assert (got - want).abs().max() <= 1e-9
        got, _ = streamed_from(model, x[order, 11:], [1] * 13, state.reorder(order))
        assert (got - want[order]).abs().max() <= 1e-9
    assert all(torch.equal(a, b) for a, b in zip(leaves, pytree.tree_leaves(state), strict=True))


def streamed_from(model: tg.Model, x: torch.Tensor, parts: list[int], state: tg.State) -> tuple[torch.Tensor, tg.State]:
    """The outputs of calls that go on from a state."""
    outputs, at = [], 0
    for n in parts:
        y, state = model(x[:, at : at + n], state)
        outputs.append(y)
        at += n
    return torch.cat(outputs, 1), state


def test_rows_at_different_places_and_a_reset_row() -> None:
    model = small("lmm", chunk=8).requires_grad_(False)
    x = example(model, 2, 30)
    _, state = streamed(model, x[:, :11], [1] * 11)
    y, _ = streamed_from(model, x[:, 11:], [1] * 19, state.reset([1]))
    assert (y[0] - model(x)[0][0, 11:]).abs().max() <= 1e-9
    assert (y[1] - model(x[1:, 11:])[0][0]).abs().max() <= 1e-9


def test_gradients_flow_from_a_state_of_single_tokens_on() -> None:
    model = small("lmm")
    x = example(model, 2, 20)
    with torch.no_grad():
        _, stepped = streamed(model, x[:, :7], [1] * 7)
        _, whole = model(x[:, :7])
    grads = []
    for state in (stepped, whole):
        model.zero_grad()
        torch.autograd.backward(streamed_from(model, x[:, 7:], [1, 12], state)[0].sin().sum())
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-9 * max(1.0, float(b.abs().max()))


def test_the_reference_kernel_writes_every_token() -> None:
    b = tg.Builder(dim=8)
    x = b.input("x", ["B", "T", "dim"])
    memory = b.add("memory.neural", write=x, heads=2, chunk=4, kernel="reference")
    b.output(memory.recall)
    model = b.build().double().requires_grad_(False)
    tokens = torch.randn(1, 6, 8, dtype=torch.float64)
    y, state = streamed(model, tokens, [1] * 6)
    assert not any("ring.shares" in node for node in held(state).held.values())
    assert (y - model(tokens)[0]).abs().max() <= 1e-9


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_single_tokens_take_part_in_activation_checkpointing(kernel: str) -> None:
    """The memory's own gradient is taken where hooks on saved tensors would forbid that."""
    model = memory_alone(kernel)
    x = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    leaves = [x, *model.parameters()]

    def gradients(call: Callable[..., Any]) -> list[torch.Tensor]:
        state, total = None, torch.zeros((), dtype=torch.float64)
        for t in range(x.shape[1]):
            y, state = call(x[:, t : t + 1], state)
            total = total + y.square().sum()
        return list(torch.autograd.grad(total, leaves))

    wanted = gradients(model)
    for found in (gradients(lambda *a: checkpoint(model, *a, use_reentrant=False)), under_hooks(gradients, model)):
        assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_hooks_on_saved_tensors_do_not_make_single_tokens_record(mode: Callable[[], Any]) -> None:
    model, x = memory_alone("reference"), torch.randn(1, 1, 4, dtype=torch.float64)
    with mode(), torch.autograd.graph.save_on_cpu():
        y, state = model(x)
    assert not y.requires_grad
    assert y.is_inference() == (mode is torch.inference_mode)
    assert not any(t.requires_grad for tensors in state.nodes.values() for t in tensors.values())


def memory_alone(kernel: str) -> tg.Model:
    """One memory, in float64."""
    b = tg.Builder(dim=4)
    b.output(b.add("memory.neural", b.input("x", ["B", "T", "dim"]), heads=2, chunk=3, kernel=kernel).recall)
    model: tg.Model = b.build().double()
    return model


def under_hooks(run: Callable[..., list[torch.Tensor]], model: tg.Model) -> list[torch.Tensor]:
    """``run(model)`` while what is saved for the backward pass goes to the CPU."""
    with torch.autograd.graph.save_on_cpu():
        return run(model)
