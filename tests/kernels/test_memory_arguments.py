"""What is no tensor is refused by name, with the shape that is wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import titans_graph as tg
from titans_graph.errors import UsageError


def call(**changed: Any) -> Any:
    given: dict[str, Any] = {name: torch.zeros(2, 3, 5, 4) for name in "qkv"}
    given["step"] = torch.zeros(2, 3, 5)
    weights = {"w": torch.zeros(2, 3, 4, 4)}
    return tg.neural_memory("linear", weights, **(given | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"step": 0.1}, r"step must be a tensor \[2, 3, 5\], for example torch.full\(\(2, 3, 5\), 0.1\), not 0.1"),
        ({"step": None}, r"step must be a tensor \[2, 3, 5\], not None"),
        ({"log_momentum": -1}, r"log_momentum must be a tensor \[2, 3, 5\], for example"),
        ({"log_keep": [0.0]}, r"log_keep must be a tensor \[2, 3, 5\], not \[0.0\]"),
        ({"k": "k"}, r"k must be a tensor \[2, 3, 5, 4\], not 'k'"),
        ({"q": 1.0}, r"q must be a tensor \[B, H, T, d\], not a float"),
        ({"q": torch.zeros(3)}, r"q must be a tensor \[B, H, T, d\], not of shape \[3\]"),
    ],
)
def test_numbers_in_place_of_tensors(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(**changed)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "weights must be a mapping of names to tensors .*, not a list"),
        (torch.zeros(3), "weights must be a mapping of names to tensors .*, not a Tensor"),
        ({"w": 1.0}, r"weights\['w'\] must be a tensor \[B, H, \*shape\], not 1.0"),
    ],
)
def test_weights_that_are_no_mapping_of_tensors(weights: Any, message: str) -> None:
    x = torch.zeros(2, 3, 5, 4)
    with pytest.raises(UsageError, match=message):
        tg.neural_memory("linear", weights, x, x, x, step=x[..., 0])
    with pytest.raises(UsageError, match=message):
        tg.MemoryState.initial(weights)
    with pytest.raises(UsageError, match=message.replace("weights", "momenta")):
        tg.MemoryState.initial({"w": torch.zeros(1)}, weights)


@pytest.mark.parametrize("state", ["x", (1, 2), {"weights": {}}])
def test_a_state_of_another_kind(state: Any) -> None:
    with pytest.raises(UsageError, match=r"state must be a MemoryState, .*, not a (str|tuple|dict)"):
        call(state=state)


@pytest.mark.parametrize("tokens", [4, 5])
@pytest.mark.parametrize("kernel", ["reference", "chunk"])
def test_results_may_be_changed_in_place(kernel: str, tokens: int) -> None:
    """Whole chunks or not: as results of torch's own operations, with the same gradients."""
    found = []
    for inplace in (False, True):
        x = (torch.arange(24.0 * tokens).reshape(2, 3, tokens, 4) / 100).requires_grad_()
        start = {"w": torch.zeros(2, 3, 4, 4)}
        y, state = tg.neural_memory("linear", start, x, x, x, step=x[..., 0].detach() / 10, chunk=4, kernel=kernel)
        w = state.weights["w"]
        if inplace:
            y += 1
            w.mul_(0.5)
        else:
            y, w = y + 1, w * 0.5
        found.append(torch.autograd.grad(y.square().sum() + w.square().sum(), x)[0])
    assert torch.equal(found[0], found[1])


def test_the_gates_that_may_be_left_out_may() -> None:
    y, _ = call(log_momentum=None, log_keep=None)
    assert y.shape == (2, 3, 5, 4)


def test_packed_documents_refuse_the_same() -> None:
    x = torch.zeros(1, 2, 6, 4)
    step: Any = x[..., 0]
    for weights in ([1], {"w": 1.0}):
        with pytest.raises(UsageError, match=r"weights.* must be a"):
            tg.neural_memory_packed("linear", weights, x, x, x, step=step, cu_seqlens=torch.tensor([0, 6]))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"cu_seqlens must be a tensor of whole numbers \[S \+ 1\], not \[0, 6\]"):
        tg.neural_memory_packed("linear", {"w": x}, x, x, x, step=step, cu_seqlens=[0, 6])  # type: ignore[arg-type]
    ends: Any = {"cu_seqlens": torch.tensor([0, 6]), "step": 0.1}
    with pytest.raises(UsageError, match=r"step must be a tensor \[1, 2, 6\]"):
        tg.neural_memory_packed("linear", {"w": torch.zeros(1, 2, 4, 4)}, x, x, x, **ends)
