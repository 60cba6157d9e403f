"""MAC, MAG and MAL are the paper's: outputs and all gradients equal plain loops over tokens, in fp64."""

from __future__ import annotations

import pytest
import torch

from tests.models import SMALL, example, small
from tests.runtime import paper

LOOPS = {"mac": paper.mac, "mag": paper.mag, "mal": paper.mal}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("tokens", [1, 5, 8, 19])
def test_the_block_equals_the_equations(name: str, tokens: int) -> None:
    model = small(f"blocks/{name}", seed=3)
    x = example(model, 1, tokens, seed=1).requires_grad_()
    weight = torch.randn(tokens, SMALL["dim"], dtype=torch.float64)
    results = []
    for y in (model(x)[0][0], LOOPS[name](model.body, x[0], SMALL)):
        inputs = [x, *model.parameters()]
        grads = torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
        results.append((y.detach(), grads))
    assert (results[0][0] - results[1][0]).abs().max() <= 1e-9
    names = ["x", *(n for n, _ in model.named_parameters())]
    for n, a, b in zip(names, results[0][1], results[1][1], strict=True):
        assert (a - b).abs().max() <= 1e-9 * max(1.0, float(b.square().mean().sqrt())), n
