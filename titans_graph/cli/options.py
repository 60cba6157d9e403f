"""Command-line arguments that several commands share."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from titans_graph.errors import UsageError, shortened
from titans_graph.spec.scalars import BadScalar, resolve
from titans_graph.spec.tree import Items, Table, Tree, compose

SPEC_HELP = "a spec file, or the name of a shipped one such as mac"


class Commands(Protocol):
    """What ``add_subparsers`` returns."""

    def add_parser(self, name: str, **settings: Any) -> argparse.ArgumentParser:
        """A parser for one command."""


def command(commands: Commands, name: str, summary: str, example: str, detail: str = "") -> argparse.ArgumentParser:
    """A parser for one command whose help ends with an example."""
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {detail}".strip(),
        epilog=f"example:\n  titans-graph {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_spec(parser: argparse.ArgumentParser, needed: bool = True) -> None:
    """``SPEC`` and ``--set``."""
    parser.add_argument("spec", metavar="SPEC", nargs=None if needed else "?", help=SPEC_HELP)
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="spec parameters; values are YAML scalars",
    )


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number not below ``least``; argparse names the argument."""

    def read(text: str) -> int:
        try:
            found = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shortened(text, 60)!r} is no whole number") from None
        if found < least:
            raise argparse.ArgumentTypeError(f"{shortened(text, 60)} is out of range, at least {least}")
        return found

    return read


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """UsageError, naming ``--out``, where a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"--out {path}: cannot be written: {error.strerror or error}\n"
            "  help: name a file in a folder that is there and can be written"
        ) from error


def settings(pairs: list[str]) -> dict[str, Any]:
    """``["dim=64", "network={mlp: 2}"]`` as a mapping; UsageError for what is not KEY=VALUE or comes twice."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--set {pair}: expected KEY=VALUE, for example --set dim=128")
        if key in found:
            raise UsageError(f"--set {key}: given twice")
        found[key] = scalar(value)
    return found


def scalar(text: str) -> Any:
    """A value as a spec would read it: ``1e-3`` is a number, ``no`` and ``on`` are words, ``{mlp: 2}`` a mapping."""
    text = text.strip()
    if not text.startswith(("{", "[", '"', "'")):
        try:
            return resolve(text)
        except BadScalar as error:
            raise UsageError(f"--set: {text!r:.200} is no value ({error})") from None
    tree, problems = compose(text, "--set")
    if problems or tree is None:
        why = problems[0].message if problems else "nothing is there"
        raise UsageError(f"--set: {text!r:.200} is no value ({shortened(why, 200)})")
    return _plain(tree)


def _plain(tree: Tree) -> Any:
    """A tree as plain values; its depth is bounded by its reader."""
    if isinstance(tree, Table):
        return {key: _plain(entry.value) for key, entry in tree.entries.items()}
    return [_plain(item) for item in tree.items] if isinstance(tree, Items) else tree.value


def count(size: float) -> str:
    """A large number for people: ``1234`` is ``1,234``, ``1234567`` is ``1.23 M``."""
    for unit, name in ((1e9, " G"), (1e6, " M")):
        if size >= unit:
            return f"{size / unit:.2f}{name}"
    return f"{size:,.0f}"
