from __future__ import annotations

import pytest

from titans_graph.errors import DuplicateKey, LimitExceeded, SpecError, SyntaxProblem
from titans_graph.ir import Block, Graph, Node, Ref, parse, to_text
from titans_graph.shapes import fixed, ids, stream

MAC = """\
graph mac
block mac(x: [B, T, 128], p: [16, 128]) segment 64
  memory = memory.neural(write=attended, ask=attended, opening=x) chunk=64 network={"mlp": {"depth": 2}}
  context = sequence.concat(x=[p, memory.recalled, x])
  attended = attention.full(x=context) keep="x"
  -> attended=attended, recall=memory.recall
main(tokens: [B, T])
  layers = mac(x=embedded, p=[]) repeat 2
  -> logits=layers
"""


def test_text_reads_back_and_prints_the_same() -> None:
    graph = parse(MAC)
    assert graph.text() == MAC
    mac = graph.blocks["mac"]
    assert mac.segment == 64
    assert mac.inputs == {"x": stream(128), "p": fixed(16, 128, "p")}
    assert graph.main.inputs == {"tokens": ids()}
    assert graph.main.nodes[0] == Node("layers", "mac", {}, {"x": (Ref("embedded"),), "p": ()}, 2)
    assert mac.outputs["recall"] == Ref("memory", "recall")


def test_comments_blank_lines_and_windows_line_ends_are_fine() -> None:
    assert parse("# a graph\r\n\r\n" + MAC.replace("\n", "\r\n")) == parse(MAC)


def test_odd_words_are_quoted() -> None:
    node = Node('a "b"\n', "c d", {"": 1}, {"p q": (Ref("é.", "\u2028"), Ref("é"))}, repeat=3)
    graph = Graph("x y", Block("main", {"\x00": ids("\x00")}, (node,), {"->": Ref("#")}))
    assert parse(to_text(graph)) == graph


@pytest.mark.parametrize(
    ("text", "kind", "place", "message"),
    [
        ("", SyntaxProblem, (1, 1), "the text does not name a graph"),
        ("graph g", SyntaxProblem, (1, 1), "the text has no main block"),
        ("graph g\n  y = a(x=x)", SyntaxProblem, (2, 3), "a node stands outside of a block"),
        ("graph g\nmain(x: [B, T])\n  y a", SyntaxProblem, (3, 5), "expected '=', got 'a'"),
        ("graph g\nmain(x: [B, T])\n  y = a(x=x", SyntaxProblem, (3, 12), "expected ',', the line ends"),
        ("graph g\nmain(x: [B])", SyntaxProblem, (2, 11), "expected ',', got ']'"),
        ("graph g\nmain(x: [B, T, q])", SyntaxProblem, (2, 16), "expected a whole number"),
        ("graph g\nmain(x: [B, T]) 3", SyntaxProblem, (2, 17), "'3' is out of place"),
        ("graph g\ngraph h", DuplicateKey, (2, 6), "a second 'graph'"),
        ("nonsense", SyntaxProblem, (1, 1), "a line cannot begin with 'nonsense'"),
        ("graph g\nmain(x: [B, T], x: [B, T])", DuplicateKey, (2, 27), "a key stands twice on this line"),
        ("main(x: [B, T])\n  y = a() k=1 k=2", DuplicateKey, (2, 18), "a key stands twice on this line"),
        ("main(x: [B, T])\n  y = a() k=[1", SyntaxProblem, (2, 13), "expected a JSON value"),
        ("main(x: [B, T])\n  y = a() k=NaN", LimitExceeded, (2, 13), "a number must be finite, got NaN"),
        ("main(x: [B, T])\n  y = a() k=1e999", LimitExceeded, (2, 13), "a number must be finite, got inf"),
        ("main(x: [B, T])\n  y = a() k=" + "9" * 5000, LimitExceeded, (2, 13), "a number has at most 40 characters"),
        ("main(x: [B, T])\n  y = a() k=" + "9" * 30, LimitExceeded, (2, 13), "a whole number must fit in 64 bits"),
        ('main(x: [B, T])\n  y = a() k={"a": 1, "a": 2}', DuplicateKey, (2, 13), "a key stands twice in one mapping"),
        ("main(x: [B, T])\n  y = a() k=" + "[" * 100_000, LimitExceeded, (2, 13), "a value is nested too deep"),
        ("main(x: [B, T])\n  y = a() k=" + "[" * 70 + "]" * 70, LimitExceeded, (2, 13), "a value is nested deeper"),
        ("main(x: [B, T]) segment " + "9" * 5000, LimitExceeded, (1, 25), "a number has at most 40 digits"),
        ('main("\\q": [B, T])', SyntaxProblem, (1, 6), "not well-formed JSON string"),
        ("main(x: [B, T])\n  -> y=y\n  -> z=z", DuplicateKey, (3, 5), "the block has its outputs already"),
        ("block a(x: [B, T])\nblock a(x: [B, T])", DuplicateKey, (2, 19), "a second block 'a'"),
        ("x" * 1_000_001, LimitExceeded, (1, 1), "the text is larger than 1000000 bytes"),
    ],
)
def test_bad_text_is_a_spec_error_with_its_place(text: str, kind: type, place: tuple[int, int], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text, "g.txt")
    first = caught.value.diagnostics[0]
    assert type(first) is kind
    assert first.message.startswith(message)
    assert first.span is not None
    assert (first.span.line, first.span.column) == place
    assert first.span.file == "g.txt"


def test_mistakes_of_several_lines_come_together_and_are_cut_off() -> None:
    with pytest.raises(SpecError) as caught:
        parse("graph g\nmain(x: [B, T])\n  y\n  z = \n")
    assert [d.span.line for d in caught.value.diagnostics if d.span] == [3, 4]
    with pytest.raises(SpecError) as caught:
        parse("?\n" * 200_000)
    assert len(caught.value.diagnostics) == 101
