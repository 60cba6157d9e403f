"""What benchmarks/gpu.py measures: its rows with their targets, the check each one has to pass, and the clocks.

Rates are per head-token: one token of one head. Operations per head-token are those of the dense chunk-parallel form
(docs/kernels.md).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_graph.kernels.memory import memory_scan
from titans_graph.kernels.networks import parse_network

REPEATS = 25
FLUSH_BYTES = 1 << 28
"""Written before each timed run: more than any L2 holds."""

BARS = {"y": 0.005, "whole": 0.005, "states": 0.015, "d_q": 0.01, "d_k": 0.01, "d_v": 0.01,
        "d_step": 0.02, "d_log_momentum": 0.02, "d_log_keep": 0.02, "d_weights": 0.02}  # fmt: skip
"""RMS of the error over RMS of the reference that operands of 16 bits may have."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a memory, a shape, and what is aimed at.

    ``unit`` "ms" (at most ``target``) or "M/s" (millions of head-tokens a second, at least ``target``). ``anchor``: what
    others reach, in words.
    """

    key: str
    title: str
    dim: int
    hidden: int
    heads: int
    tokens: int
    batch: int
    backward: bool
    unit: str
    target: float
    stretch: float
    anchor: str
    chunk: int = 64

    @property
    def network(self) -> str:
        """The memory network as the operators know it."""
        network = {"mlp": {"depth": 2, "hidden": self.hidden}} if self.hidden else "linear"
        return parse_network(network).text()

    @property
    def head_tokens(self) -> int:
        """Tokens times heads of one run."""
        return self.batch * self.heads * self.tokens

    @property
    def operations(self) -> float:
        """Floating-point operations per head-token, backward with recomputation."""
        d, h, c = self.dim, self.hidden, self.chunk
        first, total, io = (d * h, 2 * d * h, 2 * (d + h)) if h else (d * d, d * d, 2 * d)
        forward = 12 * total - 2 * first + 2 * c * io + 2 * c * c
        back = 20 * total + 4 * (total - first) + 4 * c * io + 6 * c * c
        return float(2 * forward + back if self.backward else forward)


GDN = "Gated DeltaNet on an H200:"
ROWS = (
    Row("linear_forward", "linear d 128, 32 heads, 1 x 8192, forward", 128, 0, 32, 8192, 1, False, "ms", 0.60, 0.35,
        f"{GDN} fla 0.500 ms, FlashQLA 0.283 ms"),
    Row("linear_training", "linear d 128, 32 heads, 1 x 32768, forward + backward", 128, 0, 32, 32768, 1, True, "ms", 9.0, 5.0,
        f"{GDN} fla 7.64 ms, FlashQLA 3.40 ms"),
    Row("deep256_forward", "deep 64-256-64, 128 rows x heads, forward", 64, 256, 16, 4096, 8, False, "M/s", 263, 440,
        "small-chunk deep memories: 5-10 % of peak"),
    Row("deep128_forward", "deep 64-128-64, 128 rows x heads, forward", 64, 128, 16, 4096, 8, False, "M/s", 500, 800,
        "small-chunk deep memories: 5-10 % of peak"),
    Row("deep256_training", "deep 64-256-64, 128 rows x heads, forward + backward", 64, 256, 16, 4096, 8, True, "M/s", 60, 110,
        "none published"),
)  # fmt: skip

STATE = ("anchor", "weights", "momenta", "initial_weights", "initial_momenta")


@dataclass
class Inputs:
    """Everything ``memory_scan`` takes, in its order; leaves ask for gradients where asked to."""

    state: list[list[Tensor]]
    tokens: list[Tensor]
    valid: Tensor
    position: Tensor

    def leaves(self) -> list[Tensor]:
        """q, k, v, the gates, and the weights before the first token."""
        return [*self.tokens, *self.state[3]]

    def to(self, dtype: torch.dtype | None = None, gates: torch.dtype | None = None) -> Inputs:
        """A copy with tokens in one type, gates and state in another, that asks for gradients."""

        def leaf(x: Tensor, kind: torch.dtype | None) -> Tensor:
            return x.detach().to(kind or x.dtype).clone().requires_grad_()

        tokens = [leaf(x, dtype if x.dim() == 4 else gates) for x in self.tokens]
        return Inputs([[leaf(x, gates) for x in xs] for xs in self.state], tokens, self.valid, self.position)


def make(row: Row, dtype: torch.dtype, device: str, *, lost: int = 0) -> Inputs:
    """Random inputs: unit keys and queries, gates as a trained model has them; the last ``lost`` slots hold no token."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    lead = row.batch, row.heads, row.tokens
    q, k, v = (normal(*lead, row.dim) for _ in range(3))
    streams = [F.normalize(q, dim=-1).to(dtype), F.normalize(k, dim=-1).to(dtype), v.to(dtype)]
    gates = [0.01 * normal(*lead).sigmoid(), F.logsigmoid(normal(*lead)) - 0.1, F.logsigmoid(normal(*lead) + 6)]
    shapes = parse_network(row.network).weights(row.dim).values()
    weights = [normal(*lead[:2], *shape) / shape[0] ** 0.5 for shape in shapes]
    zeros = [torch.zeros_like(x) for x in weights]
    place = torch.arange(row.tokens, device=device).expand(row.batch, row.tokens)
    state = [zeros, zeros, zeros, weights, zeros]
    return Inputs([list(x) for x in state], [*streams, *gates], place < row.tokens - lost, place)


