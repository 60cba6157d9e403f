"""How each Triton kernel is built and launched: sizes, configurations, and what a kernel says of itself.

No kernel stands here, and triton is not imported: files with kernels import it plainly, and whoever imports one of those
asks :func:`available` first. Every such file is named ``triton_*.py`` and ends with ``KERNELS = (Kernel(...), ...)``;
:func:`kernels` finds them, and ``titans_graph.kernels.triton_aot`` compiles them without a GPU.

A configuration is looked up in this order: :func:`override`, the file named by ``TITANS_GRAPH_KERNEL_CONFIGS``, the
autotuner where it is on (``titans_graph.kernels.triton_tune``), the table in ``titans_graph.kernels.triton_table``. The
file is JSON, a list of rules of which the first that fits counts; what a rule leaves out fits everything:

    [{"kernel": "linear_scan", "arch": "sm_90", "sizes": {"dim": 128}, "config": {"num_warps": 8, "tile": 64}}]
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from titans_graph.errors import UsageError, suggest

log = logging.getLogger("titans_graph.kernels")

CONFIG_FILE = "TITANS_GRAPH_KERNEL_CONFIGS"
"""Environment variable: a JSON file of rules."""

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""Architectures with configurations of their own; others take those of the nearest."""

DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Sizes:
    """What a kernel is specialised on.

    ``chunk`` slots of a chunk, ``dim`` of keys and values, ``hidden`` width of the memory's inner layer (0: linear
    memory), ``dtype`` of the operands of matrix products (accumulation and state are fp32), ``activation`` ("" without a
    hidden layer), ``objective``, ``read``, ``resumed``: chunks may begin in the middle, so that the anchor is an input
    of its own; ``bounded``: the step is divided by its bound.
    """

    chunk: int
    dim: int
    hidden: int = 0
    dtype: str = "bf16"
    activation: str = ""
    objective: str = "l2"
    read: str = "after"
    resumed: bool = False
    bounded: bool = False


@dataclass(frozen=True)
class Config:
    """How a kernel is launched: ``num_warps``, ``num_stages`` of its pipelined loops, ``tile`` of the hidden (MLP) or
    value dimension (linear memory) that one program or one step of a loop works on; 0 means the whole dimension."""

    num_warps: int = 4
    num_stages: int = 2
    tile: int = 0


Description = tuple[dict[str, str], dict[str, Any]]


def _anything(sizes: Sizes) -> bool:
    return True


class Kernel(NamedTuple):
    """One Triton kernel and all it takes to compile it without running it.

    ``function`` is what ``@triton.jit`` gave. ``describe(sizes, config)`` gives the types of its run-time arguments by
    name (``*bf16``, ``*fp32``, ``*i64``, ``i32``, ``fp32``; a scalar known to be divisible by 16 is ``i32:16``, pointers
    are taken to be aligned to 16 bytes as torch's are) and the values of its constexpr arguments by name, together every
    argument there is. ``supports`` says for which sizes the kernel exists.
    """

    name: str
    function: Any
    describe: Callable[[Sizes, Config], Description]
    supports: Callable[[Sizes], bool] = _anything


@dataclass(frozen=True)
class Rule:
    """A configuration for all sizes that fit: ``kernel`` and ``arch`` ("" fits all), ``sizes`` field by field; what the
    ``config`` leaves out is taken from the next rule that fits."""

    kernel: str = ""
    arch: str = ""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, int] = field(default_factory=dict)

    def fits(self, kernel: str, sizes: Sizes, arch: str) -> bool:
        """Whether the rule speaks of this kernel with these sizes on this architecture."""
        if self.kernel not in ("", kernel) or self.arch not in ("", arch):
            return False
        return all(getattr(sizes, name) == value for name, value in self.sizes.items())


@dataclass(frozen=True)
class Availability:
    """Whether Triton kernels can run here; false with the reason in ``why``."""

    why: str = ""

    def __bool__(self) -> bool:
        return not self.why


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a processor: ``TRITON_INTERPRET=1`` before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def importable() -> Availability:
    """Whether files with Triton kernels can be imported (and compiled ahead of time)."""
    if importlib.util.find_spec("triton") is None:
        return Availability("triton is not installed")
    return Availability()


def available() -> Availability:
    """Whether Triton kernels can be launched: triton is installed, and there is a GPU or the interpreter is on."""
    if not importable() or interpreted():
        return importable()
    import torch

    if not torch.cuda.is_available():
        return Availability("there is no GPU (TRITON_INTERPRET=1 runs Triton kernels in its interpreter, slowly)")
    return Availability()


