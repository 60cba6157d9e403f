"""Texts that want to cost time or memory. Nothing is timed: the bounds are counts, and pytest ends what hangs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_graph.errors import LimitExceeded, SyntaxProblem
from titans_graph.ir.limits import MAX_DIAGNOSTICS
from titans_graph.spec import read_text
from titans_graph.spec.formula import FormulaError, evaluate
from titans_graph.spec.tree import compose

HEAD = "titans_graph: 1\ninput: {x: [B, T]}\noutput: y\nnodes: {y: {use: norm.fake, in: x}}\n"

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
PARAMETERS = "parameters:\n  a0: [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"  a{i}: [{', '.join([f'$a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
DEEPER = "parameters:\n  a0: 1\n" + "".join(f"  a{i}: [$a{i - 1}]\n" for i in range(1, 200))
BLOCKS = "blocks:\n" + "".join(
    f"  b{i}: {{parameters: {{p: 0}}, input: {{x: [B, T]}}, output: y, nodes: {{"
    f"a: {{use: b{i + 1}, in: x, p: $p * 2}}, y: {{use: b{i + 1}, in: a, p: $p * 2 + 1}}}}}}\n"
    for i in range(40)
)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[" * 500_000, id="open lists"),
        pytest.param("{" * 500_000, id="open mappings"),
        pytest.param("- " * 300_000, id="lists in a line"),
        pytest.param("".join("  " * i + "a:\n" for i in range(400)), id="deep blocks"),
        pytest.param(HEAD + BOMB, id="alias bomb"),
        pytest.param(HEAD + CHAIN, id="alias chain"),
        pytest.param(HEAD + MERGES, id="merge bomb"),
        pytest.param("x\n" * 600_000, id="too large"),
        pytest.param("- x\n" * 150_000, id="too many"),
        pytest.param(HEAD + PARAMETERS, id="parameter bomb"),
        pytest.param(HEAD + BLOCKS.replace("blocks:\n", "blocks:\n"), id="block bomb"),
        pytest.param("titans_graph: " + "9" * 900_000, id="long number"),
        pytest.param("titans_graph: 0x" + "f" * 900_000, id="long hexadecimal"),
        pytest.param("titans_graph: 1\nname: 1e999999999", id="large exponent"),
    ],
)
def test_too_much_is_an_error(text: str) -> None:
    problems = read_text(text).diagnostics
    assert any(type(p) is LimitExceeded for p in problems), [p.message for p in problems[:5]]
    assert len(problems) <= MAX_DIAGNOSTICS + 1


def test_values_that_grow_deep_through_parameters_are_refused() -> None:
    messages = [p.message for p in read_text(HEAD + DEEPER).diagnostics]
    assert "parameter 'a65': a value is nested deeper than 64" in messages


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "a: &a {<<: *a}",
        "a: *a",
        "%YAML 9.9\n---\na",
        "%YAML " + "9" * 5000 + ".1\n---\na",
        '"\\UFFFFFFFF"',
        '"\\ud800',
        "\t- a",
        "a: b: c",
        "`",
        "@a",
        "a:\n\tb: c",
        "!<",
        "&",
        "*",
        "|3x\n",
        "\x1b[31m",
        "\ud800",
        "'",
        "? ? ?",
    ],
)
def test_malformed_texts_are_diagnostics(text: str) -> None:
    tree, problems = compose(text, "x.yaml")
    assert tree is None or problems
    assert all(type(p) is SyntaxProblem for p in problems)
    assert problems
    assert "\x1b" not in problems[0].render()


def test_thousands_of_mistakes_are_cut_off() -> None:
    nodes = "".join(f"  n{i}: {{use: norm.fake, in: nobody{i}, esp: 1}}\n" for i in range(10_000))
    text = f"titans_graph: 1\ninput: {{x: [B, T]}}\noutput: n0\nnodes:\n{nodes}"
    assert len(read_text(text).diagnostics) == MAX_DIAGNOSTICS + 1
    wrong = "".join(f"  n{i}: {{use: norm.fake, in: x, eps: $n{i}}}\n" for i in range(10_000))
    assert len(read_text(text.replace(nodes, wrong)).diagnostics) == MAX_DIAGNOSTICS + 1


@pytest.mark.parametrize(
    "text",
    [
        "(" * 150 + "$a",
        "-" * 150 + "$a",
        "$a" + "*$a" * 60,
        "$a * 1e308 * 1e308",
        "$a" + " + 1" * 100,
        "$a ** $a",
        "$a $a",
        "$a + $text",
        "$a + $flag",
        "$",
        "$a +",
        "()$a",
        "$a / 0",
        "$a // 0.0",
    ],
)
def test_bad_formulas_are_errors(text: str) -> None:
    with pytest.raises(FormulaError):
        evaluate(text, {"a": 2**40, "text": "x", "flag": True})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$a", 7),
        ("$a * 4", 28),
        ("$a // 2", 3),
        ("$a / 2", 3.5),
        ("2 * ($a + 1) - -3", 19),
        ("$a-1", 6),
        ("1e1*$a", 70.0),
    ],
)
def test_formulas(text: str, value: float) -> None:
    result = evaluate(text, {"a": 7})
    assert (result, type(result)) == (value, type(value))


@given(st.one_of(st.text(), st.text(alphabet="[]{}:,-?&*!|>'\"%@`#$ \n\tabc<01.")))
def test_any_text_is_read_without_an_exception(text: str) -> None:
    declared = read_text(text)
    assert declared.diagnostics
    for problem in declared.diagnostics:
        assert problem.render()


@given(st.data())
def test_any_damage_to_a_spec_is_read_without_an_exception(data: st.DataObject) -> None:
    from tests.spec.test_read import MAC

    start = data.draw(st.integers(0, len(MAC)))
    length = data.draw(st.integers(0, 12))
    new = data.draw(st.text(alphabet="[]{}:,-&*!$ \nab<01.", max_size=8))
    for problem in read_text(MAC[:start] + new + MAC[start + length :]).diagnostics:
        assert problem.render()
