"""Work grows no faster than the text that asks for it: counted in calls and bytes, not in seconds."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest

import titans_graph as tg
from tests.fuzz.campaign import calls
from titans_graph.errors import CausalityLeak
from titans_graph.ir.limits import MAX_NODES
from titans_graph.runtime import api
from titans_graph.spec import read_text

HEAD = "titans_graph: 1\ninput: {x: [B, T, 4]}\noutput: y\n"
BLOCK = "{input: {x: [B, T, 4]}, nodes: {%s}, output: %s}\n"


def handed_on(n: int) -> str:
    """Copies of a block that hands its input on."""
    return f"{HEAD}nodes: {{p: {{use: p, in: x, repeat: {n}}}, y: {{use: norm.rms, in: p}}}}\nblocks:\n  p: {BLOCK % ('', 'x')}"


def half_handed_on(n: int) -> str:
    """The same beside a node that is used as well."""
    block = BLOCK % ("a: {use: norm.rms, in: x}", "{o: x, a: a}")
    nodes = f"p: {{use: p, in: x, repeat: {n}}}, y: {{use: add, in: [p.o, p.a]}}"
    return f"{HEAD}nodes: {{{nodes}}}\nblocks:\n  p: {block}"


def backwards(n: int) -> str:
    """A chain whose last node is declared first: types flow against the order of the file."""
    chain = "".join(f"  n{i}: {{use: norm.rms, in: {f'n{i - 1}' if i else 'x'}}}\n" for i in reversed(range(n)))
    return f"{HEAD}nodes:\n  y: {{use: norm.rms, in: n{n - 1}}}\n{chain}"


def repeated(n: int) -> str:
    """Copies of one component."""
    return f"{HEAD}nodes: {{p: {{use: norm.rms, in: x, repeat: {n}}}, y: {{use: norm.rms, in: p}}}}\n"


def fan(n: int) -> str:
    """One node that reads many."""
    names = [f"n{i}" for i in range(n)]
    nodes = "".join(f"  {name}: {{use: norm.rms, in: x}}\n" for name in names)
    return f"{HEAD}nodes:\n{nodes}  y: {{use: add, in: [{', '.join(names)}]}}\n"


def leaks(n: int) -> str:
    """Many nodes through which an output depends on later tokens."""
    nodes = "".join(
        f"  n{i}: {{use: attention.segment, in: {f'n{i - 1}' if i else 'x'}, heads: 1, causal: false}}\n" for i in range(n)
    )
    return f"{HEAD}segment: 4\nnodes:\n{nodes}  y: {{use: norm.rms, in: n{n - 1}}}\n"


def loops(n: int) -> str:
    """Many feedback loops without a delay."""
    nodes = "".join(f"  a{i}: {{use: add, in: [x, b{i}]}}\n  b{i}: {{use: norm.rms, in: a{i}}}\n" for i in range(n))
    return f"{HEAD}nodes:\n{nodes}  y: {{use: add, in: [{', '.join(f'b{i}' for i in range(n))}]}}\n"


SHAPES: tuple[Callable[[int], str], ...] = (handed_on, half_handed_on, backwards, repeated, fan, leaks, loops)


@pytest.mark.parametrize("text", SHAPES, ids=lambda f: str(f.__name__))
def test_checking_four_times_as_much_is_about_four_times_the_work(text: Callable[[int], str]) -> None:
    api.check_declared(read_text(text(3)))  # imports
    few, many = (calls(lambda n=n: api.check_declared(read_text(text(n)))) for n in (50, 200))  # type: ignore[misc]
    assert many <= 5.0 * few, (few, many)


def test_too_many_nodes_are_refused_before_they_are_made() -> None:
    rows = [f"  b{i}: {BLOCK % (f'a: {{use: b{i + 1}, in: x, repeat: 100}}', 'a')}" for i in range(10)]
    nested = (
        f"{HEAD}nodes: {{y: {{use: b0, in: x}}}}\nblocks:\n{''.join(rows)}  b10: {BLOCK % ('a: {use: norm.rms, in: x}', 'a')}"
    )
    few = calls(lambda: api.check_declared(read_text(repeated(1))))
    found: list[tg.Diagnostic] = []
    assert calls(lambda: found.extend(api.check_declared(read_text(nested)))) < 100 * few
    assert [p.message for p in found] == [f"blocks and repeats make more than {MAX_NODES} nodes"]


def test_leaks_are_counted_and_cut_off() -> None:
    found = api.check_declared(read_text(leaks(150)))
    assert len(found) == 101
    assert all(type(p) is CausalityLeak for p in found[:100])


@pytest.mark.parametrize("text", ["[" * 900_000, "{" * 900_000, HEAD + "&a " * 200_000, "x" * 2_000_000, "? " * 300_000])
def test_rejecting_takes_memory_in_proportion_to_the_text(text: str) -> None:
    read_text(text[:100])
    tracemalloc.start()
    assert read_text(text).diagnostics
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 32 * len(text), f"{most:,} bytes for a text of {len(text):,}"


class Scrubber:
    """Stands for the pattern that takes control characters out of shown lines, and counts what it looks at."""

    def __init__(self) -> None:
        self.looked_at = 0

    def sub(self, new: str, text: str) -> str:
        """The text as it is."""
        self.looked_at += len(text)
        return text


def test_a_line_is_made_fit_to_be_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may be one line with a hundred thousand values, each of which has a place in it."""
    nodes = ", ".join(f"n{i}: {{use: nothing, in: x}}" for i in range(300))
    text = f"{{titans_graph: 1, input: {{x: [B, T, 4]}}, output: n0, nodes: {{{nodes}}}}}"
    scrubber = Scrubber()
    monkeypatch.setattr("titans_graph.spec.tree._CONTROL", scrubber)
    assert len(read_text(text).diagnostics) == 101
    assert scrubber.looked_at < 3 * len(text)


@pytest.mark.parametrize("wide", [False, True], ids=["lines", "one line"])
def test_reading_four_times_as_much_is_about_four_times_the_work(wide: bool) -> None:
    def graph(n: int) -> str:
        if wide:
            return f"graph g\nmain(x: [B, T, 4])\n  y = add(x=[{', '.join(['x'] * n)}])\n  -> y=y\n"
        return "graph g\nmain(x: [B, T, 4])\n" + "".join(f"  n{i} = norm.rms(x=x)\n" for i in range(n)) + "  -> y=n0\n"

    few, many = (calls(lambda n=n: tg.parse(graph(n))) for n in (100, 400))  # type: ignore[misc]
    assert many <= 5.0 * few, (few, many)
