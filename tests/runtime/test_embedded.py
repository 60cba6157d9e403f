"""A model inside a module of somebody else's: frozen, with layers exchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
