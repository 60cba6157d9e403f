"""The rows of benchmarks/gpu.py that compare with another form: decoding with an eager update, a layer with titans-pytorch.

Both sides are measured in the same run. titans-pytorch is taken where it can be imported; it is not installed here.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import gpu_rows as rows
from benchmarks.gpu_rows import Inputs, Row
from titans_graph.kernels.memory import memory_step
from titans_graph.kernels.memory_lazy import Lazy, begin, current, lazy_step, ready, slots_of

Result = dict[str, Any]

DECODE = Row(
    "decode",
    "decode deep 64-256-64, 128 rows x heads, one token",
    64,
    256,
    16,
    128,
    8,
    False,
    "x",
    2.0,
    2.5,
    "own eager update",
)
LAYER = Row(
    "titans_pytorch", "layer, 4 heads 64-256-64, against titans-pytorch", 64, 256, 4, 1024, 4, True, "x",
    50, 100, "titans-pytorch, same updates",
)  # fmt: skip
"""Short and narrow: its per-token gradients and weights take some 2 MB a token and head (7 GB for 1,024 tokens and 4 heads on
a CPU). Where they do not fit the batch is halved, for both."""


def compared(row: Row, value: float) -> Result:
    """A ratio beside what was aimed at."""
    verdict = (
        "stretch met" if value >= row.stretch else "met" if value >= row.target else f"MISSED by {row.target / value:.2f} x"
    )
    aims = {"unit": "x", "target": row.target, "stretch": row.stretch, "anchor": row.anchor}
    return {"value": value, **aims, "verdict": verdict}


class Stream:
    """Rows that read one token after another as the component ``memory.neural`` does, the state in float32."""

    def __init__(self, row: Row, x: Inputs) -> None:
        self.row, self.x, self.taken = row, x, 0
        self.start = list(x.state[3])
        rest = [torch.zeros_like(w) for w in self.start]
        self.state = begin(row.network, row.chunk, False, self.start, self.start, rest, reads=x.tokens[0].dtype)

    def ready(self, t: int) -> Lazy:
        """What runs before token ``t``, outside all compiled code: weights and anchors where they are due."""
        row, places = self.row, [t] * self.row.batch
        return ready(row.network, row.chunk, self.state, self.taken, places, self.start, "triton")[0]

    def due(self, t: int) -> bool:
        """Whether :meth:`ready` has anything to do."""
        return t % self.row.chunk == 0 or self.taken == slots_of(self.row.chunk)

    def step(self, state: Lazy, t: int) -> tuple[Tensor, Lazy]:
        """Token ``t``."""
        form: Any = self.row.network, "l2", "after", False
        call: Any = lazy_step  # called with unpacked arguments, which no checker follows
        with torch.no_grad():
            y, after = call(*form, state, *(s[:, :, t : t + 1] for s in self.x.tokens), kernel="triton")
        return y, after

    def read(self, t: int) -> Tensor:
        """Both, and go on from there."""
        due, state = self.due(t), self.ready(t)
        y, self.state = self.step(state, t)
        self.taken = 1 if due else self.taken + 1
        return y


def check_decode(row: Row, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Errors of decoding against the same recurrence in fp64, over two chunks."""
    small = replace(row, batch=2, heads=2, tokens=2 * row.chunk)
    given = rows.make(small, dtype, device)
    stream = Stream(small, given)
    given.state[3] = [w.float() for w in stream.start]
    x = given.to(torch.float64, torch.float64)
    with torch.no_grad():
        answers = torch.cat([stream.read(t) for t in range(small.tokens)], 2)
        y, _, weights, momenta = rows.scan(small, x, "reference")
        found = [w.double() for values in current(row.network, stream.state, "triton") for w in values]
    return {"y": rows._far(answers.double(), y), "states": rows._far(rows._one(found), rows._one([*weights, *momenta]))}


