"""``did you mean``, bounded: comparing words is slow, and a hostile file must not buy hours with it."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from titans_graph.errors import suggest

ENOUGH = 300
"""Mistakes after which a search for more stops; far more than are shown."""
_MOST_WORDS = 500
_LONGEST_WORD = 64


class EnoughMistakes(Exception):
    """The search for mistakes stops here."""


def hint(word: str, known: Iterable[str], default: str = "") -> str:
    """A help line like :func:`titans_graph.errors.suggest`; none for overlong words or too many candidates."""
    options = list(known)
    if len(options) > _MOST_WORDS or len(word) > _LONGEST_WORD:
        return default
    return suggest(word, options, default)


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that a misspelt one probably means, or an empty string."""
    found = hint(word, known, default="-")
    return meant(found)


def meant(help: str) -> str:
    """The word inside a help line ``did you mean 'x'?``, or an empty string."""
    prefix = "did you mean "
    # The word stands there as Python writes it, with escapes in place of what cannot be shown.
    return str(ast.literal_eval(help[len(prefix) : -1])) if help.startswith(prefix) else ""
