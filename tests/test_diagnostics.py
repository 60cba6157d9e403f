"""What the passes refuse: the place, the line, a caret, and how to mend it."""

from __future__ import annotations

from pathlib import Path

import pytest

import titans_graph as tg
from titans_graph import errors
from titans_graph.ir import Block, Graph, Node, Ref
from titans_graph.shapes import stream

HEAD = "titans_graph: 1\n"


def check(tmp_path: Path, text: str) -> list[errors.Diagnostic]:
    path = tmp_path / "spec.yaml"
    path.write_text(HEAD + text)
    return tg.check(path)


def rendered(tmp_path: Path, text: str) -> str:
    return "\n".join(d.render() for d in check(tmp_path, text)).replace(str(tmp_path) + "/", "")


def test_a_shape_mismatch_shows_both_shapes_and_where_they_come_from(tmp_path: Path) -> None:
    text = """input: {x: [B, T, 8]}
nodes:
  wide: {use: linear, in: x, dim: 12}
  y: {use: add, in: [x, wide]}
output: y
"""
    (found,) = check(tmp_path, text)
    assert isinstance(found, errors.ShapeMismatch)
    assert found.span is not None
    assert (found.span.line, found.node) == (5, "y")
    assert "[B, T, 8] from graph input 'x'" in found.message
    assert "[B, T, 12] from 'wide'" in found.message
    assert ":4)" in found.message


def test_feedback_without_delay_prints_the_loop(tmp_path: Path) -> None:
    text = """input: {x: [B, T, 8]}
nodes:
  a: {use: add, in: [x, b]}
  b: {use: linear, in: a}
output: a
"""
    (found,) = check(tmp_path, text)
    assert isinstance(found, errors.AlgebraicLoop)
    assert "a.out -> b.x -> b.out -> a.x" in found.help or "b.out -> a.x -> a.out -> b.x" in found.help


def test_feedback_through_reading_after_the_own_write_is_refused(tmp_path: Path) -> None:
    text = """input: {x: [B, T, 8]}
segment: 8
nodes:
  m: {use: memory.neural, opening: x, write: y, ask: x, heads: 2, chunk: 4}
  y: {use: add, in: [x, m.recall]}
output: y
"""
    (found,) = check(tmp_path, text)
    assert isinstance(found, errors.AlgebraicLoop)
    assert "m.recall" in found.help


@pytest.mark.parametrize("repeat", ["twice", "1.5", "0", "[1]"])
def test_a_repeat_that_is_no_number_is_reported_and_not_followed(tmp_path: Path, repeat: str) -> None:
    text = f"""input: {{x: [B, T, 8]}}
nodes:
  y: {{use: norm.rms, in: x, repeat: {repeat}}}
output: y
"""
    (found,) = check(tmp_path, text)
    assert isinstance(found, errors.WrongType)
    assert "repeat" in found.message


def test_a_repeat_that_is_no_number_is_reported_for_graphs_from_python() -> None:
    node = Node("y", "norm.rms", {}, {"x": (Ref("x"),)}, repeat="twice")  # type: ignore[arg-type]
    (found,) = tg.check(Graph("g", Block("main", {"x": stream(8)}, (node,), {"y": Ref("y")})))
    assert isinstance(found, errors.WrongType)


def test_what_reads_an_unknown_component_is_not_judged(tmp_path: Path) -> None:
    text = """input: {x: [B, T, 8]}
nodes:
  a: {use: nothing.known, in: x}
  y: {use: add, in: [a, x]}
output: y
"""
    (found,) = check(tmp_path, text)
    assert isinstance(found, errors.UnknownComponent)


def test_a_block_without_a_connection_is_not_judged_inside(tmp_path: Path) -> None:
    text = """input: {x: [B, T, 8]}
nodes:
  y: {use: inner, z: x}
output: y
blocks:
  inner:
    input: {x: [B, T, 8], z: [B, T, 8]}
    nodes:
      prefix: {use: tokens.persistent, count: 2}
      both: {use: sequence.concat, in: [prefix, x]}
      seen: {use: attention.window, in: both, heads: 2, window: 3}
      y: {use: add, in: [seen, z]}
    output: y
"""
    (found,) = check(tmp_path, text)
    assert isinstance(found, errors.MissingInput)


BORDER = """input: {x: [B, T, 4]}
nodes:
  prefix: {use: tokens.persistent, count: 3}
  wide: {use: linear, in: x, dim: %d}
  y: {use: outer, x: wide, prefix: prefix, repeat: 2}
output: y
blocks:
  outer:
    input: {x: [B, T, 4], prefix: [3, 4]}
    nodes:
      y: {use: inner, x: x, prefix: prefix}
    output: y
  inner:
    input: {x: [B, T, 4], prefix: [3, 4]}
    nodes:
      both: {use: sequence.concat, in: [prefix, x]}
      y: {use: attention.window, in: both, heads: 2, window: 3}
    output: y
"""


