"""Where specs come from: a path, or the bare name of one that is shipped with the package."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from titans_graph.errors import LimitExceeded, Span, SyntaxProblem, UsageError
from titans_graph.ir.hints import nearest
from titans_graph.ir.limits import MAX_BYTES
from titans_graph.spec.load import Declared, declare
from titans_graph.spec.tree import Source

SHIPPED = Path(__file__).resolve().parent.parent / "specs"
"""The folder of the shipped specs."""


def shipped() -> list[str]:
    """The names of the specs shipped with the package, such as ``mac`` and ``blocks/mac``, sorted."""
    return sorted(p.relative_to(SHIPPED).with_suffix("").as_posix() for p in SHIPPED.rglob("*.yaml"))


def find(path: str | PathLike[str]) -> Path:
    """The file of a spec: the path where a file is there, else the shipped spec of that name; UsageError if none."""
    asked = Path(path)
    try:
        if asked.is_file():
            return asked
        names = shipped()
        stem = asked.as_posix().removesuffix(".yaml")
        if stem in names:
            return SHIPPED / f"{stem}.yaml"
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot look for a spec at {str(path)[:200]!r}: {error}") from None
    if asked.is_dir():
        raise UsageError(f"{str(asked)!r} is a folder; give the path of a spec file in it")
    near = nearest(asked.as_posix(), names)
    mean = f"did you mean {near!r}? " if near else ""
    raise UsageError(f"no spec file at {str(asked)!r}; {mean}shipped specs: {', '.join(names) or 'none'}")


def read(path: str | PathLike[str], /, **overrides: Any) -> Declared:
    """Read a spec file, or a shipped spec by name; spec parameters are overridden by keyword.

    Mistakes of the content are diagnostics of the result; UsageError where there is no such file or it cannot be read.
    """
    file = find(path)
    name = str(file)
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read spec {name!r}: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        return Declared(None, [LimitExceeded(f"the file is larger than {MAX_BYTES} bytes", Span(name, 1, 1))])
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        readable = content[: error.start].decode("utf-8").removeprefix("\ufeff")
        place = Source(readable, name).offset(len(readable))
        message = f"byte 0x{content[error.start]:02x} is not UTF-8"
        return Declared(None, [SyntaxProblem(message, place, help="save the file as UTF-8 text")])
    return declare(text, name, file.stem, overrides)


def read_text(text: str, name: str = "<text>", **overrides: Any) -> Declared:
    """Read a spec from a text; ``name`` stands for the file in messages. Never raises for bad content."""
    return declare(text, name, Path(name).stem or "spec", overrides)
