"""A driver for Triton that emulates an NVIDIA GPU: kernels are compiled for it and run on this processor, on its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as active_driver

from tests.emulator.core import WARP, Core
from tests.emulator.memory import Clock, Memory, Space, host_bytes
from tests.emulator.program import EmulationError, Program, parse
from tests.emulator.translate import Function, translate

SHARED = {80: 166_912, 90: 232_448}
"""Bytes of shared memory one program may use."""

LISTENERS: list[Callable[[Program, list[int]], None]] = []
"""Called after every launch with how often each block of instructions ran."""


@lru_cache(maxsize=256)
def _translated(ptx: str) -> tuple[Program, Function]:
    program = parse(ptx)
    return program, translate(program)


def launch(ptx: str, grid: tuple[int, int, int], shared: int, arguments: list[tuple[str, Any]]) -> None:
    """Run every program of a grid, one after another.

    ``arguments``: those that are no constants, each with Triton's type: ``*bf16``, ``i32``, ``i64``, ``fp32``.
    """
    program, function = _translated(ptx)
    tid = np.arange(program.threads, dtype=np.uint32)
    # Nothing orders the lanes of a warp either; where there is one warp, they are watched in its place.
    clock = Clock(
        (tid // WARP if program.threads > WARP else tid).astype(np.int32), places=[i.place for i in program.instructions()]
    )
    pointers = [(f"argument {n}", x) for n, (kind, x) in enumerate(arguments) if kind.startswith("*")]
    memory = Space("shared memory", np.zeros(shared, np.uint8), clock, shared=True)
    core = Core(clock, Memory(_spaces(pointers, clock), clock), memory, [0] * len(program.blocks))
    given = [_bits(kind, x) for kind, x in arguments]
    # Triton adds pointers to scratch memory, which these kernels have none of.
    given += [np.uint64(0)] * (len(program.params) - len(given))
    with np.errstate(all="ignore"):
        for z, y, x in product(*(range(n) for n in reversed(grid))):
            core.begin()
            function(core, tid, (x, y, z), grid, *given)
            core.end()
    for listener in LISTENERS:
        listener(program, core.ran)


def _spaces(pointers: list[tuple[str, Any]], clock: Clock) -> Iterator[tuple[int, Space]]:
    """The bytes of all tensors; those that overlap are one space."""
    spans: list[tuple[int, int, str]] = []
    for name, x in pointers:
        if isinstance(x, torch.Tensor) and x.device.type != "cpu":
            raise EmulationError(f"{name} lies on {x.device}, an emulated GPU has this process' memory")
        if isinstance(x, torch.Tensor) and x.numel():
            last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            spans.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size(), name))
    joined: list[tuple[int, int, str]] = []
    for begin, end, name in sorted(spans):
        if joined and begin < joined[-1][1]:
            old = joined.pop()
            joined.append((old[0], max(old[1], end), f"{old[2]}, {name}" if name not in old[2] else old[2]))
        else:
            joined.append((begin, end, name))
    for begin, end, name in joined:
        # From a boundary on, so that numbers of any size stand at multiples of it.
        start = begin - begin % 16
        yield start, Space(name, host_bytes(start, end - start), clock, shared=False)


def _bits(kind: str, x: Any) -> Any:
    if kind.startswith("*"):
        return np.uint64(0 if x is None else x.data_ptr())
    if kind == "fp32":
        return np.float32(x).view(np.uint32)
    return np.int64(x).view(np.uint64) if kind.endswith("64") else np.int64(x).astype(np.uint32)


class _Launcher:
    """What Triton calls to launch one compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.kinds = list(source.signature.values())
        self.shared = int(metadata.shared)

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        # Before the arguments: packed metadata, launch metadata, two hooks.
        values = rest[4:]
        arguments = [(kind, v) for kind, v in zip(self.kinds, values, strict=True) if kind != "constexpr"]
        launch(function.ptx, (x, y, z), self.shared, arguments)


@dataclass
class _Loaded:
    """A kernel as this driver keeps it."""

    name: str
    ptx: str = ""


@dataclass
class _Utils:
    shared: int

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What Triton asks of a device."""
        return {"max_shared_mem": self.shared, "multiprocessor_count": 1, "warpSize": WARP, "max_num_regs": 65536}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, _Loaded, int, int, int]:
        """Module, function, registers, spills, most threads."""
        return name, _Loaded(name), 0, 0, 1024


def _attach(module: Any, function: Any, name: str, group: dict[str, str], digest: str) -> None:
    """Called by Triton after a kernel is loaded, with the files of its compilation."""
    if isinstance(function, _Loaded):
        function.ptx = Path(next(path for file, path in group.items() if file.endswith(".ptx"))).read_text()


class EmulatedDriver(DriverBase):  # type: ignore[misc]
    """Triton's driver of a GPU of compute capability 8.0 or 9.0 that is not there."""

    def __init__(self, capability: int) -> None:
        super().__init__()
        self.capability = capability
        self.utils = _Utils(SHARED[capability])
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        """Never by itself."""
        return False

    def get_current_target(self) -> GPUTarget:
        """What kernels are compiled for."""
        return GPUTarget("cuda", self.capability, WARP)

    def get_current_device(self) -> int:
        """A number, under which Triton keeps what it compiled."""
        return self.capability

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int) -> int:
        """There is one."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where its tensors are."""
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Of no use here."""
        raise NotImplementedError

    def get_benchmarker(self) -> Callable[..., Any]:
        """Of no use here."""
        raise NotImplementedError


def install(capability: int) -> None:
    """Make Triton launch on an emulated GPU, in this process, from now on."""
    knobs.runtime.kernel_load_end_hook.add(_attach)
    active_driver.set_active(EmulatedDriver(capability))
