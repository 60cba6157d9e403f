"""Triton kernels compiled ahead of time, without a GPU, and what they need of it: registers, stack, shared memory.

    python -m titans_graph.kernels.triton_aot --targets sm_80 sm_90 sm_100 gfx942 [--all] [--kernels NAME ..] [--dtype T]

compiles every kernel in the configuration that the table chooses, prints one line each, and ends with 1 where one does
not compile, needs more than the chip has, or (of the usual sizes) spills registers. Compiled kernels are kept in triton's
own cache, by the hash of their source. Figures of NVIDIA targets come from the cuobjdump that ships with triton, those of
AMD targets from the assembly's metadata.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from titans_graph.errors import UsageError
from titans_graph.kernels.triton_config import ARCHS, Config, Kernel, Sizes, default, importable, interpreted, kernels
from titans_graph.kernels.triton_table import longest_chunk

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes of shared memory one program may use."""

TENSOR_MEMORY_LIMIT = 512
"""Columns of tensor memory one program may use (sm_100)."""

MATRIX = {"sm_80": r"\bHMMA\b", "sm_90": r"\bHGMMA\b", "sm_100": r"\bUTC\w*MMA\b", "gfx942": r"\bv_mfma_"}
"""The instructions of each chip's fastest matrix unit; 32-bit operands take others."""

SPILLS = r"\b(?:STL|LDL)\b"


@dataclass(frozen=True)
class Budget:
    """What one compiled kernel needs, or the ``error`` that kept it from being compiled.

    ``registers`` per thread, ``stack`` bytes per thread (spills live there), ``spills`` instructions that move them,
    ``shared`` bytes per program, ``matrix`` instructions of the chip's fastest matrix unit, ``instructions`` in all.
    """

    kernel: str
    sizes: Sizes
    target: str
    config: Config
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    tensor_memory: int = 0
    matrix: int = 0
    instructions: int = 0
    error: str = ""

    def problems(self) -> list[str]:
        """Why the kernel cannot be launched; empty where it can."""
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.shared > SHARED_LIMIT[self.target]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_LIMIT[self.target]} there are")
        if self.tensor_memory > TENSOR_MEMORY_LIMIT:
            found.append(f"{self.tensor_memory} columns of tensor memory, {TENSOR_MEMORY_LIMIT} there are")
        return found

    def spilled(self) -> list[str]:
        """What is moved between registers and memory for want of registers; empty where nothing is."""
        return [f"{self.stack} bytes of stack, {self.spills} instructions that spill"] if self.stack else []


@dataclass(frozen=True)
class Case:
    """One compilation."""

    kernel: str
    sizes: Sizes
    target: str
    config: Config


def gpu_target(name: str) -> Any:
    """triton's description of a target."""
    from triton.backends.compiler import GPUTarget

    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


def compiled(kernel: Kernel, sizes: Sizes, config: Config, target: str) -> Any:
    """The compiled kernel: triton's object with ``asm`` and ``metadata``."""
    import triton
    from triton.compiler import ASTSource

    if interpreted():
        raise UsageError("kernels are compiled ahead of time in a process without TRITON_INTERPRET")
    types, constants = kernel.describe(sizes, config)
    names = list(kernel.function.arg_names)
    missing, strange = set(names) - {*types, *constants}, {*types, *constants} - set(names)
    if missing or strange or set(types) & set(constants):
        raise UsageError(f"{kernel.name}: describe() leaves out {sorted(missing)} and adds {sorted(strange)}")
    # A launch finds these out by itself: torch's pointers, and multiples of 16 where the file says so.
    aligned = [i for i, n in enumerate(names) if types.get(n, "").startswith("*") or types.get(n, "").endswith(":16")]
    signature = {n: types[n].removesuffix(":16") if n in types else "constexpr" for n in names}
    source = ASTSource(kernel.function, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=gpu_target(target), options=options)


