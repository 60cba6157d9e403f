"""Byte-level text: where it comes from, how it is split, and which bytes a training step sees.

A token is a byte (vocabulary 256), so a model needs no tokenizer and its loss is directly comparable with compressors.
Three sources:

- a **file** is memory-mapped and split by position: the first 95 % train, the last 5 % validation;
- a **folder** is read recursively in the order of its relative paths; every file that is UTF-8 text without zero
  bytes is one document; hidden files and folders and linked folders are left out; reading stops before
  :data:`CAP_BYTES`;
- by default, the **Python standard library's own sources**: every machine that runs this package has them. Tests,
  site-packages and caches are left out; about 11 MB, depending on the Python version.

Documents are joined as they are (a newline is added to one that lacks its last newline). Folders are split by whole
documents: see :func:`split`.

Which bytes a step sees is a pure function of (seed, step, row): the sampler keeps no state, so a run that resumes at a
step sees exactly the bytes it would have seen without the interruption.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_graph.errors import DataError, UsageError

VOCABULARY = 256
VALIDATION_FRACTION = 0.05
CAP_BYTES = 256 * 2**20
"""Most bytes taken from a folder: it is held in memory, and more than a small machine trains on in a day."""

STANDARD = "Python standard library"
"""The name of the text that is taken where none is given."""

SMALLEST = 40
"""Fewest bytes that are split: both parts then have at least two."""

_OPENING = 4096
"""Bytes in which the first words are looked for."""
_WORDS = re.compile(r"\b[^\W\d_]{1,40}(?: [^\W\d_]{1,40})?\b")

SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"})
"""Folders of the standard library that are not its own sources."""


@dataclass(frozen=True, eq=False)
class Text:
    """Text as bytes, split in two. ``train`` and ``validation`` are uint8 ``[n]`` on the CPU.

    ``name`` says where it comes from; ``report`` is one sentence on what was taken and what was left out; ``path`` is the
    absolute path of its file or folder, None for the standard library's and for a text made by a program.
    """

    name: str
    train: Tensor
    validation: Tensor
    report: str
    path: str | None = None

    @cached_property
    def identity(self) -> str:
        """A hash of both parts: equal identity, equal bytes."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.validation):
            digest.update(struct.pack("<q", len(part)))
            digest.update(part.numpy().data)
        return digest.hexdigest()

    def batch(self, seed: int, step: int, rows: Sequence[int], length: int) -> Tensor:
        """The windows of one step: int64 ``[len(rows), length + 1]``, input and target overlapping by all but one byte.

        Row numbers count through the global batch, so several processes share one batch by taking different rows.
        Windows start anywhere in the training part, drawn independently. DataError where the text is too short.
        """
        starts = self.starts(length)
        windows = [self.train[s : s + length + 1] for s in (window_start(seed, step, row, starts) for row in rows)]
        return torch.stack(windows).long()

    def starts(self, length: int) -> int:
        """In how many places a window of ``length`` may start. DataError where the text is too short for one."""
        starts = len(self.train) - length
        if starts < 1:
            raise DataError(
                f"{self.name}: the training part has {len(self.train)} bytes, one window needs {length + 1}\n"
                "  help: give more text, or a smaller length"
            )
        return starts

    def opening(self) -> str:
        """The first words of the training part, at most two: a prompt that suits the text. Empty where it has no words."""
        start = self.train[:_OPENING].numpy().tobytes().decode("utf-8", "ignore")
        found = _WORDS.search(start)
        return found[0] if found else ""

    def stretch(self, size: int) -> Tensor:
        """The fixed validation stretch: the first ``size`` bytes of the validation part, uint8 (all of it for 0)."""
        return self.validation[:size] if size else self.validation


def window_start(seed: int, step: int, row: int, starts: int) -> int:
    """A start in ``range(starts)``, uniform, from a hash of (seed, step, row): everywhere the same."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, step, row), digest_size=8).digest()
    return (int.from_bytes(digest, "little") * starts) >> 64


def load(source: str | os.PathLike[str] | None = None, *, cap: int = CAP_BYTES) -> Text:
    """Text from a file, a folder, or (None) the Python standard library. DataError where there is nothing to read."""
    if source is None:
        return standard_library(cap=cap)
    path = Path(source)
    try:
        if path.is_dir():
            return replace(_from_folder(str(path), path, _files(path), cap), path=_absolute(path))
        if path.is_file():
            return _from_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if path.exists():
        raise DataError(f"{path}: neither a file nor a folder\n  help: give a text file or a folder of text files")
    raise DataError(f"{path}: no such file or folder\n  help: give a text file or a folder of text files")


def standard_library(*, cap: int = CAP_BYTES) -> Text:
    """The sources of the running Python's standard library, without tests, site-packages and caches."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for f in _files(root, SKIPPED_FOLDERS) if f.suffix == ".py"]
    if not files:
        raise DataError(f"{root}: this Python ships no standard library sources\n  help: give a file or folder as data")
    return _from_folder(STANDARD, root, files, cap)