Scanned = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]


def scan(row: Row, x: Inputs, kernel: str, **options: bool) -> Scanned:
    """The memory over all tokens; documents begin at position 0, so the state is the initial one."""
    call: Any = memory_scan  # with unpacked arguments, which no checker follows
    form = row.network, "l2", "after", row.chunk, False
    result: Scanned = call(*form, *x.state, *x.tokens, x.valid, x.position, kernel=kernel, **options)
    return result


def check(row: Row, dtype: torch.dtype, device: str, tokens: int, lost: int, *, gradients: bool) -> dict[str, float]:
    """Errors of outputs, final states and, if asked for, gradients against the recurrence in fp64, token by token.

    The same kernels as in the row, over fewer rows and ``tokens`` slots of which the last ``lost`` are empty.
    """
    small = replace(row, batch=2, heads=2, tokens=tokens)
    given = make(small, dtype, device, lost=lost)
    found, wanted = (_results(small, given, dtype, kernel, gradients) for kernel in ("triton", "reference"))
    return {name: _far(found[name], wanted[name]) for name in wanted}


def _results(row: Row, given: Inputs, dtype: torch.dtype, kernel: str, gradients: bool) -> dict[str, Tensor]:
    exact = kernel == "reference"
    x = given.to(torch.float64, torch.float64) if exact else given.to(dtype, torch.float32)
    options = {} if exact else {"resumed": False}
    with torch.set_grad_enabled(gradients):
        y, _, weights, momenta = scan(row, x, kernel, **options)
    outputs = [y, *weights, *momenta]
    result = {"y": y.detach().double(), "states": _one(outputs[1:])}
    if not gradients:
        return result
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.device).to(dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, x.leaves(), [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)])
    names = ("d_q", "d_k", "d_v", "d_step", "d_log_momentum", "d_log_keep")
    return result | {name: grad.double() for name, grad in zip(names, grads[:6], strict=True)} | {"d_weights": _one(grads[6:])}


def _one(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([x.detach().double().flatten() for x in tensors])


def _far(a: Tensor, b: Tensor) -> float:
    error = (a - b).square().mean().sqrt() / b.square().mean().sqrt()
    return float(error) if bool(a.isfinite().all()) else float("inf")


def check_whole(row: Row, x: Inputs) -> float:
    """How far the last row and head of the whole call are from a call of their own: addresses beyond small sizes."""
    last = Inputs([[w[-1:, -1:] for w in xs] for xs in x.state], [t[-1:, -1:] for t in x.tokens], x.valid[-1:], x.position[-1:])
    with torch.no_grad():
        whole, alone = (scan(row, given, "triton", resumed=False)[0].double() for given in (x, last))
    return _far(whole[-1:, -1:], alone) if bool(whole.isfinite().all()) else float("inf")


def runner(row: Row, x: Inputs) -> Callable[[], object]:
    """One run of the row: forward without gradients, or forward and the gradients of all inputs."""
    if not row.backward:
        return torch.no_grad()(lambda: scan(row, x, "triton", resumed=False)[0])
    cotangent = torch.randn_like(x.tokens[0])

    def training() -> object:
        y = scan(row, x, "triton", resumed=False)[0]
        return torch.autograd.grad(y, x.leaves(), cotangent)

    return training


def graphed(run: Callable[[], object]) -> tuple[Callable[[], None], str]:
    """The run as a CUDA graph, or as it is where it cannot be captured, with the reason."""
    cuda: Any = torch.cuda
    stream = cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except Exception as error:  # whatever cannot be captured
        torch.cuda.synchronize()
        return lambda: (run(), None)[1], f"no CUDA graph: {type(error).__name__}: {str(error)[:200]}"
    return graph.replay, ""


def milliseconds(run: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Times of single runs, each after the L2 was filled with something else."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    event: Any = torch.cuda.Event
    times = []
    for _ in range(3):
        run()
    for _ in range(repeats):
        flush.zero_()
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)))
    return times


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that one run needs beyond what was there before it, its results included."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def matmul_peak(size: int = 8192) -> float:
    """Operations a second of bf16 matrix products on this card, now."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * size**3 / (1e-3 * statistics.median(milliseconds(lambda: torch.mm(a, b, out=out))))


def kernel_times(run: Callable[[], object]) -> dict[str, float]:
    """Microseconds of each kernel in one run, the longest first; empty where the profiler does not work here."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize()
        found = {e.key: float(getattr(e, "self_device_time_total", 0.0)) for e in seen.key_averages()}
    except Exception as error:  # a driver without rights to profile
        return {f"not profiled: {error}"[:200]: 0.0}
    return dict(sorted(((k, v) for k, v in found.items() if v), key=lambda item: -item[1])[:20])
