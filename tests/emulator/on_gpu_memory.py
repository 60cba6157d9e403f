"""The memory's compiled kernels at the sizes they are made for, in bf16, on the emulated GPU (test_emulated_gpu.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.test_triton_memory import far, run, spread, tame

SIZES: dict[str, tuple[Any, dict[str, int]]] = {
    "64-256-64": ({"mlp": {"hidden": 256}}, {"chunk": 64, "slots": 128, "dim": 64}),
    "64-128-64": ({"mlp": {"hidden": 128}}, {"chunk": 64, "slots": 128, "dim": 64}),
    "128-256-128": ({"mlp": {"hidden": 256}}, {"chunk": 64, "slots": 128, "dim": 128}),
    "64-64-64, chunk 128": ({"mlp": {"hidden": 64}}, {"chunk": 128, "slots": 256, "dim": 64}),
    "linear 128": ("linear", {"chunk": 64, "slots": 192, "dim": 128}),
    "linear 64": ("linear", {"chunk": 64, "slots": 192, "dim": 64}),
}
QUICK = ("64-256-64", "linear 128")

BARS = {"y": 0.005, "final states": 0.015, "initial states": 0.01, "q k v": 0.01, "gates": 0.02}
"""RMS of the error over RMS of the reference (fp64)."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.nightly]) for n in SIZES])
@pytest.mark.parametrize("resumed", [False, True], ids=["whole chunks", "resumed"])
def test_half_precision_at_full_size(name: str, resumed: bool) -> None:
    """Forward and backward; also of rows that begin and end inside a chunk, with NaN in every slot without a token."""
    network, sizes = SIZES[name]
    case = tame(network, bounded=resumed, heads=1, batch=1, **sizes)
    if resumed:
        case = spread(case, (5,), (sizes["slots"] - 3,))
    else:
        case = case._replace(state=case.state | {"anchor": case.state["weights"]})
    case = case._replace(tokens=case.tokens | {n: case.tokens[n].bfloat16().double() for n in "qkv"})
    got = run(case, "triton", torch.bfloat16, poison=resumed, resumed=resumed)
    want = run(case, "chunk", torch.bfloat16, resumed=resumed)
    errors = [far(a, b) for a, b in zip(got, want, strict=True)]
    n = 3 * len(case.state["weights"])
    found = {
        "y": errors[0],
        "final states": max(errors[1 : 1 + n]),
        "initial states": max(errors[1 + n : -6]),
        "q k v": max(errors[-6:-3]),
        "gates": max(errors[-3:]),
    }
    print(f"{name}: {', '.join(f'{k} {v:.4f}' for k, v in found.items())}")
    assert all(found[k] <= bar for k, bar in BARS.items()), found