def measure_decode(dry: bool) -> Result:
    """One token of every row: what the lazy kernels take, averaged over a chunk, beside the update of every token."""
    row = DECODE
    if dry:
        small = replace(row, dim=16, hidden=32, chunk=16)
        errors = check_decode(small, torch.float32, "cpu")
    else:
        errors = check_decode(row, torch.bfloat16, "cuda")
    failed = sorted(name for name, error in errors.items() if not error <= rows.BARS[name])
    result: Result = {"title": row.title, "errors": errors, "failed": failed}
    if failed or dry:
        return result
    lazy, notes = lazy_milliseconds(row)
    eager = {name: statistics.median(rows.milliseconds(run)) for name, run in eager_steps(row).items()}
    result |= {"ms": lazy, "eager_ms": eager, "note": notes}
    return result | compared(row, min(eager.values()) / lazy)


def lazy_milliseconds(row: Row) -> tuple[float, str]:
    """The mean over all tokens of a chunk, the writing of weights and anchor included; every part is a CUDA graph."""
    stream = Stream(row, rows.make(row, torch.bfloat16, "cuda"))
    for t in range(row.chunk):
        stream.read(t)
    parts: list[Callable[[], object]] = []
    for t in range(row.chunk, 2 * row.chunk):
        state = stream.ready(t)
        if stream.due(t):
            before, taken = stream.state, stream.taken
            parts.append(partial(ready, row.network, row.chunk, before, taken, [t] * row.batch, stream.start, "triton"))
        parts.append(partial(stream.step, state, t))
        stream.read(t)
    times, notes = [], set()
    for part in parts:
        replay, note = rows.graphed(part)
        times.append(statistics.median(rows.milliseconds(replay, 5)))
        notes.add(note)
    return sum(times) / row.chunk, "; ".join(sorted(n for n in notes if n))


def eager_steps(row: Row) -> dict[str, Callable[[], object]]:
    """The update of every token, as PyTorch's operations and, where Inductor can, compiled; both as CUDA graphs.

    The state is in float32, as it is for the lazy form.
    """
    x = rows.make(row, torch.bfloat16, "cuda")
    tokens = [s[:, :, 70:71].contiguous() for s in x.tokens]
    anchor, rest = x.state[3:]
    args = (anchor, anchor, rest, anchor, rest, *tokens, x.valid[:, 70:71], x.position[:, 70:71].contiguous())
    step: Any = memory_step  # called with unpacked arguments, which no checker follows
    whole: Any = torch.compile(step, dynamic=False)

    def eager() -> object:
        with torch.no_grad():
            return step(row.network, "l2", "after", row.chunk, False, *args)

    def compiled() -> object:
        with torch.no_grad():
            return whole(row.network, "l2", "after", row.chunk, False, *args)

    found: dict[str, Callable[[], object]] = {"operations": rows.graphed(eager)[0]}
    try:
        compiled()
        found["compiled"] = rows.graphed(compiled)[0]
    except Exception as error:  # Inductor needs a C compiler and more, which a bare machine may lack
        print(f"decode: the eager update is not compiled: {type(error).__name__}: {str(error)[:200]}")
    return found


class Layer(nn.Module):
    """Projections and gates around the memory, as little as the layer it is compared with has at least."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row, self.width = row, row.heads * row.dim
        self.streams = nn.ModuleList(nn.Linear(self.width, self.width, bias=False) for _ in range(3))
        self.controls = nn.Linear(self.width, 3 * row.heads)
        x = rows.make(replace(row, tokens=row.chunk, batch=1), torch.float32, "cpu")
        self.initial = nn.ParameterList(nn.Parameter(w[0].clone()) for w in x.state[3])

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to the same."""
        row, lead = self.row, (x.shape[0], x.shape[1])
        q, k, v = (f(x).unflatten(-1, (row.heads, row.dim)).transpose(1, 2) for f in self.streams)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        theta, eta, keep = self.controls(x).float().unflatten(-1, (3, row.heads)).permute(2, 0, 3, 1)
        gates = [0.01 * theta.sigmoid(), F.logsigmoid(eta), F.logsigmoid(keep + 6)]
        start = [w.float().expand(x.shape[0], *w.shape) for w in self.initial]
        rest = [torch.zeros_like(w) for w in start]
        place = torch.arange(lead[1], device=x.device).expand(lead)
        valid = torch.ones(lead, dtype=torch.bool, device=x.device)
        y = rows.scan(row, Inputs([start, start, rest, start, rest], [q, k, v, *gates], valid, place), "triton", resumed=False)[
            0
        ]
        return y.transpose(1, 2).flatten(2)