def test_a_block_takes_elements_that_belong_to_no_token(tmp_path: Path) -> None:
    assert check(tmp_path, BORDER % 4) == []


def test_a_mismatch_at_a_border_is_not_reported_again_inside_the_block(tmp_path: Path) -> None:
    (found,) = check(tmp_path, BORDER % 5)
    assert isinstance(found, errors.ShapeMismatch)
    assert found.span is not None
    assert found.span.line == 6
    assert "declared [B, T, 4], got [B, T, 5] from 'wide'" in found.message


def test_another_number_of_fixed_elements_is_a_mismatch_at_the_border(tmp_path: Path) -> None:
    (found,) = check(tmp_path, BORDER.replace("count: 3", "count: 2") % 4)
    assert "declared [3, 4], got [2, 4] from 'prefix'" in found.message


def test_a_leak_is_refused_with_its_path(tmp_path: Path) -> None:
    text = """input: {x: [B, T, 8]}
segment: 8
nodes:
  n: {use: norm.rms, in: x}
  y: {use: attention.segment, in: n, heads: 2, causal: false}
output: y
"""
    assert rendered(tmp_path, text) == (
        "spec.yaml:6:3: error: an output depends on later tokens through 'y': "
        "every token of a segment reads all of it, later tokens too\n"
        "    6 |   y: {use: attention.segment, in: n, heads: 2, causal: false}\n"
        "      |   ^\n"
        "  help: path: x -> n.out -> y.x -> y.out"
    )


def test_a_segment_must_be_a_multiple_of_the_chunk(tmp_path: Path) -> None:
    text = """input: {x: [B, T, 8]}
segment: 10
nodes:
  y: {use: memory.neural, in: x, heads: 2, chunk: 4}
output: y
"""
    (found,) = check(tmp_path, text)
    assert isinstance(found, errors.SegmentProblem)
    assert found.message == "segment 10 is not a multiple of chunk 4"


def test_opening_needs_a_segment_and_recalled_needs_opening(tmp_path: Path) -> None:
    text = """input: {x: [B, T, 8]}
nodes:
  m: {use: memory.neural, opening: x, write: x, heads: 2, chunk: 4}
  k: {use: memory.neural, write: x, heads: 2, chunk: 4}
  y: {use: add, in: [m.recalled, k.recalled]}
output: y
"""
    found = check(tmp_path, text)
    assert [type(d) for d in found] == [errors.SegmentProblem, errors.MissingInput]
    assert [d.span.line for d in found if d.span] == [4, 5]


def test_mistakes_of_language_and_of_shapes_are_reported_together_in_order(tmp_path: Path) -> None:
    text = """input: {x: [B, T, 8]}
nodes:
  wide: {use: linear, in: x, dim: 12}
  z: {use: add, in: [x, wide]}
  w: {use: norm.rmz, in: z}
  y: {use: norm.rms, in: w, epss: 1e-3}
output: y
"""
    found = check(tmp_path, text)
    assert [type(d) for d in found] == [errors.ShapeMismatch, errors.UnknownComponent, errors.UnknownParameter]
    assert "did you mean 'norm.rms'?" in found[1].help


def test_a_mistake_in_a_block_is_said_once_however_many_copies_there_are(tmp_path: Path) -> None:
    text = """input: {x: [B, T, 8]}
nodes:
  y: {use: layer, in: x, repeat: 5}
output: y
blocks:
  layer:
    input: {x: [B, T, 8]}
    nodes:
      y: {use: attention.full, in: x, heads: 3}
    output: y
"""
    (found,) = check(tmp_path, text)
    assert found.span is not None
    assert found.span.line == 10


def test_a_block_input_is_checked_against_its_declaration(tmp_path: Path) -> None:
    text = """input: {x: [B, T, 8]}
nodes:
  y: {use: layer, in: x}
output: y
blocks:
  layer:
    input: {x: [B, T, 16]}
    nodes:
      y: {use: norm.rms, in: x}
    output: y
"""
    (found,) = check(tmp_path, text)
    assert isinstance(found, errors.ShapeMismatch)
    assert "declared [B, T, 16], got [B, T, 8]" in found.message


def test_the_builder_names_the_node() -> None:
    b = tg.Builder("model")
    x = b.input("x", ["B", "T", 8])
    wide = b.add("linear", x, name="wide", dim=12)
    b.output(b.add("add", [x, wide], name="total"))
    with pytest.raises(tg.SpecError) as raised:
        b.build()
    (found,) = raised.value.diagnostics
    assert isinstance(found, errors.ShapeMismatch)
    assert "node 'total'" in str(raised.value)