def split(documents: Sequence[tuple[str, bytes]], fraction: float = VALIDATION_FRACTION) -> tuple[list[int], list[int]]:
    """Indices of training and of validation documents, from ``(relative path, content)`` pairs; at least two of them.

    Documents are walked in the order of a hash of their paths and taken for validation until it holds ``fraction`` of
    all bytes; one that would bring it over twice that is passed over. If none fits, the smallest is taken. So the
    split depends on nothing but paths and sizes, and the validation part is a sample of the whole, not its last
    folder.
    """
    order = sorted(range(len(documents)), key=lambda i: hashlib.blake2b(documents[i][0].encode(), digest_size=8).digest())
    total = sum(len(content) for _, content in documents)
    held: list[int] = []
    size = 0
    for i in order:
        if size >= fraction * total:
            break
        if size + len(documents[i][1]) <= 2 * fraction * total:
            held.append(i)
            size += len(documents[i][1])
    if not held:
        held = [min(order, key=lambda i: len(documents[i][1]))]
    return [i for i in range(len(documents)) if i not in set(held)], held


def _from_file(path: Path) -> Text:
    size = path.stat().st_size
    if size < SMALLEST:
        raise DataError(
            f"{path}: {size} bytes are too few for a training and a validation part\n  help: give a text of at least {SMALLEST}"
        )
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    cut = _cut(size)
    report = f"{path}: {size:,} bytes; the first {cut:,} train, the last {size - cut:,} validation"
    return Text(str(path), whole[:cut], whole[cut:], report, _absolute(path))


def _absolute(path: Path) -> str:
    return os.path.abspath(path)


def _from_folder(name: str, root: Path, files: Iterable[Path], cap: int) -> Text:
    documents, skipped, capped = _read_documents(root, files, cap)
    notes = f", {skipped} skipped as no text" if skipped else ""
    notes += f", {capped} left out by the cap of {cap:,} bytes" if capped else ""
    total = sum(len(content) for _, content in documents)
    if total < SMALLEST:
        raise DataError(
            f"{name}: {total} bytes of text in {len(documents)} files{notes}\n  help: give a folder with more UTF-8 text in it"
        )
    if len(documents) == 1:
        cut = _cut(total)
        train, held, parts = documents[0][1][:cut], documents[0][1][cut:], "one file, split by position"
    else:
        first, second = split(documents)
        train, held = (b"".join(documents[i][1] for i in part) for part in (first, second))
        parts = f"{len(first)} files train, {len(second)} validation"
    report = f"{name}: {total:,} bytes ({parts}{notes}); {len(train):,} bytes train, {len(held):,} validation"
    return Text(name, _tensor(train), _tensor(held), report)


def _cut(size: int) -> int:
    """Where a text that is split by position ends its training part."""
    return size - max(2, int(size * VALIDATION_FRACTION))


def _read_documents(root: Path, files: Iterable[Path], cap: int) -> tuple[list[tuple[str, bytes]], int, int]:
    """``(relative path, content)`` of the text files up to the cap; and how many were no text or past the cap."""
    documents: list[tuple[str, bytes]] = []
    skipped = capped = total = 0
    for file in files:
        if capped or total + file.stat().st_size > cap:
            capped += 1
            continue
        content = file.read_bytes()
        if not _is_text(content):
            skipped += bool(content)
            continue
        content += b"" if content.endswith(b"\n") else b"\n"
        documents.append((file.relative_to(root).as_posix(), content))
        total += len(content)
    return documents, skipped, capped


def _is_text(content: bytes) -> bool:
    if not content or b"\0" in content:
        return False
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _files(root: Path, without: frozenset[str] = frozenset()) -> list[Path]:
    """Regular files below ``root`` by relative path; no hidden ones, linked folders, or folders ``without``."""
    found = []
    for folder, folders, files in os.walk(root, followlinks=False):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in without]
        found += [p for p in (Path(folder, f) for f in files if not f.startswith(".")) if p.is_file()]
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def check_logits(found: Any) -> None:
    """UsageError unless what a model gave is one tensor of logits ``[..., vocabulary]`` that can speak bytes."""
    if not isinstance(found, Tensor):
        names = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise UsageError(
            f"the model gives {names:.200}; byte text needs one output, the logits: leave the others out of the spec"
        )
    check_vocabulary(found.shape[-1])


def check_vocabulary(size: int) -> None:
    """UsageError unless a model with ``size`` logits can speak bytes."""
    if size < VOCABULARY:
        raise UsageError(f"the model has {size} logits a token; byte text needs {VOCABULARY}: set the spec's vocabulary to 256")
