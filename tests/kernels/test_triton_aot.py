"""Every Triton kernel compiles without a GPU for every target, fits the chip and spills nothing, in its default configuration.

Each compilation runs in a process without ``TRITON_INTERPRET``, which the tests beside it need.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from titans_graph.kernels import triton_aot
from titans_graph.kernels.triton_aot import Budget
from titans_graph.kernels.triton_config import ARCHS, Config, Sizes, importable, kernels
from titans_graph.kernels.triton_table import longest_chunk

pytestmark = pytest.mark.skipif(not importable(), reason="needs triton")

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = "tests/golden/triton_budgets.txt"
NAMES = (
    *("linear_scan", "linear_fused", "linear_read", "linear_delta_backward", "linear_reverse", "linear_query_backward"),
    *("linear_key_backward", "gates", "gates_backward", "mlp_scan", "mlp_read", "mlp_recall", "mlp_alike"),
    *("mlp_answer_backward", "mlp_query_backward", "mlp_read_plain_backward", "mlp_reverse", "mlp_key_backward"),
    *("linear_decode", "mlp_decode", "decode_write"),
)

TOY = """
import sys
import triton
import triton.language as tl
from titans_graph.errors import UsageError
from titans_graph.kernels import triton_aot
from titans_graph.kernels.triton_config import Config, Kernel, Sizes

@triton.jit
def product(x, y, out, count, D: tl.constexpr):
    at = tl.arange(0, D)[:, None] * D + tl.arange(0, D)[None, :]
    total = tl.zeros((D, D), tl.float32)
    for i in tl.range(count):
        total = tl.dot(tl.load(x + i * D * D + at), tl.load(y + i * D * D + at), total)
    tl.store(out + at, total)

@triton.jit
def refused(x, y, out, count, D: tl.constexpr):
    tl.store(out + tl.arange(0, 3), 0.0)

def describe(sizes, config):
    return {"x": "*bf16", "y": "*bf16", "out": "*fp32", "count": "i32"}, {"D": sizes.dim}

toy = Kernel("toy", product, describe)
for target in sys.argv[1:]:
    b = triton_aot.budget(toy, Sizes(64, 64), Config(4, 2, 0), target)
    print(target, b.registers > 30, b.matrix > 0, b.instructions > 100, *b.problems(), *b.spilled(), sep="|")
large = triton_aot.budget(toy, Sizes(64, 256), Config(8, 2, 0), "sm_90")
print(*large.problems(), *large.spilled(), sep="|")
print(*triton_aot.budget(Kernel("refused", refused, describe), Sizes(64, 64), Config(), "sm_90").problems())
wrong = Kernel("wrong", product, lambda s, c: ({"x": "*bf16", "z": "i32"}, {"D": 16}))
try:
    triton_aot.budget(wrong, Sizes(64, 64), Config(), "sm_90")
except UsageError as error:
    print(error)
"""

COUNTED = """
from titans_graph.kernels.triton_config import Config, Sizes, kernels
for kernel in kernels().values():
    types, _ = kernel.describe(Sizes(16, 16, 16, activation="silu"), Config())
    numbers = [p for p in kernel.function.params if types.get(p.name, "").startswith("i")]
    print(*(f"{kernel.name}:{p.name}" for p in numbers if not p.do_not_specialize))
print("kernels", len(kernels()))
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    kept |= {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=False)


def test_a_toy_is_measured(tmp_path: Path) -> None:
    """A product that fits, one that is too large for every chip, and one that triton refuses."""
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    done = run(str(script), *ARCHS)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[: len(ARCHS)] == [f"{target}|True|True|True" for target in ARCHS]
    large, refused, wrong = lines[len(ARCHS) :]
    assert "bytes of shared memory, 232448 there are" in large
    assert "bytes of stack" in large
    assert refused.startswith("does not compile: ")
    assert wrong == "wrong: describe() leaves out ['count', 'out', 'y'] and adds ['z']"


