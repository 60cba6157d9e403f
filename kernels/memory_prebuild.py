"""Building the chunk bodies of a memory beside the regions around it: in a process of its own, on an idle core.

Inductor compiles one thing at a time in a process, mostly on one core. A memory knows its bodies before anything is
compiled: a second process builds them into Inductor's cache on disk while this one compiles regions, and this one, when
it comes to need them, waits for that and reads them from there. Nothing depends on it: where the other process fails,
the body is built here.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from titans_graph.kernels.memory_chunk import Form
from titans_graph.kernels.memory_compile import (
    ADVANCE,
    COMING,
    FORWARD,
    PULLBACK,
    Argument,
    Signature,
    body_of,
    build,
    compiler_available,
    signature_of,
)
from titans_graph.kernels.memory_objectives import parse_objective
from titans_graph.kernels.memory_products import kept_width
from titans_graph.kernels.native import CODE
from titans_graph.kernels.networks import Network, parse_network

CHILDREN: list[subprocess.Popen[bytes]] = []
_ASKED: set[Signature] = set()
_ASKING = threading.Lock()


def arguments(network: Network, rows: int, chunk: int, dim: int, dtype: torch.dtype) -> list[Argument]:
    """Types and shapes of the differentiable inputs of a body: weights, momenta, q, k, v, and the three gates."""
    state: list[Argument] = [(dtype, (rows, *shape)) for shape in network.weights(dim).values()]
    return [*state, *state, *[(dtype, (rows, chunk, dim))] * 3, *[(dtype, (rows, chunk))] * 3]


def kinds(*, training: bool, several: bool) -> list[str]:
    """The bodies of a memory in the order of need; with one chunk a call (not ``several``) nothing is ever recomputed."""
    return [FORWARD, *([PULLBACK] if training else []), *([ADVANCE] if training and several else [])]


def all_arguments(kind: str, inputs: list[Argument], width: int) -> list[Argument]:
    """What the body of a kind is called with, where forward keeps ``width`` values a slot for backward."""
    valid, answer, state = (torch.bool, inputs[-1][1]), inputs[-6], inputs[:-6]
    kept: list[Argument] = [(answer[0], (*answer[1][:2], width))] if width else []
    if kind == ADVANCE:
        return [*state, *inputs[-5:], valid, *kept]
    return [*inputs, valid, *kept, answer, *state] if kind == PULLBACK else [*inputs, valid]


def prebuild(form: Form, needed: Sequence[str], rows: int, chunk: int, dim: int, dtype: torch.dtype) -> None:
    """Begin to build bodies for a CPU, unless they are built, being built, or this machine has no compiler.

    ``needed``: kinds in the order in which they will be needed. ``rows`` is batch times heads, ``dim`` the size of a key.
    """
    inputs, width = arguments(form.network, rows, chunk, dim, dtype), kept_width(form.network, dim)
    signatures = {
        kind: signature_of((form_for(form, kind), kind), torch.device("cpu"), all_arguments(kind, inputs, width))
        for kind in needed
    }
    if _ASKED.issuperset(signatures.values()) or not compiler_available() or not _can_help(form):
        return
    with _ASKING:
        if _ASKED.issuperset(signatures.values()):
            return
        _ASKED.update(signatures.values())
    mark = _mark(f"{torch.get_num_threads()} {signatures!r}")
    if mark is None or mark.exists():
        return
    request = {
        "network": form.network.text(),
        "objective": form.objective.text(),
        "read": form.read,
        "bounded": form.bounded,
        "inputs": [(str(t).removeprefix("torch."), s) for t, s in inputs],
        "width": width,
        "kinds": list(needed),
        # Generated code, and with it the entry in the cache, is made for a number of threads.
        "threads": torch.get_num_threads(),
        "mark": str(mark),
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", __name__, json.dumps(request)]
    quiet = subprocess.DEVNULL
    try:
        child = subprocess.Popen(command, env=environment, stdin=quiet, stdout=quiet, stderr=quiet)
    except OSError:
        return
    CHILDREN.append(child)
    # Reaped when it ends; ended with this process.
    threading.Thread(target=child.wait, daemon=True).start()
    atexit.register(child.kill)
    COMING.update({s: partial(_wait, child, mark.with_suffix(f".{kind}")) for kind, s in signatures.items()})


def form_for(form: Form, kind: str) -> Form:
    """The form a kind of body is built for: only forward finds the bound on the step."""
    return form if kind == FORWARD else form._replace(bounded=False)


def _can_help(form: Form) -> bool:
    """Whether another process can be started, and knows the objective: one that was registered here it does not."""
    return bool(sys.executable) and not getattr(sys, "frozen", False) and form.objective.own


def _wait(child: subprocess.Popen[bytes], done: Path) -> None:
    """Until the other process says that it has built this body, or is gone."""
    while child.poll() is None and not done.exists():
        time.sleep(0.01)


def _mark(kinds: str) -> Path | None:
    """The file in Inductor's cache that says the bodies were built; None where torch does not tell where that is."""
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir
    except ImportError:
        return None
    name = hashlib.sha256(f"{torch.__version__} {kinds} {CODE}".encode()).hexdigest()[:32]
    return Path(cache_dir()) / f"titans_graph-{name}"


def main(request: dict[str, Any]) -> None:
    """What the other process does: build, and leave a mark after every body."""
    torch.set_num_threads(request["threads"])
    form = Form(parse_network(request["network"]), parse_objective(request["objective"]), request["read"], request["bounded"])
    inputs = [(getattr(torch, name), tuple(shape)) for name, shape in request["inputs"]]
    mark, width = Path(request["mark"]), request["width"]
    for kind in request["kinds"]:
        body = body_of(form_for(form, kind), kind, (len(inputs) - 6) // 2, kept=width > 0)
        build(body, [torch.zeros(shape, dtype=dtype) for dtype, shape in all_arguments(kind, inputs, width)])
        mark.with_suffix(f".{kind}").touch()
    mark.touch()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
