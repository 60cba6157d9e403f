"""YAML text to a tree of values with places: the strict reader under the spec language.

PyYAML's pure-Python parser delivers events; this module builds the tree itself, without recursion and without ever
constructing an object from a tag. Duplicate keys, unknown tags, endless aliases and too large or too deep texts are
diagnostics with their place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from titans_graph.errors import Diagnostic, DuplicateKey, LimitExceeded, Span, SyntaxProblem
from titans_graph.ir.limits import MAX_DEPTH, MAX_ELEMENTS
from titans_graph.ir.values import UNRESOLVED
from titans_graph.spec.scalars import BadScalar, resolve

_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
MERGE = "<<"


@dataclass(frozen=True, eq=False)
class Scalar:
    """A leaf: its ``text`` as written (references and names use it), and its ``value`` by the core schema."""

    text: str
    value: Any
    span: Span
    size: int = 1
    depth: int = 0


@dataclass(frozen=True, eq=False)
class Items:
    """A list."""

    items: tuple[Tree, ...]
    span: Span
    size: int = 1
    depth: int = 1


@dataclass(frozen=True, eq=False)
class Entry:
    """One key of a mapping and what it maps to."""

    key: Scalar
    value: Tree


@dataclass(frozen=True, eq=False)
class Table:
    """A mapping, in the order of the file, merge keys resolved."""

    entries: dict[str, Entry]
    span: Span
    size: int = 1
    depth: int = 1

    def get(self, key: str) -> Tree | None:
        """The value of a key, or None."""
        entry = self.entries.get(key)
        return entry.value if entry else None


Tree = Scalar | Items | Table


class Source:
    """A text with a name, able to say where an offset is and what stands on a line."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.text = text
        self.lines = _BREAK.split(text)
        self._shown: dict[int, str] = {}  # a file may be one line, and every value in it has a place

    def span(self, line: int, column: int, width: int = 1) -> Span:
        """The place of a 0-based line and column."""
        if line not in self._shown:
            self._shown[line] = _CONTROL.sub("\ufffd", self.lines[line] if 0 <= line < len(self.lines) else "")
        return Span(self.name, line + 1, column + 1, max(1, width), self._shown[line])

    def between(self, start: Any, end: Any) -> Span:
        """From one of PyYAML's marks to another; one character wide where it goes over several lines."""
        return self.span(start.line, start.column, end.column - start.column if start.line == end.line else 1)

    def offset(self, index: int) -> Span:
        """The place of a character offset."""
        before = _BREAK.split(self.text[:index])
        return self.span(len(before) - 1, len(before[-1]))


@dataclass(eq=False)
class _Frame:
    """A collection that is still open."""

    start: Any
    anchor: str | None
    mapping: bool
    dropped: bool
    items: list[Tree] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    merges: list[Entry] = field(default_factory=list)
    key: Scalar | None = None
    size: int = 1
    depth: int = 0


class _Stop(Exception):
    """No use in reading on."""


def compose(text: str, name: str) -> tuple[Tree | None, list[Diagnostic]]:
    """The tree of a YAML text (None where it cannot be read) and what is wrong with the text."""
    composer = _Composer(Source(text, name))
    composer.run()
    return composer.root, composer.problems


