"""Inputs that want to break a reader: damage to good ones that knows where tokens, lines, values and headers are.

Everything is drawn from one ``random.Random``, so that an input is a function of (target, seed, number) and a campaign
of millions needs no memory of what it tried.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import yaml

from titans_graph import registry

_TOKEN = re.compile(rb"[A-Za-z_][\w.-]*|\$[\w]+|[0-9.eE+-]+|\s+|.", re.DOTALL)
MOST = 20_000
"""Bytes of an input; limits of a megabyte have tests of their own."""

NUMBERS = (
    *(b"0", b"1", b"-1", b"2", b"3", b"7", b"63", b"64", b"65", b"100", b"10000", b"10001", b"99999", b"100001"),
    *(b"2147483647", b"2147483648", b"4294967296", b"9007199254740993", b"9223372036854775807", b"9223372036854775808"),
    *(b"-9223372036854775808", b"1e308", b"1e309", b"1e-320", b"-0.0", b".5", b"5.", b"1_000", b"0x10", b"0o17", b"010"),
    *(b"1e3", b"1e-3", b".inf", b"-.inf", b".nan", b"NaN", b"Infinity", b"-Infinity", b"9" * 39, b"9" * 41, b"9" * 5000),
    *("\u0663".encode(), "\u00b2".encode(), "\uff11".encode()),
)
WORDS = (
    *(b"true", b"false", b"null", b"~", b"on", b"no", b"yes", b"12:30", b"2001-01-01", b"x", b"y", b"B", b"T", b"main"),
    *(b"use", b"in", b"repeat", b"nodes", b"output", b"input", b"segment", b"parameters", b"blocks", b"name", b"graph"),
    *(b"titans_graph", b"block", b"->", b"layers", b"layer", b"size", b"weight", b"keep", b"__class__", b"__init__"),
    *(b"", b" ", b"''", b'""', b"[]", b"{}", b"[x]", b"{x: y}", b"{mlp: 2}", b"[x, x]", b"[B, T]", b"[B, T, 8]", b"[4, 8]"),
    *(b"$dim", b"$layers", b"$x", b"$", b"$$", b"$dim * 4", b"$dim // 0", b"-$dim", b"($dim", b"$dim ** 9", b"x.out"),
    *("\u00e9".encode(), "\U0001f40d".encode(), "\u202e".encode(), "\u2028".encode(), "\x85".encode(), "\u0130".encode()),
    *("\ufeff".encode(), "\ufffe".encode(), "e\u0301".encode(), b"\xed\xa0\x80", b"\xff", b"\x00", b"\x1b[31m", b"\x7f", b"\r"),
)
YAML = (
    *(b"&a ", b"*a", b"<<: *a", b"<<: {x: 1}", b"<<: [*a, *a]", b"!!python/object/apply:os.system ['x']", b"!!binary x"),
    *(b"!!int ", b"!!str ", b"!x ", b"!<tag:yaml.org,2002:int> ", b"? ", b"? [a, b]\n: c", b"|\n", b">-\n", b"---\n", b"...\n"),
    *(b"%YAML 1.1\n---\n", b"%TAG ! x\n---\n", b"\t", b"- ", b": ", b", ", b"# ", b"'", b'"', b'"\\x00"', b'"\\ud800"'),
    *(b'"\\U0010ffff"', b'"\\UFFFFFFFF"', b"[", b"]", b"{", b"}", b"&a [*a]", b"@", b"`", b"|3x\n", b"\n", b"\r\n", b"=: "),
)
KEYS = ("x", "use", "in", "repeat", "nodes", "output", "input", "segment", "parameters", "blocks", "name", "<<", "1", "", "é")
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        5,
        8,
        64,
        10_000,
        10_001,
        2**31,
        2**63,
        10**40,
        0.5,
        -0.0,
        1e308,
        1e-320,
        "",
        "x",
        "y",
    ),
    *(
        "$dim",
        "$layers",
        "$dim * 2",
        "$",
        "x.out",
        "main",
        "\u2028",
        "\x00",
        "a" * 100,
        [],
        {},
        ["x"],
        ["x", "x"],
        [[]],
        {"x": 1},
    ),
    *(
        {"mlp": 2},
        {"mlp": {"depth": 65}},
        "linear",
        {"nodes": {}},
        ["B", "T"],
        ["B", "T", 8],
        [4, 8],
        {"use": "add", "in": "x"},
    ),
)

Change = Callable[[Random, bytes, Sequence[bytes]], bytes]


def _place(draw: Random, data: bytes) -> tuple[int, int]:
    start = draw.randrange(len(data) + 1)
    return start, min(len(data), start + int(draw.expovariate(0.2)))


def flip(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Bits or bytes at random places."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8)) if changed else 0):
        at = draw.randrange(len(changed))
        changed[at] = changed[at] ^ (1 << draw.randrange(8)) if draw.random() < 0.5 else draw.randrange(256)
    return bytes(changed)


def cut(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """A stretch taken out, or the rest of the input."""
    start, end = _place(draw, data)
    return data[:start] + (b"" if draw.random() < 0.2 else data[end:])


def insert(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """A word, a number or a piece of YAML somewhere."""
    start, end = _place(draw, data)
    new = draw.choice(draw.choice((NUMBERS, WORDS, YAML)))
    return data[:start] + new + data[end if draw.random() < 0.5 else start :]


def tokens(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Tokens swapped, dropped, doubled, or replaced by those of another input or by odd ones."""
    parts = _TOKEN.findall(data)
    for _ in range(draw.choice((1, 1, 2, 4)) if parts else 0):
        at, other = draw.randrange(len(parts)), draw.randrange(len(parts))
        kind = draw.randrange(6)
        if kind == 0:
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 1:
            parts[at] = b""
        elif kind == 2:
            parts[at] = parts[at] * draw.choice((2, 2, 3, 50))
        elif kind == 3:
            parts[at] = parts[other]
        else:
            old = parts[at][:1]
            parts[at] = draw.choice(NUMBERS if old.isdigit() else WORDS if kind == 4 else _TOKEN.findall(draw.choice(seeds)))
    return b"".join(parts)


