"""``$name`` and the tiny arithmetic around it, by a tokenizer and a precedence parser of its own (never ``eval``).

A text holding a single ``$`` is a formula: ``$dim``, ``$dim * 4``, ``($a + 1) // 2``. ``$$`` stands for a plain dollar
sign in a text that is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from titans_graph.errors import Diagnostic, LimitExceeded, SyntaxProblem, UnknownName, WrongType
from titans_graph.ir.hints import hint
from titans_graph.ir.values import UNRESOLVED, number_problem

_NUMBER = r"[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
_TOKEN = re.compile(rf"\s*(?:\$[^\W\d]\w*|{_NUMBER}|//|[-+*/()])")
_NAME = re.compile(r"\$([^\W\d]\w*)")
_LONGEST = 200
_DEEPEST = 16


class FormulaError(Exception):
    """A formula that cannot be evaluated, as the pieces of a diagnostic."""

    def __init__(self, kind: type[Diagnostic], message: str, help: str = "") -> None:
        super().__init__(message)
        self.kind, self.message, self.help = kind, message, help


def is_formula(text: str) -> bool:
    """Whether a text holds a dollar sign that is not doubled."""
    return "$" in text.replace("$$", "")


def literal(text: str) -> str:
    """The text that a non-formula stands for."""
    return text.replace("$$", "$")


def escape(text: str) -> str:
    """A text that reads as itself."""
    return text.replace("$", "$$")


def names(text: str) -> list[str]:
    """The parameters a formula mentions, well-formed or not."""
    return _NAME.findall(text)


def evaluate(text: str, scope: Mapping[str, Any]) -> Any:
    """The value of a formula; a lone ``$name`` may be anything, operands are numbers. Else FormulaError."""
    if len(text) > _LONGEST:
        raise FormulaError(LimitExceeded, f"a formula has at most {_LONGEST} characters")
    single = _NAME.fullmatch(text.strip())
    if single:
        return _parameter(single[1], scope)
    unknown = [n for n in names(text) if n not in scope]
    if unknown:
        _parameter(unknown[0], scope)
    if any(scope[n] is UNRESOLVED for n in names(text)):
        return UNRESOLVED
    parser = _Parser(_tokens(text), scope)
    value = parser.sum(0)
    if parser.position < len(parser.tokens):
        raise FormulaError(SyntaxProblem, f"{parser.tokens[parser.position]!r} is out of place in a formula")
    return value


def _parameter(name: str, scope: Mapping[str, Any]) -> Any:
    if name not in scope:
        help = hint(name, scope, "" if scope else "the spec declares no parameters")
        raise FormulaError(UnknownName, f"unknown parameter '${name}'", help)
    return scope[name]


def _tokens(text: str) -> list[str]:
    found, position = [], 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            wrong = text[position:].lstrip()[:1]
            message = f"{wrong!r} is out of place in a formula"
            raise FormulaError(SyntaxProblem, message, "formulas know $name, numbers, + - * / // and parentheses")
        found.append(match[0].strip())
        position = match.end()
    return found


class _Parser:
    def __init__(self, tokens: list[str], scope: Mapping[str, Any]) -> None:
        self.tokens, self.scope, self.position = tokens, scope, 0

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def next(self) -> str:
        token = self.peek()
        self.position += 1
        return token

    def sum(self, depth: int) -> int | float:
        value = self.product(depth)
        while self.peek() in ("+", "-"):
            operator = self.next()
            value = _apply(operator, value, self.product(depth))
        return value

    def product(self, depth: int) -> int | float:
        value = self.atom(depth)
        while self.peek() in ("*", "/", "//"):
            operator = self.next()
            value = _apply(operator, value, self.atom(depth))
        return value

    def atom(self, depth: int) -> int | float:
        if depth > _DEEPEST:
            raise FormulaError(LimitExceeded, f"a formula is nested deeper than {_DEEPEST}")
        token = self.next()
        if token == "(":
            value = self.sum(depth + 1)
            if self.next() != ")":
                raise FormulaError(SyntaxProblem, "a parenthesis is not closed")
            return value
        if token == "-":
            return -self.atom(depth + 1)
        if token.startswith("$"):
            return _operand(token, self.scope[token[1:]])
        if token[:1].isdigit() or token[:1] == ".":
            return _checked(float(token) if set(token) & set(".eE") else int(token))
        where = f"before {token!r}" if token else "at the end of a formula"
        raise FormulaError(SyntaxProblem, f"a number or $name is missing {where}")


def _operand(token: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormulaError(WrongType, f"{token} is {value!r:.60}, and only numbers can be calculated with")
    return value


def _checked(value: int | float) -> int | float:
    problem = number_problem(value)
    if problem:
        raise FormulaError(LimitExceeded, problem)
    return value


def _apply(operator: str, a: int | float, b: int | float) -> int | float:
    if operator in ("/", "//") and b == 0:
        raise FormulaError(WrongType, "a formula divides by zero")
    try:
        if operator == "+":
            return _checked(a + b)
        if operator == "-":
            return _checked(a - b)
        if operator == "*":
            return _checked(a * b)
        return _checked(a / b if operator == "/" else a // b)
    except OverflowError:
        raise FormulaError(LimitExceeded, "a formula's result is too large") from None
