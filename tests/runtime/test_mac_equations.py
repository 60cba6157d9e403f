"""The paper's equations on ragged documents: packed into rows and cut into calls, in fp64, outputs and all gradients.

``test_paper.py`` compares one row read in one call; here the grid, the state and the documents take part as well.
"""

from __future__ import annotations

import pytest
import torch

from tests.models import SMALL, example, small, streamed
from tests.runtime import paper

LOOPS = {"mac": paper.mac, "mag": paper.mag, "mal": paper.mal}
# Lengths of the documents of each row: shorter than a chunk (4), inside and across segments (8).
ROWS = ([3, 9, 5], [11, 1, 5])
PARTS = [2, 7, 1, 7]


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("parts", [[17], PARTS], ids=["one call", "four calls"])
def test_ragged_documents_equal_the_equations(name: str, parts: list[int]) -> None:
    model = small(f"blocks/{name}", seed=5)
    x = example(model, len(ROWS), 17, seed=2).requires_grad_()
    document = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in ROWS])
    ours, _ = streamed(model, x, parts, document)
    loop = LOOPS[name]
    theirs = torch.stack(
        [torch.cat([loop(model.body, d, SMALL) for d in torch.split(x[i], list(row))]) for i, row in enumerate(ROWS)]
    )
    assert (ours - theirs).abs().max() <= 1e-9 * float(theirs.detach().abs().max())

    names = ["x", *(n for n, _ in model.named_parameters())]
    weight = torch.randn(ours.shape, dtype=torch.float64)
    grads = [torch.autograd.grad((y * weight).sum(), [x, *model.parameters()]) for y in (ours, theirs)]
    for n, a, b in zip(names, *grads, strict=True):
        assert float(b.abs().max()) > 0, n
        assert (a - b).abs().max() <= 1e-9 * float(b.abs().max()), n