def budget(kernel: Kernel, sizes: Sizes, config: Config, target: str) -> Budget:
    """Compile a kernel and read what it needs."""
    blank = Budget(kernel.name, sizes, target, config)
    try:
        result = compiled(kernel, sizes, config, target)
    except UsageError:
        raise
    except Exception as error:  # triton, LLVM and ptxas fail with classes of their own
        return replace(blank, error=f"{type(error).__name__}: {' '.join(str(error).split())[-500:]}")
    figures: dict[str, Any] = _amd(result.asm["amdgcn"]) if target.startswith("gfx") else _nvidia(result.asm["cubin"], target)
    memory = int(getattr(result.metadata, "tmem_size", None) or 0)
    return replace(blank, shared=int(result.metadata.shared), tensor_memory=memory, **figures)


def _nvidia(cubin: bytes, target: str) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+)\s+STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert found is not None, f"cuobjdump prints something else: {usage[-500:]}"
    lines = [line for line in code.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\S", line)]
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "stack": stack + local, **_counts(lines, SPILLS, MATRIX[target])}


def _cuobjdump(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), *arguments], check=True, capture_output=True, text=True).stdout


def _amd(assembly: str) -> dict[str, int]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    lines = [line for line in assembly.splitlines() if re.match(r"\s+[a-z]+_\w+", line)]
    counts = _counts(lines, r"\b(?:scratch_(?:load|store)\w*)", MATRIX["gfx942"])
    # The vector registers counted are those of both files, ordinary and of the matrix unit.
    # Scalar registers that spill go to lanes of vector registers, and where those run out to the stack, which is counted.
    stack = number("private_segment_fixed_size") + 4 * number("vgpr_spill_count")
    return {"registers": number("vgpr_count"), "stack": stack, **counts}


def _counts(lines: Sequence[str], spills: str, matrix: str) -> dict[str, int]:
    moved, products = (sum(bool(re.search(pattern, line)) for line in lines) for pattern in (spills, matrix))
    return {"spills": moved, "matrix": products, "instructions": len(lines)}


LINEAR = tuple(Sizes(64, dim) for dim in (64, 128))
DEEP = tuple(Sizes(64, 64, hidden, activation="silu") for hidden in (64, 128, 256))


def usual_sizes(target: str) -> list[Sizes]:
    """The sizes that CI compiles, in bf16: on sm_90 those that benchmarks/gpu.py times and more, elsewhere the largest."""
    if target != "sm_90":
        return [*LINEAR, DEEP[-1]]
    resumed = [replace(s, resumed=True) for s in (LINEAR[-1], DEEP[-1])]
    return [*LINEAR, *DEEP, *resumed, Sizes(64, 128, 256, activation="silu")]


def all_sizes(target: str) -> list[Sizes]:
    """Every shape in bf16 and every variant of the usual ones; every chunk on sm_90, elsewhere of the largest shapes.

    Without what a chip has no memory for, which the dispatcher leaves to the portable form.
    """
    shapes = [(64, 0), (128, 0), (256, 0), *((64, h) for h in (64, 128, 256)), *((128, h) for h in (128, 256, 512))]
    chunks = (16, 32, 64, 128, 256) if target == "sm_90" else (64,)
    found = usual_sizes(target)
    found += [Sizes(c, d, h, activation="silu" if h else "") for c in chunks for d, h in shapes]
    found += [replace(s, activation=a) for s in DEEP for a in ("gelu", "relu2")]
    changes: list[dict[str, Any]] = [{"dtype": t} for t in ("fp16", "fp32")]
    changes += [{"objective": o} for o in ("dot", "huber")] + [{"read": r} for r in ("before", "chunk")]
    changes += [{"resumed": True}, {"bounded": True}, {"resumed": True, "bounded": True}]
    found += [replace(base, **change) for base in (LINEAR[-1], DEEP[-1]) for change in changes]
    wide = DEEP[-1], Sizes(64, 128, 256, activation="silu"), LINEAR[-1]
    found += [replace(base, chunk=chunk) for base in wide for chunk in (16, 32, 128, 256)]
    return [size for size in dict.fromkeys(found) if size.chunk <= longest_chunk(size, target)]


