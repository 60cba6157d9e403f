"""Configurations of Triton kernels measured on the GPU at hand, and remembered in a file of the user's cache folder.

Off by default: a measurement takes seconds per kernel and size, and two processes might choose differently. On with
``TITANS_GRAPH_AUTOTUNE=1`` or inside :func:`autotune`. What was measured before is used without measuring. The file is
keyed by device, versions and the kernel's own source, and is replaced as a whole, so it is never half written.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any

from titans_graph.kernels.triton_config import Config, Sizes, default, kernels

log = logging.getLogger("titans_graph.kernels")

AUTOTUNE = "TITANS_GRAPH_AUTOTUNE"
CACHE = "TITANS_GRAPH_CACHE"
"""Environment variables: 1 turns autotuning on; the folder of the cache, else ``titans-graph`` in the user's."""

_ON: ContextVar[bool | None] = ContextVar("autotune", default=None)


@contextmanager
def autotune(on: bool = True) -> Iterator[None]:
    """Measure configurations that were not measured before (or do not, with False) inside the ``with`` block."""
    token = _ON.set(on)
    try:
        yield
    finally:
        _ON.reset(token)


def enabled() -> bool:
    """Whether autotuning is on."""
    on = _ON.get()
    return os.environ.get(AUTOTUNE, "0").lower() in ("1", "true", "on", "yes") if on is None else on


def tuned(kernel: str, sizes: Sizes, arch: str, run: Callable[[Config], object]) -> Config | None:
    """The fastest configuration of those measured; None where autotuning is off or measuring is not possible now.

    ``run`` launches the kernel with a configuration; one that cannot be compiled or launched is left out.
    """
    import torch

    if not enabled() or not torch.cuda.is_available():
        return None
    key = _key(kernel, sizes)
    found = _remembered(str(cache_file())).get(key)
    if found is not None:
        return found
    if torch.cuda.is_current_stream_capturing():
        return None  # a launch is being recorded: nothing else may run
    times = {c: _milliseconds(run, c) for c in candidates(default(kernel, sizes, arch), sizes)}
    best = min(times, key=lambda c: times[c])
    if times[best] == float("inf"):
        log.warning("autotune %s: no configuration could be launched for %s", kernel, sizes)
        return None
    log.info("autotune %s for %s: %s, %.4f ms", kernel, sizes, best, times[best])
    remember(key, best, times[best])
    return best


def candidates(start: Config, sizes: Sizes) -> list[Config]:
    """What is measured: the table's choice first, then its neighbours in warps, stages and tile."""
    width = max(sizes.hidden, sizes.dim)
    tiles = [start.tile] if start.tile == 0 else sorted({t for t in (16, 32, 64, start.tile) if t <= width})
    around = [Config(w, s, t) for t in tiles for w in (4, 8) for s in (1, 2, 3)]
    return [start, *(c for c in around if c != start)]


def cache_file() -> Path:
    """Where measured configurations are kept."""
    folder = os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titans-graph"
    return Path(folder) / "kernel_configs.json"


def _key(kernel: str, sizes: Sizes) -> str:
    """Device, versions, kernel with the hash of its source, and sizes."""
    import torch
    import triton

    source = str(getattr(kernels()[kernel].function, "cache_key", "interpreted"))[:16]
    parts = (torch.cuda.get_device_name(), f"triton {triton.__version__}", kernel, source, json.dumps(asdict(sizes)))
    return " | ".join(parts)


@functools.lru_cache(maxsize=8)
def _remembered(name: str) -> dict[str, Config]:
    """What the file holds; an unreadable file is reported and counts as empty."""
    try:
        entries = json.loads(Path(name).read_text(encoding="utf-8"))
        return {key: Config(*(int(entry[f]) for f in ("num_warps", "num_stages", "tile"))) for key, entry in entries.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s cannot be read and is written anew: %s", name, error)
        return {}


def remember(key: str, chosen: Config, milliseconds: float) -> None:
    """Add a measured configuration to the file, which is replaced as a whole; a folder that cannot be written is reported."""
    path = cache_file()
    entries: dict[str, object] = {}
    with suppress(OSError, ValueError, TypeError):
        entries = dict(json.loads(path.read_text(encoding="utf-8")))
    entries[key] = {**asdict(chosen), "milliseconds": milliseconds}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            json.dump(entries, file, indent=1, sort_keys=True)
        Path(file.name).replace(path)
    except OSError as error:
        log.warning("measured kernel configurations cannot be kept in %s: %s", path, error)
    _remembered.cache_clear()


def _milliseconds(run: Callable[[Config], object], chosen: Config, repeats: int = 10) -> float:
    """Median time of a launch; infinite where it cannot be compiled or launched."""
    import torch

    try:
        run(chosen)
        torch.cuda.synchronize()
    except Exception as error:  # triton's own errors (resources, compilation) have no common class
        log.debug("autotune: %s left out: %s", chosen, error)
        return float("inf")
    times: list[float] = []
    event: Any = torch.cuda.Event
    for _ in range(repeats):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        run(chosen)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
