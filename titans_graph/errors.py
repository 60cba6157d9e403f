"""The error catalogue: the first stage of the pipeline, imported by every other module.

Two kinds of mistakes are told apart. A *diagnostic* is a mistake (or warning) in a declared graph: it knows its place in
the file, or the node when the graph came from Python, and how to mend it; all diagnostics of a graph are collected and
raised together as one :class:`SpecError`. Every other user mistake is an exception under :class:`TitansGraphError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class TitansGraphError(Exception):
    """Root of every error this package raises on purpose."""


class StateError(TitansGraphError):
    """A state does not fit the model, or a state file is damaged."""


class InputError(TitansGraphError):
    """A tensor handed to a model has the wrong shape, type, device or content."""


class CheckpointError(TitansGraphError):
    """A training checkpoint cannot be written or read."""


class DataError(TitansGraphError):
    """The training text is missing, unreadable or too small."""


class UsageError(TitansGraphError):
    """A public function was called in a way that cannot work; the message says which way does."""


class PluginError(TitansGraphError):
    """A component of another installed project cannot be imported, or is none."""


@dataclass(frozen=True)
class Span:
    """A place in a source text: 1-based ``line`` and ``column``, the ``width`` of the caret, and the line itself."""

    file: str
    line: int
    column: int
    width: int = 1
    text: str = ""


@dataclass(frozen=True)
class Diagnostic:
    """One mistake in a declared graph. Subclasses are the catalogue; the class is the kind of mistake.

    ``span`` is its place in a file (None for graphs built in Python), ``node`` the node it belongs to (may be empty),
    ``help`` what to do about it (may be empty).
    """

    message: str
    span: Span | None = None
    node: str = ""
    help: str = ""

    severity = "error"

    def render(self) -> str:
        """The diagnostic as text: ``file:line:col: error: message``, the line, a caret and a help line; bounded in length."""
        lines = []
        if self.span is not None:
            where = f"{self.span.file}:{self.span.line}:{self.span.column}"
        else:
            where = f"node {shortened(self.node, 200)!r}" if self.node else "graph"
        lines.append(f"{where}: {self.severity}: {shortened(self.message)}")
        if self.span is not None and self.span.text:
            shown, column = _clip(self.span.text, self.span.column)
            number = str(self.span.line)
            lines.append(f"    {number} | {shown}")
            caret = " " * (column - 1) + "^" * max(1, min(self.span.width, len(shown) - column + 1))
            lines.append(f"    {' ' * len(number)} | {caret}")
        if self.help:
            lines.append(f"  help: {shortened(self.help)}")
        return "\n".join(lines)


def shortened(text: str, longest: int = 1000) -> str:
    """A text without its middle where it is longer: names and values come from files, and may be of any length."""
    if len(text) <= longest:
        return text
    half = (longest - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def _clip(text: str, column: int, width: int = 160) -> tuple[str, int]:
    """At most ``width`` characters of a line, holding the given 1-based column, with the column moved along."""
    text = text.rstrip("\n").replace("\t", " ")
    if len(text) <= width:
        return text, column
    start = max(0, column - width // 2)
    return text[start : start + width], column - start


class SyntaxProblem(Diagnostic):
    """The text is not well-formed (YAML or graph text)."""


class LimitExceeded(Diagnostic):
    """The text is too large, too deep, or expands to too much."""


class UnsupportedVersion(Diagnostic):
    """The spec's ``titans_graph:`` version is missing or not one this package reads."""


class DuplicateKey(Diagnostic):
    """One mapping holds the same key twice."""


class UnknownKey(Diagnostic):
    """A mapping of the language holds a key it does not know."""


class MissingKey(Diagnostic):
    """A mapping of the language lacks a key it needs."""


class WrongType(Diagnostic):
    """A value has the wrong type or lies outside the allowed range."""


class UnknownComponent(Diagnostic):
    """``use:`` names neither a registered component nor a block."""


class UnknownParameter(Diagnostic):
    """A component, a block or a spec has no parameter of that name."""


class UnknownPort(Diagnostic):
    """A component or block has no input or output of that name."""


class UnknownName(Diagnostic):
    """A reference names no node, input or parameter."""


class MissingInput(Diagnostic):
    """A required input is not connected."""


class UnusedNode(Diagnostic):
    """Nothing that reaches the output reads this node, input or block."""


class UnusedParameter(Diagnostic):
    """A parameter is declared and never used, or set where it has no effect."""


class ShapeMismatch(Diagnostic):
    """Two values that meet have shapes that do not fit."""


class AlgebraicLoop(Diagnostic):
    """A feedback path without a delay."""


class CausalityLeak(Diagnostic):
    """An output depends on a later token."""


class SegmentProblem(Diagnostic):
    """A segment is missing, conflicts with another, or is not a multiple of the chunk."""


class SlowLoop(Diagnostic):
    """A feedback loop with a period of one token: legal and slow."""

    severity = "warning"


class IdleOverride(Diagnostic):
    """A parameter of a spec is overridden, and only the default of another overridden one reads it."""

    severity = "warning"


class SpecError(TitansGraphError):
    """All mistakes of one declared graph, sorted by place. ``diagnostics`` holds them; ``str()`` renders them."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics: list[Diagnostic] = in_order(diagnostics)
        super().__init__("\n".join(d.render() for d in self.diagnostics))


def in_order(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """Diagnostics without repetition, sorted by file, line and column; those without a place come last, by node."""
    unique = dict.fromkeys(diagnostics)
    return sorted(
        unique,
        key=lambda d: (d.span.file, d.span.line, d.span.column, d.message) if d.span else ("\uffff", 0, 0, d.node + d.message),
    )


def raise_errors(diagnostics: Sequence[Diagnostic]) -> None:
    """Raise :class:`SpecError` when any diagnostic is an error; warnings pass."""
    if any(d.severity == "error" for d in diagnostics):
        raise SpecError(diagnostics)


def suggest(word: str, known: Iterable[str], default: str = "") -> str:
    """A help line ``did you mean 'x'?`` for a misspelt word, or ``default`` where nothing is near."""
    options = sorted(known)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    if default:
        return default
    return "known here: " + ", ".join(options) if 0 < len(options) <= 24 else ""