def test_a_node_that_reads_a_misspelt_one_does_not_crash_the_check(tmp_path: Path) -> None:
    text = """input: {tokens: [B, T]}
nodes:
  embedded: {use: embeding, in: tokens, vocab: 4, dim: 8}
  y: {use: norm.rms, in: embedded}
output: y
"""
    (found,) = check(tmp_path, text)
    assert isinstance(found, errors.UnknownComponent)


def test_a_model_has_one_input_and_streams_as_outputs(tmp_path: Path) -> None:
    text = """input: {x: [B, T, 8], z: [B, T, 8]}
nodes:
  p: {use: tokens.persistent, count: 2}
  y: {use: sequence.concat, in: [p, x, z]}
output: y
"""
    found = check(tmp_path, text)
    assert [type(d) for d in found] == [errors.ShapeMismatch] * 2
    assert "a model has one input" in found[0].message
    assert "output 'y' must be one stream" in found[1].message


def test_feedback_between_typed_nodes_is_shown_whole(tmp_path: Path) -> None:
    text = """input: {x: [B, T, 8]}
segment: 8
nodes:
  m: {use: memory.neural, write: x, ask: y, heads: 2, chunk: 4}
  y: {use: linear, in: m}
output: y
"""
    assert rendered(tmp_path, text) == (
        "spec.yaml:5:3: error: feedback without delay through 'm'\n"
        "    5 |   m: {use: memory.neural, write: x, ask: y, heads: 2, chunk: 4}\n"
        "      |   ^\n"
        "  help: loop: m.recall -> y.x -> y.out -> m.ask -> m.recall; "
        "let it pass through state (memory.neural: opening -> recalled)"
    )


def test_a_shape_mismatch_marks_the_connection(tmp_path: Path) -> None:
    text = """input: {x: [B, T, 8]}
nodes:
  wide: {use: linear, in: x, dim: 12}
  y: {use: add, in: [x, wide]}
output: y
"""
    assert rendered(tmp_path, text) == (
        "spec.yaml:5:21: error: cannot add [B, T, 8] and [B, T, 12]: their last sizes differ "
        "(x [B, T, 8] from graph input 'x'; x [B, T, 12] from 'wide' (spec.yaml:4))\n"
        "    5 |   y: {use: add, in: [x, wide]}\n"
        "      |                     ^^^^^^^^^"
    )


def test_segments_that_conflict_in_one_loop_are_both_named(tmp_path: Path) -> None:
    block = """  %s:
    input: {x: [B, T, 8], back: [B, T, 8]}
    segment: %d
    nodes:
      m: {use: memory.neural, opening: x, write: back, ask: x, heads: 2, chunk: 4}
      y: {use: add, in: [x, m.recalled]}
    output: y
"""
    text = """input: {x: [B, T, 8]}
nodes:
  p: {use: one, in: x, back: q}
  q: {use: two, in: p, back: q}
output: q
blocks:
"""
    assert rendered(tmp_path, text + block % ("one", 8) + block % ("two", 16)) == (
        "spec.yaml:12:7: error: one feedback loop holds conflicting segments 8, 16\n"
        "    12 |       m: {use: memory.neural, opening: x, write: back, ask: x, heads: 2, chunk: 4}\n"
        "       |       ^\n"
        "  help: give all blocks of the loop one segment"
    )


def test_pieces_that_do_not_fit_the_loop_are_refused(tmp_path: Path) -> None:
    text = """input: {x: [B, T, 8]}
segment: 8
nodes:
  m: {use: memory.neural, opening: x, write: y, heads: 2, chunk: 4}
  a: {use: attention.segment, in: m.recalled, heads: 2, segment: 6}
  y: {use: add, in: [x, a]}
output: y
"""
    (found,) = check(tmp_path, text)
    assert isinstance(found, errors.SegmentProblem)
    assert found.message == "'a' works in pieces of 6 tokens inside a loop of 8"
    assert found.help == "the loop's segment 8 must be a multiple of 6"


def test_a_loop_of_single_tokens_is_a_warning_and_builds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = """input: {x: [B, T, 8]}
segment: 1
nodes:
  m: {use: memory.neural, opening: x, write: y, heads: 2, chunk: 1}
  y: {use: add, in: [x, m.recalled]}
output: y
"""
    (found,) = check(tmp_path, text)
    assert isinstance(found, errors.SlowLoop)
    assert found.render().splitlines()[0].endswith("warning: this loop runs token by token")
    assert tg.load(tmp_path / "spec.yaml").compilation.loops[0].period == 1
    assert caplog.messages == [found.render()]


def test_a_broken_reference_is_one_mistake(tmp_path: Path) -> None:
    text = """input: {x: [B, T, 8]}
nodes:
  y: {use: add, in: [x, memm]}
output: y
"""
    (found,) = check(tmp_path, text)
    assert isinstance(found, errors.UnknownName)
