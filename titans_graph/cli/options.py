"""Command-line arguments that several commands share."""

from __future__ import annotations

import argparse
from typing import Any, Protocol

import yaml

from titans_graph.errors import UsageError
from titans_graph.spec.scalars import BadScalar, resolve

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


def add_spec(parser: argparse.ArgumentParser) -> None:
    """``SPEC`` and ``--set``."""
    parser.add_argument("spec", metavar="SPEC", help=SPEC_HELP)
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="spec parameters; values are YAML scalars",
    )


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
    try:
        return yaml.load(text, Loader=_Words) if text.startswith(("{", "[", '"', "'")) else resolve(text)
    except (yaml.YAMLError, BadScalar) as error:
        raise UsageError(f"--set: {text!r} is no value ({str(error).splitlines()[0]})") from error


class _Words(yaml.SafeLoader):
    """SafeLoader whose plain scalars go read as in a spec."""

    def plain(self, node: yaml.ScalarNode) -> Any:
        """The value of a string node: quoted ones stay strings."""
        return resolve(node.value) if node.style is None else node.value


_Words.yaml_implicit_resolvers = {}
_Words.add_constructor("tag:yaml.org,2002:str", _Words.plain)


def count(size: float) -> str:
    """A large number for people: ``1234`` is ``1,234``, ``1234567`` is ``1.23 M``."""
    for unit, name in ((1e9, " G"), (1e6, " M")):
        if size >= unit:
            return f"{size / unit:.2f}{name}"
    return f"{size:,.0f}"
