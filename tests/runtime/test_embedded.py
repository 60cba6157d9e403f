"""A model inside a module of somebody else's: frozen, with layers exchanged, under torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import titans_graph as tg
from tests.models import BLOCKS, example, small


class Wrapped(nn.Module):
    """A linear layer behind one that says nothing of its sizes, as adapters and quantised layers may be."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        """As the layer inside."""
        return self.inner(x)


def tensors(state: tg.State) -> list[Tensor]:
    return [t for node in state.nodes.values() for t in node.values()]


@pytest.mark.parametrize("name", BLOCKS)
def test_a_frozen_model_keeps_no_history(name: str) -> None:
    """Else whoever streams through a frozen model keeps everything that was ever read."""
    model = small(name).requires_grad_(False)
    x = example(model, 2, 11)
    y, state = model(x)
    y, state = model(x, state)
    assert not y.requires_grad
    assert not any(t.requires_grad for t in tensors(state))


def test_gradients_reach_what_asks_for_them_through_a_frozen_model() -> None:
    model = small("blocks/mac")
    x = example(model, 2, 21).requires_grad_()
    wanted = torch.autograd.grad(model(x)[0].square().sum(), x)[0]
    model.requires_grad_(False)
    first, state = model(x[:, :9])
    assert any(t.requires_grad for t in tensors(state))
    rest, _ = model(x[:, 9:], state)
    found = torch.autograd.grad(torch.cat([first, rest], 1).square().sum(), x)[0]
    assert torch.allclose(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", BLOCKS)
def test_linear_layers_may_be_exchanged(name: str) -> None:
    model = small(name)
    x = example(model, 2, 11)
    wanted, _ = model(x)
    layers = [(module, key) for module in model.modules() for key, child in module.named_children() if type(child) is nn.Linear]
    for module, key in layers:
        setattr(module, key, Wrapped(getattr(module, key)))
    first, state = model(x[:, :3])
    rest, _ = model(x[:, 3:], state)
    assert torch.allclose(torch.cat([first, rest], 1), wanted, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch's own jvp
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_model_of_reference_memories_can_be_transformed(tokens: int) -> None:
    b = tg.Builder(dim=4)
    b.output(b.add("memory.neural", b.input("x", ["B", "T", "dim"]), heads=2, chunk=4, kernel="reference").recall)
    model: tg.Model = b.build().double()
    x = torch.randn(3, tokens, 4, dtype=torch.float64)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        y, _ = functional_call(model, weights, (row[None],))
        total: Tensor = y.square().sum()
        return total

    rows = vmap(grad(loss), (None, 0))(weights, x)
    wanted = torch.autograd.grad(model(x)[0].square().sum(), list(model.parameters()))
    for name, gradient in zip(weights, wanted, strict=True):
        assert torch.allclose(rows[name].sum(0), gradient, rtol=0, atol=1e-9), name
    forward = jvp(lambda t: model(t)[0], (x,), (x,))[1]
    assert torch.allclose(torch.einsum("abcdef,def->abc", jacrev(lambda t: model(t)[0])(x), x), forward, rtol=0, atol=1e-9)


def test_another_memory_says_what_to_take_under_torch_func() -> None:
    model = small("blocks/lmm")
    with pytest.raises(tg.TitansGraphError, match=r"kernel='reference' under torch\.func"):
        vmap(lambda row: model(row[None])[0])(example(model, 2, 9))