def measure_layer(dry: bool) -> Result:
    """Time and memory of forward and backward of the two layers at one shape."""
    row = replace(LAYER, dim=16, hidden=32, chunk=16, heads=2, tokens=32, batch=1) if dry else LAYER
    result: Result = {"title": row.title, "failed": []}
    there = importlib.util.find_spec("titans_pytorch") is not None
    if dry:
        for layer in (Layer(row), *([peer_layer(row)] if there else [])):
            trained(layer, torch.randn(1, row.tokens, row.heads * row.dim))()
        return result
    batch, found = row.batch, measured_peer(row) if there else {}
    while there and not found and batch > 1:
        batch //= 2
        found = measured_peer(replace(row, batch=batch))
    row = replace(row, batch=batch)
    own = trained(Layer(row).to("cuda", torch.bfloat16), inputs_of(row).bfloat16())
    ms = statistics.median(rows.milliseconds(rows.graphed(own)[0]))
    result |= {"batch": batch, "ms": ms, "bytes_per_head_token": rows.peak_memory(own) / row.head_tokens}
    if not found:
        why = "it does not fit this card" if there else "no titans-pytorch here"
        return result | {"note": f"not measured: {why} (own layer {ms:.3f} ms)"}
    best_ms, least = (min(f[i] for f in found.values()) for i in (0, 1))
    memory = least / row.head_tokens / result["bytes_per_head_token"]
    note = f"and {memory:.1f} x less memory (aim 50), batch {batch}"
    return result | {"peer_ms": best_ms, "peer": found, "memory_ratio": memory, "note": note} | compared(row, best_ms / ms)


def inputs_of(row: Row) -> Tensor:
    """``[batch, tokens, heads * dim]``."""
    return torch.randn(row.batch, row.tokens, row.heads * row.dim, device="cuda")


def measured_peer(row: Row) -> dict[str, tuple[float, int]]:
    """Milliseconds and bytes of titans-pytorch's layer in fp32 and under autocast; empty where it does not fit the card."""
    peer, found = trained(peer_layer(row).to("cuda"), inputs_of(row)), {}
    try:
        for name, half in (("fp32", False), ("autocast", True)):
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                found[name] = (statistics.median(rows.milliseconds(peer, 5)), rows.peak_memory(peer))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    return found


def peer_layer(row: Row) -> nn.Module:
    """titans-pytorch's layer with our meaning: an update of every token, gradients at the chunk's first weights."""
    from titans_pytorch import NeuralMemory  # type: ignore[import-not-found]

    layer: nn.Module = NeuralMemory(
        dim=row.heads * row.dim,
        heads=row.heads,
        dim_head=row.dim,
        chunk_size=1,
        batch_size=row.chunk,
        default_step_transform_max_lr=0.01,
        default_model_kwargs={"depth": 2, "expansion_factor": row.hidden / row.dim},
    )
    return layer


def trained(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward and the gradients of all parameters and the input."""
    x = x.clone().requires_grad_()
    leaves = [x, *layer.parameters()]

    def run() -> object:
        out = layer(x)
        y = out if isinstance(out, Tensor) else out[0]
        return torch.autograd.grad(y.float().square().mean(), leaves, allow_unused=True)

    return run


JOBS: dict[str, Callable[[bool], Result]] = {"decode": measure_decode, "titans_pytorch": measure_layer}
