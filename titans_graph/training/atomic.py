"""Files that are either the old version or the new one, never half of one, whatever kills the process when.

A folder is written under a temporary name, file by file, each flushed to the disk, with a manifest of sizes and
checksums last; then the folder is flushed and renamed. Readers trust only folders whose manifest matches, so a folder
damaged later (a bad disk, a stray editor) is seen as well.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from titans_graph.errors import CheckpointError
from titans_graph.runtime import files
from titans_graph.training import reading

MANIFEST = "manifest.json"
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")
"""Names of files in a folder: nothing that leads out of it."""
_TEMPORARY = ".new-"
_RETIRED = ".old-"


def boundary(name: str) -> None:
    """Called between any two changes of the disk; does nothing. Tests replace it to crash or fill the disk there."""


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files`` (name to content) as one folder, replacing one of that name; CheckpointError naming the path.

    After an error or a crash at any point, ``folder`` is as it was or complete, or, where it was being replaced,
    absent.
    """
    temporary = folder.with_name(_TEMPORARY + folder.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        temporary.mkdir()
        for name, content in files.items():
            _write(temporary / name, content)
        manifest = {name: {"bytes": len(content), "sha256": _hash(content)} for name, content in files.items()}
        _write(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        _flush_folder(temporary)
        remove_folder(folder)
        boundary("before rename")
        temporary.rename(folder)
        boundary("after rename")
        _flush_folder(folder.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            _remove(temporary)
        raise failure(folder, error, sum(map(len, files.values()))) from error


def remove_folder(folder: Path) -> None:
    """Remove a folder so that it is at no moment there in part under its own name. OSError passes."""
    if folder.exists():
        retired = folder.with_name(_RETIRED + folder.name)
        _remove(retired)
        boundary("before retiring")
        folder.rename(retired)
        boundary("after retiring")
        _remove(retired)


def sweep(parent: Path) -> None:
    """Remove what crashed writers left in ``parent``; only for the process that holds the folder's lock."""
    if parent.is_dir():
        for entry in parent.iterdir():
            if entry.name.startswith((_TEMPORARY, _RETIRED)):
                _remove(entry)


def write_file(path: Path, content: bytes) -> None:
    """Write or replace one file atomically; CheckpointError naming the path."""
    temporary = path.with_name(_TEMPORARY + path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(temporary, content)
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            _remove(temporary)
        raise failure(path, error, len(content)) from error


def damage(folder: Path) -> str:
    """What is wrong with a folder written by :func:`write_folder`; empty when every byte is as written."""
    try:
        manifest = reading.json_of(folder / MANIFEST)
        for name, entry in manifest.items():
            path = folder / name
            if not _PLAIN.fullmatch(name):
                return f"{MANIFEST} names {name!r:.100}, which is not a file of this folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']!r:.40}"
            if files.checksum(path) != entry["sha256"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return ""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process alone; CheckpointError where another process holds it or it cannot be written.

    The lock is the kernel's (flock on ``folder/lock``): it goes when the process goes, however it goes. What the file says
    is for people: who holds it.
    """
    import fcntl

    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise failure(folder, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.write(handle, _owner().encode())
        except BlockingIOError as error:
            raise CheckpointError(_taken(folder, path)) from error
        except OSError as error:
            raise failure(path, error) from error
        yield
    finally:
        os.close(handle)


def _owner() -> str:
    return f"{os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %z')}"


def _taken(folder: Path, path: Path) -> str:
    try:
        owner = path.read_text(errors="replace").strip() or "unknown"
    except OSError:
        owner = "unknown"
    number = owner.partition(" ")[0]
    stop = f", stop it with `kill {number}` (it saves first)" if number.isdigit() else ""
    return (
        f"{folder}: another process (id {owner}) is training into this folder\n"
        f"  help: wait for it{stop}, or choose another --out"
    )


def failure(path: Path, error: OSError, needed: int = 0) -> CheckpointError:
    """What to raise where ``path``, of ``needed`` bytes (0: not known), cannot be written."""
    space, help = "", "choose a folder that can be written, with --out; what was saved before is intact"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        space = f" ({needed:,} bytes are needed{_free(path)})" if needed and error.errno != errno.EFBIG else ""
        help = "earlier checkpoints are intact; free space or choose another folder, then run the same command again"
    elif error.errno in (errno.EEXIST, errno.ENOTDIR):
        help = "a file is where a folder is needed: choose another --out"
    return CheckpointError(f"{path}: cannot be written: {error.strerror or error}{space}\n  help: {help}")


def _free(path: Path) -> str:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return f", {shutil.disk_usage(path).free:,} are free"
    except OSError:
        return ""


def _write(path: Path, content: bytes) -> None:
    boundary(f"before {path.name}")
    with open(path, "wb") as file:
        half = len(content) // 2
        file.write(content[:half])
        file.flush()
        boundary(f"inside {path.name}")
        file.write(content[half:])
        file.flush()
        os.fsync(file.fileno())
    boundary(f"after {path.name}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
