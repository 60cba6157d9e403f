"""How many instructions the memory's kernels run, kernel by kernel, without a GPU.

    PYTHONPATH=. python -m tests.emulator.counts [--network mlp|linear] [--hidden 256] [--dim 64] [--chunk 64]
        [--config mlp_recall=4,2,64 ..] [--lines mlp_recall]

prints, per chunk of tokens and head, forward and backward, the instructions of PTX that warps issue. ``--config`` gives a
kernel other warps, stages and tile; ``--lines`` lists the source lines of a kernel with the most instructions. A chip issues
at most four a cycle and multiprocessor, so the sum is a bound on the time; it says nothing about waiting for memory.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter, defaultdict

from tests.emulator import plugin  # isort: skip  # first: it chooses how triton runs

import torch

import titans_graph as tg
from tests.emulator.core import WARP
from tests.emulator.driver import LISTENERS
from tests.emulator.program import Instruction, Program
from titans_graph.kernels.triton_config import Config, override

Counts = dict[str, Counter[str]]


def kind(i: Instruction) -> str:
    """A word for what an instruction does."""
    if i.op[0] in ("mma", "wgmma") and i.op[1] in ("sync", "mma_async"):
        return "matrix"
    if i.op[0] in ("ld", "st"):
        return "shared" if i.op[1].startswith("shared") else i.op[1]
    if i.op[0] in ("ldmatrix", "stmatrix"):
        return "shared"
    if i.op[0] in ("bar", "barrier", "fence", "wgmma", "cp"):
        return "copy" if i.op[0] == "cp" else "wait"
    if i.op[0] in ("cvt", "mov", "shfl"):
        return {"cvt": "convert", "mov": "move"}.get(i.op[0], "shuffle")
    return "float" if i.op[-1] == "f32" else "whole"


def listen(by_kind: Counts, by_line: Counts) -> None:
    """Count every launch from now on."""

    def heard(program: Program, ran: list[int]) -> None:
        for times, block in zip(ran, program.blocks.values(), strict=True):
            for i in block:
                by_kind[program.name][kind(i)] += times * program.threads // WARP
                by_line[program.name][f"{i.place} {kind(i)}"] += times * program.threads // WARP

    LISTENERS.append(heard)


def step(options: argparse.Namespace, chunks: int) -> None:
    """Forward and backward over some chunks, one row, one head."""
    torch.manual_seed(0)
    network = {"mlp": {"hidden": options.hidden}} if options.network == "mlp" else "linear"
    sizes = tg.fast_weights(network, options.dim)
    weights = {n: (torch.randn(1, 1, *s) / s[0] ** 0.5).requires_grad_() for n, s in sizes.items()}
    tokens = torch.nn.functional.normalize(torch.randn(3, 1, 1, chunks * options.chunk, options.dim), dim=-1)
    q, k, v = tokens.bfloat16().requires_grad_()
    gate = torch.full(q.shape[:3], 0.01, requires_grad=True)
    y, _ = tg.neural_memory(
        network, weights, q, k, v, step=gate, log_momentum=-gate, log_keep=-gate, chunk=options.chunk, kernel="triton"
    )
    torch.autograd.backward(y.float().square().sum())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--network", choices=("mlp", "linear"), default="mlp")
    for name, usual in (("hidden", 256), ("dim", 64), ("chunk", 64)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--config", nargs="*", default=[], metavar="KERNEL=WARPS,STAGES,TILE")
    parser.add_argument("--lines", default="", metavar="KERNEL")
    options = parser.parse_args()
    by_kind, by_line = defaultdict[str, Counter[str]](Counter), defaultdict[str, Counter[str]](Counter)
    listen(by_kind, by_line)
    chunks = 4
    with contextlib.ExitStack() as stack:
        for text in options.config:
            name, _, numbers = text.partition("=")
            stack.enter_context(override(name, Config(*map(int, numbers.split(",")))))
        step(options, chunks)
    print(f"instructions of {plugin.ARCH} a chunk and head, times the warps that issue them")
    for name, found in by_kind.items():
        parts = "  ".join(f"{what} {n // chunks}" for what, n in found.most_common())
        print(f"{name.removesuffix('_kernel'):24s} {found.total() // chunks:8d}  {parts}")
    print(f"{'all':24s} {sum(c.total() for c in by_kind.values()) // chunks:8d}")
    for line, n in by_line[f"{options.lines}_kernel"].most_common(40):
        print(f"{n // chunks:8d}  {line}")


if __name__ == "__main__":
    main()
