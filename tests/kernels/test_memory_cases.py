"""Random cases of a memory scan, and the comparison with the token-by-token truth; shared by the memory tests."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_graph.kernels.memory import memory_scan
from titans_graph.kernels.networks import Family, parse_network, register

OUTPUT_BAR, GRADIENT_BAR = 1e-9, 1e-8


STATE = ("anchor", "weights", "momenta", "initial_weights", "initial_momenta")


class Case(NamedTuple):
    """Arguments of one scan: the static ones, and all tensors by name."""

    network: str
    objective: str
    read: str
    chunk: int
    bounded: bool
    state: dict[str, list[Tensor]]
    tokens: dict[str, Tensor]
    valid: Tensor
    position: Tensor

    def leaves(self) -> list[Tensor]:
        """Every floating argument."""
        return [x for values in self.state.values() for x in values] + list(self.tokens.values())


def make(
    network: Any = "linear",
    objective: Any = "l2",
    read: str = "after",
    chunk: int = 4,
    slots: int = 12,
    bounded: bool = False,
    batch: int = 2,
    heads: int = 2,
    dim: int = 3,
    seed: int = 0,
) -> Case:
    """A random case of whole chunks from position 0, every argument requiring gradients."""
    g = torch.Generator().manual_seed(seed)
    shapes = parse_network(network).weights(dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    state = {n: [normal(batch, heads, *s) * 0.5 for s in shapes.values()] for n in STATE}
    tokens = {n: normal(batch, heads, slots, dim) * 0.7 for n in ("q", "k", "v")}
    tokens["step"] = normal(batch, heads, slots).sigmoid() * 0.1
    tokens["log_momentum"] = torch.nn.functional.logsigmoid(normal(batch, heads, slots))
    tokens["log_keep"] = torch.nn.functional.logsigmoid(normal(batch, heads, slots) + 2)
    case = Case(
        network if isinstance(network, str) else json.dumps(network),
        objective if isinstance(objective, str) else json.dumps(objective),
        read,
        chunk,
        bounded,
        state,
        tokens,
        torch.ones(batch, slots, dtype=torch.bool),
        torch.arange(slots).expand(batch, slots).contiguous(),
    )
    for leaf in case.leaves():
        leaf.requires_grad_()
    return case


def call(case: Case, kernel: str = "chunk") -> list[Tensor]:
    """All results of the scan, flat."""
    scan: Any = memory_scan  # Called with unpacked arguments, which no checker follows.
    static = case.network, case.objective, case.read, case.chunk, case.bounded
    arguments = *static, *case.state.values(), *case.tokens.values(), case.valid, case.position
    y, *ends = scan(*arguments, kernel=kernel)
    return [y, *(x for end in ends for x in end)]


def gradients(case: Case, results: list[Tensor], seed: int = 5) -> list[Tensor]:
    """Gradients of a random projection of all results by every floating argument."""
    g = torch.Generator().manual_seed(seed)
    total = sum((r * torch.randn(r.shape, generator=g, dtype=r.dtype)).sum() for r in results)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, case.leaves(), allow_unused=True, materialize_grads=True))


def assert_close(got: list[Tensor], want: list[Tensor], bar: float) -> None:
    """Largest error relative to max(1, RMS of the truth), tensor by tensor."""
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        error = float((a - b).detach().abs().max()) / max(1.0, float(b.detach().square().mean().sqrt()))
        assert error <= bar, f"result {i}: error {error:.2e}"


def assert_matches_reference(case: Case, kernel: str = "chunk") -> None:
    """Outputs, final states and all gradients agree with the token-by-token truth."""
    got, want = call(case, kernel), call(case, "reference")
    assert_close(got, want, OUTPUT_BAR)
    assert_close(gradients(case, got), gradients(case, want), GRADIENT_BAR)


TIED = Family(
    {},
    lambda options: {
        "nodes": {
            "w": {"use": "fast.linear"},
            "gain": {"use": "fast.gain"},
            "bias": {"use": "fast.bias"},
            "act": {"use": "silu"},
            "again": {"use": "fast.linear", "weight": "w"},
            "sum": {"use": "add", "in": ["again", "x"]},
            "shift": {"use": "fast.bias", "weight": "bias"},
        }
    },
)
"""One matrix used twice, a gain, and a bias used twice, at different places."""
register("test_tied", TIED)


def largest_at_half_cap(network: Any, keys: str, momentum: float, slots: int, seed: int) -> float:
    """The largest output, weight or momentum of a memory over unit keys (``random``, or one ``repeated``), nothing forgotten.

    The step is half of what the like keys of a chunk of 64, up to the token's own, allow at momentum 0.9.
    """
    dim, chunk = 16, 64
    g = torch.Generator().manual_seed(seed)
    parsed = parse_network(network)
    initial = [parsed.initialise(n, s, g)[None, None] for n, s in parsed.weights(dim).items()]
    zeros = [torch.zeros_like(w) for w in initial]
    q, k, v = (torch.nn.functional.normalize(torch.randn(1, 1, slots, dim, generator=g), dim=-1) for _ in range(3))
    if keys == "repeated":
        k = k[:, :, :1].expand_as(k)
    blocks = k.view(1, 1, -1, chunk, dim)
    similarity = (blocks @ blocks.mT).abs().tril().sum(-1).view(1, 1, slots)
    # For equal keys the sum of 1 / r over a chunk grows like ln C; without the logarithm a linear memory diverges.
    step = 0.5 * (1 - 0.9) / (2 * similarity * (1 + similarity.log()))
    log_momentum = torch.full_like(step, momentum).log()
    valid, position = torch.ones(1, slots, dtype=torch.bool), torch.arange(slots)[None]
    with torch.no_grad():
        y, _, weights, momenta = memory_scan(
            parsed.text(), "l2", "after", chunk, True, initial, initial, zeros,
            initial, zeros, q, k, v, step, log_momentum, torch.zeros_like(step), valid, position,
        )  # fmt: skip
    return max(float(x.abs().max()) for x in (y, *weights, *momenta))
