"""One memory layer, forward and backward in a process of its own: the memory of a call, then the seconds of calls.

    python layer.py SETTING TOKENS

prints a line of JSON when it is ready, and the seconds of a call for every line that it reads, each behind ``ANSWER``:
whoever compares two layers lets them take turns, because a machine's speed changes within seconds. A turn is as many calls as
fill :data:`TURN`, at least one, so that a short one is not measured on caches that the other layer left.

Runs as a script under any interpreter: ``ours`` needs this package, the others titans-pytorch 0.5.5, which lives in an
environment of its own. Every layer is 256 wide, has 4 heads and a memory of 64 -> 256 -> 64, and runs on one thread.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DIM, HEADS, CHUNK = 256, 4, 64
Layer = Callable[[torch.Tensor], torch.Tensor]
TURN, PEAKS = 1.0, 5
"""Seconds of a turn; calls whose peaks are taken, as far as they fit into as many turns."""
ANSWER = "answer:"
"""What answers begin with; other lines are what a library prints."""

PEERS: dict[str, tuple[int, int | None, bool]] = {
    "per-token": (1, CHUNK, False),
    "per-chunk": (CHUNK, CHUNK, False),
    "default-compiled": (CHUNK, None, True),
}
"""Settings of titans-pytorch: its chunk_size (tokens of one update), batch_size (tokens after which gradients are taken at
new weights; None: never) and whether torch.compile is used. ``per-token`` has the meaning of ours."""


def ours() -> Layer:
    """The component ``memory.neural`` as it comes (with convolution and output gate), compiled for a batch of one."""
    import titans_graph as tg

    b = tg.Builder(dim=DIM)
    x = b.input("x", ["B", "T", "dim"])
    memory = b.add("memory.neural", write=x, heads=HEADS, chunk=CHUNK, network={"mlp": {"depth": 2}}, name="memory")
    b.output(memory.recall)
    model = b.build().compile()
    return lambda x: model(x)[0]


def theirs(setting: str) -> Layer:
    """NeuralMemory of titans-pytorch."""
    from titans_pytorch import NeuralMemory  # type: ignore[import-not-found,unused-ignore]

    chunk, batch, compiled = PEERS[setting]
    # Its default step of at most 1 overflows as soon as the weights move within a sequence; 0.1 is its own script's.
    memory: Any = NeuralMemory(
        dim=DIM,
        heads=HEADS,
        dim_head=DIM // HEADS,
        chunk_size=chunk,
        batch_size=batch,
        default_step_transform_max_lr=1.0 if batch is None else 0.1,
        default_model_kwargs={"depth": 2, "expansion_factor": 4.0},
    )
    for p in memory.parameters():
        # Views of stride 0, which no optimiser can step.
        p.data = p.data.clone()
    run = torch.compile(memory) if compiled else memory
    return lambda x: run(x)[0]


def resident(field: str) -> int:
    """A field of ``/proc/self/status`` in bytes: VmRSS now, VmHWM the peak."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def peak(run: Callable[[], None]) -> int:
    """How far one call's peak rises over what is resident before, in bytes; the call has been made before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def usual_peak(run: Callable[[], None]) -> float:
    """The median of :func:`peak` over a few calls: what an allocator has lying about differs by megabytes from call to call."""
    start, peaks = time.perf_counter(), [peak(run)]
    while len(peaks) < PEAKS and time.perf_counter() - start < PEAKS * TURN:
        peaks.append(peak(run))
    return statistics.median(peaks)


def training(layer: Layer, tokens: int) -> Callable[[], None]:
    """Forward and backward of a layer over random tokens."""
    x = torch.randn(1, tokens, DIM, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def run() -> None:
        torch.autograd.backward(layer(x).sum())
        x.grad = None

    return run


def main() -> None:
    """Build, tell the memory of one call, and then take a turn for every line of the standard input."""
    setting, tokens = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    run = training(ours() if setting == "ours" else theirs(setting), tokens)
    run()  # builds what is compiled
    print(ANSWER, json.dumps({"torch": torch.__version__, "bytes": usual_peak(run)}), flush=True)
    for _ in sys.stdin:
        print(ANSWER, turn(run), flush=True)


def turn(run: Callable[[], object]) -> float:
    """Seconds of a call, the mean of a turn."""
    start, calls, passed = time.perf_counter(), 0, 0.0
    while passed < TURN:
        run()
        calls += 1
        passed = time.perf_counter() - start
    return passed / calls


if __name__ == "__main__":
    main()