def test_default_configurations_fit_every_target(tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    """What CI compiles: every kernel in bf16; golden figures, and no product beside the chip's matrix unit."""
    import triton

    budgets = compile_all(tmp_path / "budgets.json")
    problems = [f"{triton_aot.row(b)}: {p}" for b in budgets for p in (*b.problems(), *b.spilled())]
    assert not problems, "\n".join(problems)
    assert set(kernels()) == set(NAMES)
    plain = {"mlp_read_plain_backward"}  # read: chunk alone has it, which is compiled nightly
    for target in ARCHS:
        here = [b for b in budgets if b.target == target]
        assert {b.kernel for b in here} == set(kernels()) - plain
        without = {b.kernel for b in here if not b.matrix}
        # NVIDIA's matrix units know no fp32, the type of a state, which decode_write multiplies in.
        in_fp32 = {"decode_write"} if target.startswith("sm_") else set()
        assert without == {"gates", "gates_backward", "linear_decode", "mlp_decode"} | in_fp32, (
            "products run on the matrix unit"
        )
    text = f"triton {triton.__version__}; bytes of stack and shared memory\n\n{triton_aot.table(budgets)}"
    path = ROOT / GOLDEN
    if path.is_file() and not path.read_text(encoding="utf-8").startswith(text.partition(";")[0] + ";"):
        pytest.skip("the golden figures are those of another version of triton")
    golden(GOLDEN, text)


def test_decoding_fits_every_target_in_the_type_of_the_state() -> None:
    """A model in float32 reads the state itself; copies in its own type are for one in half precision."""
    names = "linear_decode", "mlp_decode", "decode_write"
    done = run("-m", "titans_graph.kernels.triton_aot", "--dtype", "fp32", "--kernels", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()[1:-1]
    assert {tuple(line.split()[i] for i in (0, -8)) for line in lines} >= {(n, t) for n in names for t in ARCHS}
    assert all("fp32" in line for line in lines)


@pytest.mark.nightly
@pytest.mark.parametrize("target", ARCHS)
@pytest.mark.parametrize("kernel", NAMES)
def test_all_sizes_compile(tmp_path: Path, kernel: str, target: str) -> None:
    """Every shape and variant can be launched; that the largest of them spill is reported, not refused."""
    budgets = compile_all(tmp_path / "budgets.json", "--all", "--kernels", kernel, "--targets", target)
    assert budgets  # some kernels have one size alone
    assert not (problems := [f"{triton_aot.row(b)}: {p}" for b in budgets for p in b.problems()]), "\n".join(problems)


def compile_all(file: Path, *options: str) -> list[Budget]:
    """What ``python -m titans_graph.kernels.triton_aot`` finds."""
    done = run("-m", "titans_graph.kernels.triton_aot", "--json", str(file), *options)
    assert file.is_file(), done.stderr
    entries: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return [Budget(**{**e, "sizes": Sizes(**e["sizes"]), "config": Config(**e["config"])}) for e in entries]


def test_kernels_are_built_once_for_any_number_of_heads_and_tokens() -> None:
    """Else Triton builds them for 1, for multiples of 16 and for the rest, and what was compiled here is not what runs."""
    done = run("-c", COUNTED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["kernels", str(len(NAMES))]


def test_an_unknown_kernel_is_refused() -> None:
    done = run("-m", "titans_graph.kernels.triton_aot", "--kernels", "nothing")
    assert done.returncode == 2
    assert "no kernel 'nothing'; there are:" in done.stderr


def test_limits_are_checked() -> None:
    fits = Budget("k", Sizes(64, 64), "gfx942", Config(), shared=65_536)
    assert fits.problems() == []
    assert "65537 bytes" in Budget("k", Sizes(64, 64), "gfx942", Config(), shared=65_537).problems()[0]
    assert "8 bytes of stack" in Budget("k", Sizes(64, 64), "sm_90", Config(), stack=8).spilled()[0]
    assert fits.spilled() == []
    assert "513 columns" in Budget("k", Sizes(64, 64), "sm_100", Config(), tensor_memory=513).problems()[0]


def test_sizes_are_said_in_words() -> None:
    assert triton_aot.words(Sizes(64, 64, 256, activation="silu")) == "C64 64-256-64 silu"
    assert triton_aot.words(Sizes(16, 128, dtype="fp32", read="before", bounded=True)) == "C16 128 fp32 before bounded"
    for target in ARCHS:
        assert len(triton_aot.all_sizes(target)) == len(set(triton_aot.all_sizes(target))) > 30


@pytest.mark.parametrize(
    ("arch", "narrow", "wide", "single"),
    [("sm_80", 128, 128, 64), ("sm_90", 256, 128, 64), ("sm_103", 128, 64, 64), ("gfx942", 64, 64, 64), ("sm_89", 128, 32, 32)],
)
def test_the_longest_chunk_of_a_chip(arch: str, narrow: int, wide: int, single: int) -> None:
    """What is compiled under ``make nightly`` is what is launched: never a chunk that a chip has no memory for."""
    deep = Sizes(16, 64, 256, activation="silu")
    assert longest_chunk(deep, arch) == narrow
    assert longest_chunk(replace(deep, dim=128), arch) == wide
    assert longest_chunk(replace(deep, dtype="fp32"), arch) == single
    assert longest_chunk(replace(deep, dim=128, dtype="fp32"), arch) == 0
    assert longest_chunk(Sizes(16, 256), arch) == 256
    assert all(s.chunk <= longest_chunk(s, arch) for s in triton_aot.all_sizes(arch))
    assert replace(deep, chunk=narrow) in triton_aot.all_sizes(arch)
