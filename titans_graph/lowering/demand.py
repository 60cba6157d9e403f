"""What a model asks of the machine, and a refusal before it is taken: a spec of a few bytes can ask for any amount."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path

from titans_graph.errors import UsageError

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@functools.cache
def machine_memory() -> int:
    """Bytes of memory of this machine, or of the container this process runs in where that is less; 0: not known."""
    known = []
    with contextlib.suppress(AttributeError, OSError, ValueError):
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in _LIMITS:
        with contextlib.suppress(OSError, ValueError):
            known.append(int(Path(name).read_text()))
    return min((n for n in known if n > 0), default=0)


def excess(size: int, what: str) -> str:
    """What there is to say where ``size`` bytes for ``what`` are more than the machine has; else an empty string."""
    memory = machine_memory()
    if not memory or size <= memory:
        return ""
    return f"{what}: {size / 1e9:,.1f} GB are more than the {memory / 1e9:,.1f} GB of this machine"


def demand(size: int, what: str, help: str) -> None:
    """UsageError where ``size`` bytes for ``what`` are more than the machine has."""
    problem = excess(size, what)
    if problem:
        raise UsageError(f"{problem}\n  help: {help}")
