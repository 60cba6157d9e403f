"""The compiled Triton kernels on an emulated GPU: in processes of their own, where triton is not the interpreter's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from titans_graph.kernels.triton_config import importable

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not importable(), reason=str(importable().why))


def emulate(arch: str, *arguments: str) -> None:
    """Run tests there; this test fails where one of them does."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "PYTEST_"))}
    environment |= {"EMULATED_GPU": arch, "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.emulator.plugin",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
    ]
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_emulator(arch: str) -> None:
    emulate(arch, "tests/emulator/on_gpu_emulator.py")


def test_the_memory_in_half_precision() -> None:
    emulate("sm_90", "-m", "not nightly", "tests/emulator/on_gpu_memory.py")


@pytest.mark.nightly
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_all_that_the_interpreter_runs(arch: str) -> None:
    names = ("memory", "linear", "decode", "stepping")
    emulate(arch, "tests/emulator/on_gpu_memory.py", *(f"tests/kernels/test_triton_{name}.py" for name in names))
