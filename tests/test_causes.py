"""A mistake is named by its cause: nothing that merely follows from it is reported beside it, or in its place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import titans_graph as tg
from titans_graph import errors
from titans_graph.cli import main

HEAD = "titans_graph: 1\n"


def check(tmp_path: Path, text: str) -> list[errors.Diagnostic]:
    path = tmp_path / "spec.yaml"
    path.write_text(HEAD + text)
    return tg.check(path)


@pytest.mark.parametrize(
    ("spec", "parameters", "heads", "dim"),
    [
        ("mac", {"heads": 3}, 3, 128),
        ("blocks/mac", {"heads": 3}, 3, 128),
        ("blocks/mac", {"dim": 15, "heads": 2}, 2, 15),
        ("blocks/lmm", {"heads": 3}, 3, 128),
    ],
)
def test_heads_that_do_not_divide_are_the_cause_in_a_loop_too(
    spec: str, parameters: dict[str, Any], heads: int, dim: int
) -> None:
    """What waits for the refused node is no feedback without delay."""
    (found,) = tg.check(spec, **parameters)
    assert isinstance(found, errors.WrongType)
    assert found.message == f"heads {heads} do not divide the feature size {dim}"
    assert found.span is not None
    assert "heads: $heads" in found.span.text
    with pytest.raises(tg.SpecError, match="do not divide"):
        tg.load(spec, **parameters)


LOOP = """input: {x: [B, T, 8]}
segment: 8
nodes:
  m: {use: memory.neural, opening: x, write: y, heads: 2, chunk: %s}
  y: {use: add, in: [x, %s]}
output: y
"""


def test_another_refusal_on_a_loop_is_named(tmp_path: Path) -> None:
    (found,) = check(tmp_path, LOOP % (5, "m.recalled"))
    assert isinstance(found, errors.SegmentProblem)
    assert "segment 8 is not a multiple of chunk 5" in found.message


def test_an_input_that_waits_for_its_type_is_not_called_missing(tmp_path: Path) -> None:
    """``opening`` is connected, and its type unknown only because the node before it was refused."""
    text = """input: {x: [B, T, 8]}
segment: 8
nodes:
  a: {use: attention.window, in: x, heads: 3, window: 2}
  m: {use: memory.neural, opening: a, write: x, heads: 2, chunk: 4}
  y: {use: add, in: [x, m.recalled]}
output: y
"""
    (found,) = check(tmp_path, text)
    assert found.node == "a"


def test_a_loop_that_is_sound_but_for_its_delay_is_still_refused(tmp_path: Path) -> None:
    text = LOOP.replace("write: y", "write: x, ask: y") % (4, "m.recall")
    (found,) = check(tmp_path, text)
    assert isinstance(found, errors.AlgebraicLoop)


@pytest.mark.parametrize("spec", ["mac", "blocks/mac", "blocks/mal"])
def test_an_override_of_the_wrong_kind_is_one_mistake(spec: str) -> None:
    (found,) = tg.check(spec, dim="abc")
    assert found.message == "override of parameter 'dim': must be a number like its default 128, got 'abc'"


def test_nothing_is_said_of_an_input_whose_declaration_has_a_mistake(tmp_path: Path) -> None:
    text = """input: {x: [B, T, 8]}
nodes:
  y: {use: inner, x: x}
output: y
blocks:
  inner:
    input: {x: [B, T, $dimm]}
    nodes:
      p: {use: tokens.persistent, count: 4}
      n: {use: norm.rms, in: x}
      c: {use: sequence.concat, in: [p, n]}
      y: {use: attention.full, in: c, heads: 2, keep: n}
    output: y
"""
    (found,) = check(tmp_path, text)
    assert found.message == "unknown parameter '$dimm'"


@pytest.mark.parametrize("dim", [0, -3, 99999999999])
def test_a_size_out_of_range_says_the_range(dim: int) -> None:
    messages = {d.message: d.help for d in tg.check("blocks/lmm", dim=dim)}
    assert messages[f"input 'x' cannot have the size {dim}"] == "a size is a whole number from 1 to 2147483648"


def test_a_model_larger_than_the_machine_is_a_mistake_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    help = "  help: smaller sizes (dim, hidden, heads, layers, vocab), or a machine with more memory"
    assert main(["check", "mac", "--set", "dim=2000000"]) == 1
    printed = capsys.readouterr().err
    assert re.search(r"mac\.yaml:\d+:\d+$", printed, re.MULTILINE)
    assert printed.splitlines()[-1] == help
    with pytest.raises(tg.SpecError) as caught:
        tg.load("mac", dim=2000000)
    first, line, caret, last = str(caught.value).splitlines()
    assert re.search(r"mac\.yaml:\d+:\d+: error: the model 'mac' up to node '.*': [\d,.]+ GB are more than the", first)
    assert line.split("|")[1].strip()
    assert caret.endswith("^")
    assert last == help
    assert [type(d) for d in caught.value.diagnostics] == [errors.LimitExceeded]


@pytest.mark.parametrize(
    ("value", "help"),
    [
        ("slow", "write eps: a number (by default 1e-06); it is added to the mean square"),
        ("-1", "write eps: at least 0.0 (by default 1e-06); it is added to the mean square"),
    ],
)
def test_the_help_of_a_wrong_value_says_what_to_write(tmp_path: Path, value: str, help: str) -> None:
    text = f"input: {{x: [B, T, 8]}}\nnodes:\n  y: {{use: norm.rms, in: x, eps: {value}}}\noutput: y\n"
    (found,) = check(tmp_path, text)
    assert found.help == help


def test_a_tab_is_answered_with_spaces(tmp_path: Path) -> None:
    (found,) = check(tmp_path, "input: {x: [B, T, 8]}\nnodes:\n\ty: {use: norm.rms, in: x}\noutput: y\n")
    assert isinstance(found, errors.SyntaxProblem)
    assert found.help == "indent with spaces: YAML takes no tabs there"


MEMORY = """input: {x: [B, T, 8]}
segment: %s
nodes:
  m: {use: memory.neural, in: x, %s}
  y: {use: add, in: [x, m]}
output: y
"""


def test_all_mistakes_of_parameters_are_reported_at_once(tmp_path: Path) -> None:
    found = check(tmp_path, MEMORY % (8, "heads: 3, chunk: -4, network: {mpl: {depth: 2}}"))
    messages = sorted(d.message.split(",")[0] for d in found)
    assert messages[0] == "heads 3 do not divide the feature size 8"
    assert messages[1] == "parameter 'chunk' must be between 1 and 4096"
    assert "mpl" in messages[2]
    assert len(found) == 3
    assert all(d.span and d.span.line == 5 for d in found)


@pytest.mark.parametrize(
    "parameters",
    [
        "heads: 2, chunk: -4",  # the default, 64, is no divisor of the segment, and nobody asked for it
        "heads: 3, head_dim: -1",  # with a size of their own, heads need not divide
        "heads: 2, chunk: 4, momentum: 3, max_momentum: 0.5",  # without momentum it would have no effect
        "heads: two, chunk: 4",
    ],
)
def test_what_hangs_on_a_wrong_parameter_is_not_reported(tmp_path: Path, parameters: str) -> None:
    assert len(check(tmp_path, MEMORY % (8, parameters))) == 1