class _Composer:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.problems: list[Diagnostic] = []
        self.root: Tree | None = None
        self.documents = 0
        self.frames: list[_Frame] = []
        self.anchors: dict[str, Tree | None] = {}
        self.elements = 0

    def run(self) -> None:
        """Read the whole text; afterwards ``root`` and ``problems`` are set."""
        try:
            for event in yaml.parse(self.source.text, Loader=yaml.SafeLoader):
                self.take(event)
            return
        except _Stop:
            pass
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            span = self.source.span(mark.line, mark.column) if mark else self.source.span(0, 0)
            context = f" ({error.context})" if error.context else ""
            found = str(error.problem or "not well-formed")
            help = "indent with spaces: YAML takes no tabs there" if "'\\t'" in found else ""
            self.problem(SyntaxProblem, f"{found}{context}", span, help)
        except yaml.reader.ReaderError as error:
            code = error.character if isinstance(error.character, int) else ord(str(error.character)[:1] or "\0")
            self.problem(SyntaxProblem, f"character U+{code:04X} is not allowed", self.source.offset(error.position))
        except (ValueError, OverflowError, IndexError) as error:
            # PyYAML's scanner lets these out for escapes such as "\UFFFFFFFF" and directives with absurd numbers.
            self.problem(SyntaxProblem, f"not well-formed: {error}", self.source.span(0, 0))
        self.root = None

    def problem(self, kind: type[Diagnostic], message: str, span: Span, help: str = "") -> None:
        self.problems.append(kind(message, span, help=help))

    def stop(self, kind: type[Diagnostic], message: str, span: Span, help: str = "") -> None:
        self.problem(kind, message, span, help)
        raise _Stop

    def take(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.AliasEvent):
            self.alias(event)
        elif isinstance(event, yaml.ScalarEvent):
            self.scalar(event)
        elif isinstance(event, yaml.CollectionStartEvent):
            self.open(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            self.close(event)
        elif isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                span = self.source.between(event.start_mark, event.end_mark)
                self.stop(SyntaxProblem, "a second document begins here; a spec is one document", span)

    def tagged(self, event: Any) -> bool:
        """Whether a value has a tag; that is reported, and the value dropped."""
        if event.tag is not None:
            span = self.source.between(event.start_mark, event.end_mark)
            message = f"tag {event.tag!r} is not part of the language"
            self.problem(SyntaxProblem, message, span, "write the value without it")
        return event.tag is not None

    def scalar(self, event: yaml.ScalarEvent) -> None:
        span = self.source.between(event.start_mark, event.end_mark)
        value: Any = UNRESOLVED if self.tagged(event) else event.value
        if event.style is None and value is not UNRESOLVED:
            try:
                value = resolve(event.value)
            except BadScalar as error:
                value = UNRESOLVED
                self.problem(LimitExceeded, str(error), span, "put it in quotes if it is meant as a word")
        self.add(Scalar(event.value, value, span), event.anchor, merge=event.style is None and event.value == MERGE)

    def alias(self, event: Any) -> None:
        span = self.source.between(event.start_mark, event.end_mark)
        if event.anchor not in self.anchors:
            self.stop(SyntaxProblem, f"unknown alias '*{event.anchor}'", span)
        target = self.anchors[event.anchor]
        if target is None:
            self.stop(SyntaxProblem, f"alias '*{event.anchor}' stands inside the value it names", span)
        assert target is not None
        self.add(target, None, span)

    def open(self, event: yaml.CollectionStartEvent) -> None:
        dropped = self.tagged(event)
        if event.anchor:
            self.anchors[event.anchor] = None
        if len(self.frames) >= MAX_DEPTH:
            span = self.source.between(event.start_mark, event.end_mark)
            self.stop(LimitExceeded, f"nested deeper than {MAX_DEPTH}", span)
        mapping = isinstance(event, yaml.MappingStartEvent)
        self.frames.append(_Frame(event.start_mark, event.anchor, mapping, dropped))

    def close(self, event: yaml.CollectionEndEvent) -> None:
        frame = self.frames.pop()
        span = self.source.between(frame.start, event.end_mark)
        node: Tree
        if frame.dropped:
            node = Scalar("", UNRESOLVED, span, frame.size, frame.depth + 1)
        elif frame.mapping:
            node = Table({**self.merged(frame), **frame.entries}, span, frame.size, frame.depth + 1)
        else:
            node = Items(tuple(frame.items), span, frame.size, frame.depth + 1)
        self.add(node, frame.anchor)

    def merged(self, frame: _Frame) -> dict[str, Entry]:
        """What the merge keys of a mapping bring in; of several sources the earlier wins."""
        found: dict[str, Entry] = {}
        for entry in frame.merges:
            sources = entry.value.items if isinstance(entry.value, Items) else (entry.value,)
            for source in sources:
                if isinstance(source, Table):
                    for key, brought in source.entries.items():
                        found.setdefault(key, brought)
                else:
                    self.problem(SyntaxProblem, "'<<' takes a mapping, or a list of mappings", source.span)
        return found

    def add(self, node: Tree, anchor: str | None, place: Span | None = None, merge: bool = False) -> None:
        """A finished node (or the target of an alias, then with the alias's ``place``) joins its parent."""
        place = place or node.span
        if anchor:
            self.anchors[anchor] = node
        if len(self.frames) + node.depth > MAX_DEPTH:
            self.stop(LimitExceeded, f"nested deeper than {MAX_DEPTH} once aliases are expanded", place)
        parent = self.frames[-1] if self.frames else None
        # A finished collection was counted element by element; only leaves and aliases add to the total.
        self.elements += node.size if isinstance(node, Scalar) or place is not node.span else 1
        if self.elements > MAX_ELEMENTS:
            self.stop(LimitExceeded, f"more than {MAX_ELEMENTS} values once aliases are expanded", place)
        if parent is None:
            self.root = node
            return
        parent.size += node.size
        parent.depth = max(parent.depth, node.depth)
        if parent.mapping:
            self.pair(parent, node, place, merge)
        else:
            parent.items.append(node)

    def pair(self, frame: _Frame, node: Tree, place: Span, merge: bool) -> None:
        """A node joins a mapping, as key or as value."""
        if frame.key is None:
            if not isinstance(node, Scalar):
                self.stop(SyntaxProblem, "a key must be a word", place)
            assert isinstance(node, Scalar)
            # The span tells a merge key from a quoted "<<".
            frame.key = Scalar(node.text, MERGE if merge else None, place)
            return
        key, frame.key = frame.key, None
        if key.value == MERGE:
            frame.merges.append(Entry(key, node))
        elif key.text in frame.entries:
            first = frame.entries[key.text].key.span
            help = f"first at {first.line}:{first.column}"
            self.problem(DuplicateKey, f"key {key.text!r} stands here again", key.span, help)
        else:
            frame.entries[key.text] = Entry(key, node)
