"""Tensors from a file that anybody may have written: the one way in which states and checkpoints are read.

Safetensors only: nothing is ever unpickled. A file's header is bounded and held against the file's size before anything
is taken from it, and tensors are views of the mapped file until somebody has looked at their names, types and shapes: no
memory is set aside because a file says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from titans_graph.errors import TitansGraphError, shortened

LONGEST_HEADER = 16 << 20
"""Bytes of the names, types and shapes of a file's tensors."""
_KEY = "titans_graph"
_UNKNOWN = "0" * 64
_AT_ONCE = 1 << 20


def read(path: Path, what: str, error: type[TitansGraphError]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, as views of the mapped file, and what :func:`write` was told about them (empty: by another program).

    The caller copies what it keeps, after it has checked names, types and shapes. ``error`` where the file is missing, is
    no plain file, is damaged, or is not safetensors; ``what`` names its kind in the message.
    """
    try:
        header = _header_bytes(path)
        with safe_open(path, framework="pt") as file:
            about = _about((file.metadata() or {}).get(_KEY, "{}"))
            tensors = {key: _tensor(file, key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        claimed = about.get("sha256")
        if claimed is not None and claimed != checksum(path, 8 + header):
            raise ValueError("its content does not match its checksum")
    except OSError as problem:
        raise error(f"cannot read {what} {path}: {problem.strerror or problem}") from problem
    except (SafetensorError, ValueError, RuntimeError, MemoryError, RecursionError) as problem:
        reason = shortened(str(problem), 300)
        raise error(f"{path} is damaged or not a {what} file (safetensors): {reason!r}") from problem
    return tensors, about


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors with a checksum, atomically: a reader sees the old file or the new one. OSError passes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    metadata = json.dumps({**about, "sha256": _UNKNOWN})
    try:
        save_file(dict(tensors), temporary, {_KEY: metadata})
        _stamp(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def misfit(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The first difference in names, types or shapes; an empty string where there is none."""
    if wanted.keys() != found.keys():
        odd = sorted(wanted.keys() ^ found.keys())
        return shortened(f"it lacks or has beside the others: {', '.join(map(repr, odd[:5]))}", 300)
    for name, want in wanted.items():
        got = found[name]
        if got.dtype != want.dtype or got.shape != want.shape:
            return f"{name} is {list(got.shape)} {got.dtype}, expected {list(want.shape)} {want.dtype}"
    return ""


def _header_bytes(path: Path) -> int:
    """The length of the header; ValueError where there is none, or more than the file or anybody needs."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no plain file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if status.st_size < 8 or not 2 <= length <= min(LONGEST_HEADER, status.st_size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {status.st_size}")
    return length


def _tensor(file: Any, key: str) -> Tensor:
    """One tensor; ValueError where torch has no such shape (it may be empty, with an axis of any length)."""
    try:
        tensor: Tensor = file.get_tensor(key)
    except TypeError as error:
        raise ValueError(str(error).partition("\n")[0]) from None
    return tensor


def _about(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("its description is no mapping")
    return found


def checksum(path: Path, start: int = 0) -> str:
    """SHA-256 of a file from a byte on, without holding it in memory.

    That of a tensor file begins after the header, whose own damage shows as names, types or shapes that do not fit.
    """
    found = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while part := file.read(_AT_ONCE):
            found.update(part)
    return found.hexdigest()


def _stamp(path: Path) -> None:
    """Put the checksum in the place that was kept for it in the header."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        at = 8 + file.read(length).index(_UNKNOWN.encode())
        file.seek(at)
        file.write(checksum(path, 8 + length).encode())


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of its own on a device: what lies in a mapped file would change with the file."""
    moved = tensor.to(device)
    return moved.clone() if moved is tensor else moved
