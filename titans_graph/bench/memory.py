"""What a neural memory costs on a CPU: its share of the same run's matrix products, memory per token, time per token.

Everything is measured on one thread, with denormals flushed, for one case: H heads, d -> m -> d, momentum and
forgetting, float32. Operations are counted from the formulas of a dense chunk-parallel form with recomputation; see
:func:`operations`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_graph.bench.layer import resident
from titans_graph.kernels.memory_function import MemoryState, fast_weights, neural_memory


@dataclass(frozen=True)
class Case:
    """Sizes of the memory that is measured: ``heads`` of ``dim -> hidden -> dim``, ``batch`` rows, chunks of ``chunk``."""

    batch: int = 1
    heads: int = 4
    dim: int = 64
    hidden: int = 256
    chunk: int = 64
    kernel: str = "compiled"

    @property
    def network(self) -> dict[str, Any]:
        """The memory network."""
        return {"mlp": {"depth": 2, "hidden": self.hidden}}


def operations(case: Case) -> tuple[float, float]:
    """Floating-point operations per head and token, forward and backward; a multiply-add counts two.

    With P all weights, P1 those of the first layer, io the sum of all layers' inputs and outputs, C the chunk:
    forward 12 P - 2 P1 + 2 C io + 2 C^2; backward 20 P + 4 (P - P1) + 4 C io + 6 C^2 and one more forward.
    """
    first = case.dim * case.hidden
    total, io, c = 2 * first, 2 * (case.dim + case.hidden), case.chunk
    forward = 12 * total - 2 * first + 2 * c * io + 2 * c**2
    return float(forward), float(20 * total + 4 * (total - first) + 4 * c * io + 6 * c**2 + forward)


@dataclass
class Inputs:
    """Random unit keys and queries, values, gates as a trained model has them, and weights; all ask for gradients."""

    streams: list[Tensor]
    gates: dict[str, Tensor]
    weights: dict[str, Tensor]

    @classmethod
    def make(cls, case: Case, tokens: int) -> Inputs:
        """Inputs of ``tokens`` tokens: momentum near 0.45, keep near 0.9975, a step that is stable at chunk 64."""
        g = torch.Generator().manual_seed(0)
        shape = case.batch, case.heads, tokens
        q, k, v = (torch.randn(*shape, case.dim, generator=g) for _ in range(3))
        gates = {
            "step": 0.01 * torch.rand(shape, generator=g),
            "log_momentum": F.logsigmoid(torch.randn(shape, generator=g)) - 0.1,
            "log_keep": F.logsigmoid(torch.randn(shape, generator=g) + 6),
        }
        weights = {
            n: torch.randn(*shape[:2], *s, generator=g) / s[0] ** 0.5 for n, s in fast_weights(case.network, case.dim).items()
        }
        inputs = cls([F.normalize(q, dim=-1), F.normalize(k, dim=-1), v], gates, weights)
        for x in inputs.leaves():
            x.requires_grad_()
        return inputs

    def leaves(self) -> list[Tensor]:
        """All tensors."""
        return [*self.streams, *self.gates.values(), *self.weights.values()]


def forward(case: Case, inputs: Inputs) -> tuple[Tensor, MemoryState]:
    """The memory over all tokens."""
    gates: Any = inputs.gates
    return neural_memory(case.network, inputs.weights, *inputs.streams, **gates, chunk=case.chunk, kernel=case.kernel)


def inference(case: Case, inputs: Inputs) -> None:
    """Forward alone."""
    with torch.no_grad():
        forward(case, inputs)


def training(case: Case, inputs: Inputs) -> None:
    """Forward and backward, with the gradients of all inputs."""
    y, _ = forward(case, inputs)
    torch.autograd.backward(y, torch.ones_like(y))
    for x in inputs.leaves():
        x.grad = None


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def product_rate(size: int = 1024) -> float:
    """Operations a second of float32 matrix products of ``size``, on the present number of threads."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    return 2.0 * size**3 / min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(3))


def shares(case: Case, tokens: int, rounds: int) -> dict[str, float]:
    """Medians over ``rounds`` alternations of products, forward, and forward with backward, at ``tokens`` tokens."""
    inputs = Inputs.make(case, tokens)
    inference(case, inputs)
    training(case, inputs)
    ahead, back = (case.batch * case.heads * tokens * f for f in operations(case))
    rows = []
    for _ in range(rounds):
        rate = product_rate()
        once, both = seconds(lambda: inference(case, inputs)), seconds(lambda: training(case, inputs))
        rows.append((rate, once, both, ahead / once / rate, (ahead + back) / both / rate))
    names = "product_rate", "forward_seconds", "training_seconds", "forward_share", "training_share"
    return dict(zip(names, (statistics.median(column) for column in zip(*rows, strict=True)), strict=True))


def peak_memory(case: Case, tokens: int) -> int:
    """Peak resident bytes of a fresh process that runs forward and backward once over ``tokens`` tokens."""
    command = [sys.executable, "-m", __name__, json.dumps([asdict(case), tokens])]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak_inside(case: Case, tokens: int) -> int:
    """What :func:`peak_memory` runs in the fresh process; compilation happens on a few chunks first.

    Not the peak that rusage tells: a child's starts at its parent's.
    """
    training(case, Inputs.make(case, 2 * case.chunk))
    training(case, Inputs.make(case, tokens))
    return resident("VmHWM")


def growth(case: Case, lengths: list[int]) -> dict[str, float]:
    """Bytes of peak memory per head and token between each two lengths, forward and backward."""
    peaks = [peak_memory(case, n) for n in lengths]
    heads = case.batch * case.heads
    pairs = zip(lengths, lengths[1:], peaks, peaks[1:], strict=False)
    return {f"{a}-{b}": (q - p) / (heads * (b - a)) for a, b, p, q in pairs}


def per_token(case: Case, lengths: list[int], rounds: int) -> dict[str, float]:
    """Microseconds per token of forward and backward at each length, medians over alternations.

    In each, short lengths are run until they have read as much as the second longest: a moment says little of a machine.
    """
    cases = {n: Inputs.make(case, n) for n in lengths}
    times: dict[int, list[float]] = {n: [] for n in lengths}
    for inputs in cases.values():
        training(case, inputs)
    least = sorted(lengths)[-2] if len(lengths) > 1 else 0
    for _ in range(rounds):
        for n, inputs in cases.items():
            runs = max(1, least // n)
            spent = sum(seconds(lambda inputs=inputs: training(case, inputs)) for _ in range(runs))  # type: ignore[misc]
            times[n].append(spent / runs / n * 1e6)
    return {str(n): statistics.median(t) for n, t in times.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    sizes, count = json.loads(sys.argv[1])
    print(peak_inside(Case(**sizes), count))
