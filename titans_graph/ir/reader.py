"""Graph text back to a graph: a line reader with a cursor, no recursion, as wary of hostile text as the YAML loader."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

from titans_graph.errors import Diagnostic, DuplicateKey, LimitExceeded, Span, SpecError, SyntaxProblem
from titans_graph.ir.hints import ENOUGH
from titans_graph.ir.limits import BLOCK_NAME, MAIN, MAX_BYTES, MAX_ELEMENTS, NAME
from titans_graph.ir.model import Block, Graph, Node, Ref
from titans_graph.ir.validate import capped
from titans_graph.ir.values import number_problem, plain_problem
from titans_graph.shapes import Value, fixed, ids, stream

_NUMBER = re.compile(r"[0-9]+", re.ASCII)
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_LONGEST_NUMBER = 40
_Item = TypeVar("_Item")


def parse(text: str, name: str = "<text>") -> Graph:
    """The graph that :func:`titans_graph.ir.to_text` printed; SpecError with places where the text is no graph.

    Only the form is checked; :func:`titans_graph.ir.validate` checks the rest.
    """
    if len(text) > MAX_BYTES:
        raise SpecError([LimitExceeded(f"the text is larger than {MAX_BYTES} bytes", Span(name, 1, 1))])
    reader = _Reader(name)
    for number, line in enumerate(text.split("\n"), 1):
        reader.take(number, line.removesuffix("\r"))
        if len(reader.problems) > ENOUGH:
            break
    graph = reader.finish()
    if reader.problems or graph is None:
        raise SpecError(capped(reader.problems))
    return graph


class _Bad(Exception):
    """One line is not well-formed."""

    def __init__(self, kind: type[Diagnostic], message: str, column: int, help: str = "") -> None:
        super().__init__(message)
        self.kind, self.message, self.column, self.help = kind, message, column, help


class _Cursor:
    """A place in one line."""

    def __init__(self, file: str, row: int, line: str) -> None:
        self.file, self.row, self.line, self.at = file, row, line, 0
        self.shown = "".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in line)

    def span(self, start: int) -> Span:
        """From ``start`` to here."""
        return Span(self.file, self.row, start + 1, max(1, self.at - start), self.shown)

    def bad(self, message: str, kind: type[Diagnostic] = SyntaxProblem, help: str = "") -> _Bad:
        """An error at this place."""
        return _Bad(kind, message, self.at, help)

    def skip(self) -> None:
        """Past blanks."""
        while self.at < len(self.line) and self.line[self.at] in " \t":
            self.at += 1

    def done(self) -> bool:
        """Whether nothing but blanks is left."""
        self.skip()
        return self.at >= len(self.line)

    def accept(self, mark: str) -> bool:
        """Past ``mark`` if it stands here."""
        self.skip()
        if not self.line.startswith(mark, self.at):
            return False
        self.at += len(mark)
        return True

    def expect(self, mark: str) -> None:
        """Past ``mark``, an error if it does not stand here."""
        if not self.accept(mark):
            found = self.line[self.at : self.at + 1]
            raise self.bad(f"expected {mark!r}, " + (f"got {found!r}" if found else "the line ends"))

    def word(self, pattern: re.Pattern[str]) -> str:
        """A name, or any text as a JSON string."""
        self.skip()
        found = pattern.match(self.line, self.at)
        if found:
            self.at = found.end()
            return found[0]
        quoted = _QUOTED.match(self.line, self.at)
        if quoted is None:
            raise self.bad("expected a name")
        try:
            value = json.loads(quoted[0])
        except ValueError:
            raise self.bad("not well-formed JSON string") from None
        self.at = quoted.end()
        assert isinstance(value, str)
        return value

    def number(self) -> int:
        """A whole number."""
        self.skip()
        found = _NUMBER.match(self.line, self.at)
        if found is None:
            raise self.bad("expected a whole number")
        if len(found[0]) > _LONGEST_NUMBER:
            raise self.bad(f"a number has at most {_LONGEST_NUMBER} digits", LimitExceeded)
        self.at = found.end()
        return int(found[0])

    def several(self, read: Callable[[], _Item], close: str) -> list[_Item]:
        """Items with commas between them up to ``close`` (the end of the line where it is empty)."""
        items: list[_Item] = []
        while not (self.accept(close) if close else self.done()):
            if items:
                self.expect(",")
            items.append(read())
        return items

    def json(self) -> Any:
        """A JSON value: finite numbers of 64 bits, no duplicate keys, bounded depth."""
        self.skip()
        try:
            value, end = _DECODER.raw_decode(self.line, self.at)
        except _BadValue as error:
            raise self.bad(str(error), error.kind) from None
        except RecursionError:
            raise self.bad("a value is nested too deep", LimitExceeded) from None
        except ValueError as error:
            raise self.bad(f"expected a JSON value: {error}") from None
        problem = plain_problem(value)
        if problem:
            raise self.bad(problem, LimitExceeded)
        self.at = end
        return value


class _BadValue(Exception):
    def __init__(self, message: str, kind: type[Diagnostic] = LimitExceeded) -> None:
        super().__init__(message)
        self.kind = kind


def _number(text: str) -> int | float:
    if len(text) > _LONGEST_NUMBER:
        raise _BadValue(f"a number has at most {_LONGEST_NUMBER} characters")
    value = float(text) if set(text) & set(".eE") else int(text)
    problem = number_problem(value)
    if problem:
        raise _BadValue(problem)
    return value


def _constant(text: str) -> Any:
    raise _BadValue(f"a number must be finite, got {text}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _BadValue("a key stands twice in one mapping", DuplicateKey)
    return found


_DECODER = json.JSONDecoder(parse_int=_number, parse_float=_number, parse_constant=_constant, object_pairs_hook=_object)


class _Open:
    """A block whose lines are being read."""

    def __init__(self, name: str, inputs: dict[str, Value], segment: int | None, span: Span, spans: dict[str, Span]) -> None:
        self.name, self.inputs, self.segment, self.span, self.spans = name, inputs, segment, span, spans
        self.nodes: list[Node] = []
        self.outputs: dict[str, Ref] = {}

    def block(self) -> Block:
        """The finished block."""
        return Block(self.name, self.inputs, tuple(self.nodes), self.outputs, self.segment, self.span, self.spans)


class _Reader:
    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Diagnostic] = []
        self.name: str | None = None
        self.main: _Open | None = None
        self.blocks: dict[str, _Open] = {}
        self.open: _Open | None = None
        self.count = 0

    def take(self, number: int, line: str) -> None:
        """One line; its mistakes are collected."""
        cursor = _Cursor(self.file, number, line)
        if cursor.done() or cursor.accept("#"):
            return
        inside = cursor.at > 0
        try:
            if not inside:
                self.head(cursor)
            elif self.open is None:
                raise cursor.bad("a node stands outside of a block", help="blocks begin with block NAME(...), or main(...)")
            else:
                self.inner(cursor, self.open)
            if not cursor.done():
                raise cursor.bad(f"{cursor.line[cursor.at :]!r:.40} is out of place")
        except _Bad as error:
            span = Span(self.file, number, error.column + 1, 1, cursor.shown)
            self.problems.append(error.kind(error.message, span, help=error.help))

    def head(self, cursor: _Cursor) -> None:
        """``graph NAME``, ``block NAME(...)`` or ``main(...)``."""
        keyword = cursor.word(NAME)
        if keyword == "graph" and self.name is None:
            self.name = cursor.word(BLOCK_NAME)
        elif keyword == "block":
            name = cursor.word(BLOCK_NAME)
            fresh = self.frame(cursor, name)
            if name in self.blocks:
                raise cursor.bad(f"a second block {name!r}", DuplicateKey)
            self.open = self.blocks[name] = fresh
        elif keyword == MAIN and self.main is None:
            self.open = self.main = self.frame(cursor, MAIN)
        elif keyword in ("graph", MAIN):
            raise cursor.bad(f"a second {keyword!r}", DuplicateKey)
        else:
            raise _Bad(
                SyntaxProblem,
                f"a line cannot begin with {keyword!r:.60}",
                0,
                "graph, block or main; nodes are indented",
            )

    def frame(self, cursor: _Cursor, name: str) -> _Open:
        """``(inputs) segment N`` after a block's name."""
        spans: dict[str, Span] = {}
        start = cursor.at

        def one() -> tuple[str, Value]:
            cursor.skip()
            begin, key = cursor.at, cursor.word(NAME)
            cursor.expect(":")
            value = self.shape(cursor, key)
            spans[key] = cursor.span(begin)
            return key, value

        cursor.expect("(")
        inputs = self.unique(cursor, cursor.several(one, ")"))
        segment = None
        if cursor.accept("segment"):
            cursor.skip()
            begin = cursor.at
            segment = cursor.number()
            spans["segment"] = cursor.span(begin)
        return _Open(name, inputs, segment, cursor.span(start), spans)

    def shape(self, cursor: _Cursor, name: str) -> Value:
        """``[B, T]``, ``[B, T, 128]`` or ``[16, 128]``."""
        cursor.expect("[")
        if cursor.accept("B"):
            cursor.expect(",")
            cursor.expect("T")
            dim = cursor.number() if cursor.accept(",") else None
            value = ids(name) if dim is None else stream(dim, name)
        else:
            length = cursor.number()
            cursor.expect(",")
            value = fixed(length, cursor.number(), name)
        cursor.expect("]")
        return value

    def unique(self, cursor: _Cursor, pairs: list[tuple[str, _Item]]) -> dict[str, _Item]:
        """The pairs as a mapping; a key that stands twice is an error."""
        found = dict(pairs)
        self.count += len(pairs)
        if self.count > MAX_ELEMENTS:
            raise cursor.bad(f"more than {MAX_ELEMENTS} elements", LimitExceeded)
        if len(found) < len(pairs):
            raise cursor.bad("a key stands twice on this line", DuplicateKey)
        return found

    def inner(self, cursor: _Cursor, block: _Open) -> None:
        """A node, or the outputs."""
        if cursor.accept("->"):
            if block.outputs:
                raise cursor.bad("the block has its outputs already", DuplicateKey)
            block.outputs = self.outputs(cursor, block)
        else:
            block.nodes.append(self.node(cursor))

    def outputs(self, cursor: _Cursor, block: _Open) -> dict[str, Ref]:
        """``name=ref, name=ref``."""

        def one() -> tuple[str, Ref]:
            cursor.skip()
            begin, key = cursor.at, cursor.word(NAME)
            cursor.expect("=")
            ref = self.ref(cursor)
            block.spans[f"-> {key}"] = cursor.span(begin)
            return key, ref

        return self.unique(cursor, cursor.several(one, ""))

    def ref(self, cursor: _Cursor) -> Ref:
        """``node`` or ``node.port``."""
        node = cursor.word(NAME)
        return Ref(node, cursor.word(NAME) if cursor.accept(".") else "")

    def node(self, cursor: _Cursor) -> Node:
        """``name = use(port=ref, port=[ref, ref]) key=json repeat N``."""
        start, name = cursor.at, cursor.word(NAME)
        span = cursor.span(start)
        cursor.expect("=")
        cursor.skip()
        start, use = cursor.at, cursor.word(BLOCK_NAME)
        spans = {"use": cursor.span(start)}
        cursor.expect("(")
        inputs = self.unique(cursor, cursor.several(lambda: self.port(cursor, spans), ")"))
        parameters: list[tuple[str, Any]] = []
        repeat = 1
        while not cursor.done():
            start, key = cursor.at, cursor.word(NAME)
            place = cursor.span(start)
            if key == "repeat" and not cursor.accept("="):
                cursor.skip()
                start, repeat = cursor.at, cursor.number()
                spans["repeat"] = cursor.span(start)
                break
            if key != "repeat":
                cursor.expect("=")
            spans[f"{key}:"] = place
            cursor.skip()
            start = cursor.at
            parameters.append((key, cursor.json()))
            spans[key] = cursor.span(start)
        return Node(name, use, self.unique(cursor, parameters), inputs, repeat, span, spans)

    def port(self, cursor: _Cursor, spans: dict[str, Span]) -> tuple[str, tuple[Ref, ...]]:
        """``port=ref`` or ``port=[ref, ref]``."""
        cursor.skip()
        start, key = cursor.at, cursor.word(NAME)
        spans[f"{key}:"] = cursor.span(start)
        cursor.expect("=")
        cursor.skip()
        start = cursor.at
        refs = cursor.several(lambda: self.ref(cursor), "]") if cursor.accept("[") else [self.ref(cursor)]
        spans[key] = cursor.span(start)
        return key, tuple(refs)

    def finish(self) -> Graph | None:
        """The graph, or None with the reason among the problems."""
        if self.problems:
            return None
        start = Span(self.file, 1, 1)
        if self.name is None:
            self.problems.append(SyntaxProblem("the text does not name a graph", start, help="begin with: graph NAME"))
        if self.main is None:
            self.problems.append(SyntaxProblem("the text has no main block", start, help="write main(x: [B, T, 64])"))
        if self.name is None or self.main is None:
            return None
        return Graph(self.name, self.main.block(), {name: block.block() for name, block in self.blocks.items()})