@functools.cache
def current_arch(device: int | None = None) -> str:
    """The architecture of a GPU: ``sm_90``, ``gfx942``; ``sm_90`` where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return "sm_90"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def table_arch(arch: str) -> str:
    """The one of ``ARCHS`` whose configurations an architecture takes: the newest NVIDIA one not newer than it."""
    if arch in ARCHS:
        return arch
    if not arch.startswith("sm_"):
        return "gfx942"
    number = int("".join(c for c in arch[3:] if c.isdigit()))
    # Consumer Blackwell (sm_120) has the shared memory and the matrix instructions of sm_80.
    return "sm_100" if 100 <= number < 120 else "sm_90" if number in range(90, 100) else "sm_80"


@functools.cache
def kernels() -> dict[str, Kernel]:
    """Every Triton kernel of the project by name, in the order of files and of ``KERNELS`` in them."""
    found: dict[str, Kernel] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("triton_"):
            for kernel in getattr(importlib.import_module(f"titans_graph.kernels.{module.name}"), "KERNELS", ()):
                assert kernel.name not in found, f"two kernels are called {kernel.name}"
                found[kernel.name] = kernel
    return found


def config(kernel: str, sizes: Sizes, arch: str | None = None, run: Callable[[Config], object] | None = None) -> Config:
    """The configuration to launch a kernel with, by its name.

    ``arch``: that of the current GPU where None. ``run(config)`` launches the kernel once, into buffers of its own; with
    it, and where autotuning is on, configurations are measured and the fastest is remembered.
    """
    arch = current_arch() if arch is None else arch
    chosen: Config | None = None
    for rule in (*_OVERRIDES.get(), *file_rules()):
        if rule.fits(kernel, sizes, arch):
            chosen = replace(default(kernel, sizes, arch), **rule.config)
            break
    if chosen is None and run is not None and not interpreted():
        from titans_graph.kernels import triton_tune

        chosen = triton_tune.tuned(kernel, sizes, arch, run)
    if chosen is None:
        return default(kernel, sizes, arch)
    _announce(kernel, sizes, arch, chosen)
    return chosen


def default(kernel: str, sizes: Sizes, arch: str) -> Config:
    """The configuration of the project's own table, every field from the first rule that fits and names it."""
    return _default(kernel, sizes, table_arch(arch))


@functools.lru_cache(maxsize=4096)
def _default(kernel: str, sizes: Sizes, arch: str) -> Config:
    from titans_graph.kernels.triton_table import TABLE

    values: dict[str, int] = {}
    for rule in TABLE:
        if rule.fits(kernel, sizes, arch):
            values = {**rule.config, **values}
    return Config(**values)


@functools.lru_cache(maxsize=256)
def _announce(kernel: str, sizes: Sizes, arch: str, chosen: Config) -> None:
    log.info("kernel %s on %s: %s for %s", kernel, arch, chosen, sizes)


_OVERRIDES: ContextVar[tuple[Rule, ...]] = ContextVar("overrides", default=())


@contextmanager
def override(kernel: str, chosen: Config, arch: str = "", **sizes: Any) -> Iterator[None]:
    """Launch a kernel with this configuration inside the ``with`` block, for all sizes with the given fields."""
    rule = _rule({"kernel": kernel, "arch": arch, "sizes": sizes, "config": asdict(chosen)}, "override")
    token = _OVERRIDES.set((rule, *_OVERRIDES.get()))
    try:
        yield
    finally:
        _OVERRIDES.reset(token)


def file_rules() -> tuple[Rule, ...]:
    """The rules of the file named by ``TITANS_GRAPH_KERNEL_CONFIGS``; none where it is not set."""
    name = os.environ.get(CONFIG_FILE, "")
    return _read_rules(name, Path(name).stat().st_mtime_ns if Path(name).is_file() else 0) if name else ()


@functools.lru_cache(maxsize=8)
def _read_rules(name: str, _changed: int) -> tuple[Rule, ...]:
    try:
        entries = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{CONFIG_FILE}: {name} cannot be read as JSON: {error}") from error
    if not isinstance(entries, list):
        raise UsageError(f"{CONFIG_FILE}: {name} must hold a list of rules")
    rules = tuple(_rule(entry, f"{CONFIG_FILE}: {name}, rule {number}") for number, entry in enumerate(entries, 1))
    log.info("%d kernel configurations from %s", len(rules), name)
    return rules


def _rule(entry: object, place: str) -> Rule:
    """A rule from a JSON object, every name and value checked."""
    if not isinstance(entry, dict):
        raise UsageError(f"{place}: a rule is an object with kernel, arch, sizes and config")
    _known(entry, [f.name for f in fields(Rule)], place)
    sizes, chosen = entry.get("sizes", {}), entry.get("config", {})
    for part, kind in ((sizes, Sizes), (chosen, Config)):
        if not isinstance(part, dict):
            raise UsageError(f"{place}: sizes and config are objects")
        _known(part, [f.name for f in fields(kind)], place)
    for name, value in chosen.items():
        if not _legal(name, value):
            wanted = "1 or more" if name == "num_stages" else "a power of 2" + (" or 0" if name == "tile" else "")
            raise UsageError(f"{place}: {name} must be {wanted}; got {value!r}")
    if importable() and entry.get("kernel") and entry["kernel"] not in kernels():
        raise UsageError(f"{place}: no kernel {entry['kernel']!r}; {suggest(str(entry['kernel']), kernels())}")
    return Rule(entry.get("kernel", ""), entry.get("arch", ""), sizes, chosen)


def _legal(name: str, value: object) -> bool:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        return False
    return value > 0 if name == "num_stages" else value & (value - 1) == 0 and (value > 0 or name == "tile")


def _known(given: Mapping[str, object], names: list[str], place: str) -> None:
    for name in given:
        if name not in names:
            raise UsageError(f"{place}: unknown key {name!r}; {suggest(name, names)}")