def cases(targets: Iterable[str], every: bool = False, names: Iterable[str] = (), dtype: str = "") -> list[Case]:
    """Every kernel (or those named) for every size it supports, in the table's configuration; what is the same only once.

    ``dtype``: of all sizes, in place of their own.
    """
    wanted, seen, found = set(names) or set(kernels()), set(), []
    for target in targets:
        for size, kernel in product(all_sizes(target) if every else usual_sizes(target), kernels().values()):
            size = replace(size, dtype=dtype or size.dtype)
            if kernel.name not in wanted or not kernel.supports(size):
                continue
            config = default(kernel.name, size, target)
            key = (kernel.name, target, config, repr(kernel.describe(size, config)))
            if key not in seen:
                seen.add(key)
                found.append(Case(kernel.name, size, target, config))
    return found


def run_case(case: Case) -> Budget:
    """The budget of one case."""
    return budget(kernels()[case.kernel], case.sizes, case.config, case.target)


def run_cases(todo: Sequence[Case], jobs: int) -> Iterator[Budget]:
    """All budgets, in the order of the cases, by ``jobs`` processes."""
    if jobs == 1 or len(todo) < 2:
        yield from map(run_case, todo)
        return
    with ProcessPoolExecutor(min(jobs, len(todo)), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(run_case, todo)


HEAD = ("kernel", "sizes", "target", "warps", "stages", "tile", "regs", "stack", "shared", "matrix")
WIDTHS = (24, 24, 6, 5, 6, 4, 4, 5, 6, 6)


def row(b: Budget) -> str:
    """One line of :func:`table`."""
    c = b.config
    figures = ("failed", *[""] * 3) if b.error else (b.registers, b.stack, b.shared, b.matrix)
    return _line((b.kernel, words(b.sizes), b.target, c.num_warps, c.num_stages, c.tile, *figures))


def _line(cells: Sequence[object]) -> str:
    """Cells side by side: three of words, then figures."""
    placed = (str(x).ljust(w) if i < 3 else str(x).rjust(w) for i, (x, w) in enumerate(zip(cells, WIDTHS, strict=True)))
    return "  ".join(placed).rstrip()


def table(budgets: Iterable[Budget]) -> str:
    """One line per budget; stack and shared memory in bytes, ``matrix``: instructions of the matrix unit."""
    return "\n".join([_line(HEAD), *map(row, budgets)]) + "\n"


def words(sizes: Sizes) -> str:
    """Sizes in a few words: chunk, widths, and whatever is not usual."""
    network = f"{sizes.dim}-{sizes.hidden}-{sizes.dim} {sizes.activation}" if sizes.hidden else f"{sizes.dim}"
    rest = [x for x, usual in ((sizes.dtype, "bf16"), (sizes.objective, "l2"), (sizes.read, "after")) if x != usual]
    rest += [name for name in ("resumed", "bounded") if getattr(sizes, name)]
    return " ".join([f"C{sizes.chunk}", network, *rest])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 where every kernel compiles and stays inside its limits."""
    parser = argparse.ArgumentParser(prog="python -m titans_graph.kernels.triton_aot", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--targets", nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--kernels", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--all", action="store_true", help="every promised size, not only the usual ones")
    parser.add_argument("--dtype", default="", choices=("bf16", "fp16", "fp32"), help="the operands' type in all sizes")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    # Nothing has imported triton yet.
    os.environ.pop("TRITON_INTERPRET", None)
    if not importable():
        print(f"error: {importable().why}", file=sys.stderr)
        return 2
    unknown = sorted(set(options.kernels) - set(kernels()))
    if unknown:
        parser.error(f"no kernel {unknown[0]!r}; there are: {', '.join(kernels())}")
    todo = cases(options.targets, options.all, options.kernels, options.dtype)
    print(_line(HEAD), flush=True)
    budgets = []
    for b in run_cases(todo, options.jobs):
        budgets.append(b)
        print(row(b), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(b) for b in budgets], indent=1), encoding="utf-8")
    bad = [f"{b.kernel} {words(b.sizes)} {b.target} {b.config}: {p}" for b in budgets for p in (*b.problems(), *b.spilled())]
    print(f"{len(budgets)} compiled, {len(bad)} problems", *bad, sep="\n  ")
    return 1 if any(b.problems() or (b.spilled() and not options.all) for b in budgets) else 0


if __name__ == "__main__":
    sys.exit(main())