def lines(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Lines swapped, dropped, doubled, indented, or taken from another input."""
    rows = data.split(b"\n")
    at, other, kind = draw.randrange(len(rows)), draw.randrange(len(rows)), draw.randrange(6)
    if kind == 0:
        rows[at], rows[other] = rows[other], rows[at]
    elif kind == 1:
        del rows[at]
    elif kind == 2:
        rows[at:at] = [rows[at]] * draw.choice((1, 1, 2, 40))
    elif kind == 3:
        rows[at] = draw.choice((b" ", b"  ", b"\t", b"    ")) + rows[at]
    elif kind == 4:
        rows[at] = rows[at][draw.randrange(1, 5) :]
    else:
        rows.insert(at, draw.choice(draw.choice(seeds).split(b"\n")))
    return b"\n".join(rows)


def splice(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """The beginning of one input and the end of another."""
    other = draw.choice(seeds)
    return data[: _place(draw, data)[0]] + other[_place(draw, other)[0] :]


def nest(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Deep brackets, long lines, many equal things."""
    start, end = _place(draw, data)
    mark = draw.choice(
        (b"[", b"{", b"(", b"- ", b"{a: ", b"[[", b'{"a":', b"-", b"&a ", b"? ", b"a" * 9, b"\n ", b'"', b"$dim*")
    )
    return (data[:start] + mark * draw.choice((3, 17, 70, 300, 1500)) + data[end:])[:MOST]


def wrap(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Byte order marks, other encodings and line ends."""
    text = data.decode("utf-8", "replace")
    choices = (
        *(b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), data.replace(b"\n", b"\r"), data.replace(b" ", b"\t")),
        *(text.encode("utf-16"), text.encode("utf-32-le"), data.replace(b"\n", "\u2028".encode()), data + b"\x00", data * 2),
    )
    return draw.choice(choices)


def _positions(tree: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key or index) of a tree."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        found.append((tree, key))
        if isinstance(value, dict | list):
            _positions(value, found)
    return found


def change(draw: Random, tree: Any, donor: Any) -> None:
    """One value of a tree moved, renamed, replaced or taken out."""
    places, kind = _positions(tree, []), draw.randrange(7)
    if not places:
        return
    (inside, key), (there, other) = draw.choice(places), draw.choice(places)
    if kind == 0:
        inside[key] = copy.deepcopy(draw.choice(VALUES))
    elif kind == 1:
        inside[key] = copy.deepcopy(there[other])
    elif kind == 2:
        gift = _positions(donor, [])
        given, name = draw.choice(gift) if gift else ({"x": 1}, "x")
        inside[key] = copy.deepcopy(given[name])
    elif kind == 3:
        del inside[key]
    elif isinstance(inside, dict):
        names = [str(k) for _, k in places if isinstance(k, str)]
        new = draw.choice(names or ["x"]) if kind < 6 else draw.choice(KEYS)
        inside[new] = inside.pop(key) if kind == 4 else copy.deepcopy(there[other])
    else:
        inside.insert(key, copy.deepcopy(there[other]))
    if kind == 1 and isinstance(there, dict) and draw.random() < 0.2:
        there[other] = draw.choice(registry.names())


_LOADED: dict[bytes, Any] = {}


def _loaded(data: bytes) -> Any:
    if data not in _LOADED:
        _LOADED[data] = yaml.safe_load(data)
    return _LOADED[data]


def tree(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Values of a good input moved, renamed, replaced and taken out; written as JSON, which is YAML too."""
    grown = copy.deepcopy(_loaded(draw.choice(seeds)))
    if not isinstance(grown, dict | list):
        grown = [grown]
    for _ in range(draw.choice((1, 1, 2, 3, 5))):
        change(draw, grown, _loaded(draw.choice(seeds)))
    try:
        return json.dumps(grown, indent=draw.choice((None, 1)), ensure_ascii=draw.random() < 0.5).encode("utf-8", "replace")
    except (ValueError, TypeError, RecursionError):
        return data


def noise(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Nothing of the input: marks, words and numbers in any order."""
    pools = (NUMBERS, WORDS, YAML, YAML)
    return b"".join(
        draw.choice(draw.choice(pools)) + draw.choice((b"", b"", b" ", b"\n")) for _ in range(draw.randrange(1, 40))
    )


TEXT: tuple[Change, ...] = (flip, cut, insert, insert, tokens, tokens, tokens, lines, lines, splice, nest, wrap)


def text(draw: Random, seeds: Sequence[bytes], *, trees: bool = True) -> bytes:
    """One damaged text: one to a few changes to one of the seeds."""
    first = draw.random()
    data = draw.choice(seeds)
    if trees and first < 0.4:
        data = tree(draw, data, seeds)
    elif first < 0.45:
        data = noise(draw, data, seeds)
    if not trees and first > 0.5:
        return draw.choice((tokens, lines, insert))(draw, data, seeds)[:MOST]
    if first >= 0.25:
        for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
            data = draw.choice(TEXT)(draw, data, seeds)
    return data[:MOST]
