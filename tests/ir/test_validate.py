from __future__ import annotations

from typing import Any

import pytest

from titans_graph.errors import (
    Diagnostic,
    DuplicateKey,
    LimitExceeded,
    MissingInput,
    UnknownComponent,
    UnknownName,
    UnknownParameter,
    UnknownPort,
    UnusedNode,
    WrongType,
)
from titans_graph.ir import Block, Graph, Node, Ref, parse, prune, validate
from titans_graph.ir.validate import inspect
from titans_graph.shapes import Piece, Value, fixed, stream

FRAME = "graph g\n{blocks}main(x: [B, T, 8])\n{nodes}\n  -> y={out}\n"


def check(nodes: str, out: str = "y", blocks: str = "") -> list[Diagnostic]:
    return validate(parse(FRAME.format(nodes=nodes, out=out, blocks=blocks)))


def only(problems: list[Diagnostic]) -> Diagnostic:
    assert len(problems) == 1, [p.message for p in problems]
    return problems[0]


def test_a_sound_graph_has_no_problems() -> None:
    assert check("  y = norm.fake(x=x) eps=1e-05") == []


@pytest.mark.parametrize(
    ("nodes", "kind", "message", "help"),
    [
        ("  y = norm.fke(x=x)", UnknownComponent, "unknown component 'norm.fke'", "did you mean 'norm.fake'?"),
        ("  y = norm.fake(x=x) esp=1", UnknownParameter, "norm.fake has no parameter 'esp'", "did you mean 'eps'?"),
        ("  y = norm.fake(x=x) q=1", UnknownParameter, "norm.fake has no parameter 'q'", "it has: eps"),
        ("  y = add.fake(x=x) q=1", UnknownParameter, "add.fake has no parameter 'q'", "it takes no parameters"),
        ("  y = norm.fake(z=x)", UnknownPort, "norm.fake has no input 'z'", "it has: x"),
        ("  y = memory.fake(wirte=x)", UnknownPort, "memory.fake has no input 'wirte'", "did you mean 'write'?"),
        ("  y = norm.fake()", MissingInput, "input 'x' of norm.fake is not connected (features)", "write in: ..."),
        ("  y = norm.fake(x=x) eps=-1", WrongType, "parameter 'eps' must be at least 0.0, got -1", None),
        ('  y = memory.fake(write=x) objective="l22"', WrongType, None, "did you mean 'l2'?"),
        ("  y = memory.fake(write=x) heads=5", None, "chunk is no multiple of heads", ""),
        ("  y = norm.fake(x=qq)", UnknownName, "unknown name 'qq'", "known here: x, y"),
        ("  y = norm.fake(x=[x, x])", WrongType, "input 'x' of norm.fake takes one value, got 2", None),
        ("  y = norm.fake(x=x.out)", UnknownPort, "'x' is an input and has no ports", "write x"),
        ("  y = add.fake(x=x) repeat 2", WrongType, None, ""),
        ("  y = norm.fake(x=x) repeat 0", WrongType, "repeat must be a whole number, at least 1, got 0", ""),
        ("  y = norm.fake(x=x) repeat 10001", LimitExceeded, "repeat is at most 10000, got 10001", ""),
        ("  x = norm.fake(x=x)\n  y = norm.fake(x=x)", DuplicateKey, "'x' is already the name of an input", None),
        ("  y = norm.fake(x=x)\n  y = norm.fake(x=x)", DuplicateKey, "'y' is already the name of another node", None),
        ('  "1 2" = norm.fake(x=x)\n  y = norm.fake(x="1 2")', WrongType, "'1 2' is no name for a node", None),
    ],
)
def test_one_mistake_gives_one_diagnostic(
    nodes: str, kind: type[Diagnostic] | None, message: str | None, help: str | None
) -> None:
    problem = only(check(nodes))
    assert kind is None or type(problem) is kind
    assert message is None or problem.message == message
    assert help is None or problem.help == help
    assert problem.span is not None


def test_a_diagnostic_points_at_the_value_or_the_key() -> None:
    assert only(check("  y = norm.fake(x=x) esp=1")).render() == (
        "<text>:3:22: error: norm.fake has no parameter 'esp'\n"
        "    3 |   y = norm.fake(x=x) esp=1\n"
        "      |                      ^^^\n"
        "  help: did you mean 'eps'?"
    )
    assert only(check("  y = norm.fake(x=x) eps=true")).render().splitlines()[2] == "      |                          ^^^^"


def test_without_places_the_node_is_named() -> None:
    y = Node("y", "norm.fake", {"esp": 1}, {"x": (Ref("x"),)})
    block = Block("b", {"x": stream(8)}, (y,), {"y": Ref("y")})
    use = Node("u", "b", {}, {"x": (Ref("x"),)})
    graph = Graph("g", Block("main", {"x": stream(8)}, (use,), {"u": Ref("u")}), {"b": block})
    assert only(validate(graph)).render().startswith("node 'b/y': error: norm.fake has no parameter 'esp'")


def test_unused_things_are_reported_once_a_chain() -> None:
    chain = "  y = norm.fake(x=x)\n  a = norm.fake(x=x)\n  b = norm.fake(x=a)\n"
    assert [p.message for p in check(chain)] == ["node 'b' is never used: nothing that reaches an output reads it"]
    circle = "  y = norm.fake(x=x)\n  a = add.fake(x=[x, b])\n  b = norm.fake(x=a)\n"
    problem = only(check(circle))
    assert isinstance(problem, UnusedNode)
    assert "'a'" in problem.message


def test_an_unused_input_is_reported() -> None:
    problem = only(check("  y = tokens.fake()"))
    assert type(problem) is UnusedNode
    assert problem.message.startswith("input 'x' is never used")


def test_what_a_misspelt_reference_means_counts_as_used() -> None:
    assert type(only(check("  embedded = norm.fake(x=x)\n  y = norm.fake(x=embeded)"))) is UnknownName
    assert type(only(check("  embedded = norm.fake(x=x)\n  y = norm.fake(x=zzz)"))) is UnknownName
    assert type(only(check("  embedded = norm.fake(x=x)\n  y = norm.fake()"))) is MissingInput
    assert type(only(check("  y = norm.fake(x=x)", out="qqq"))) is UnknownName


BLOCK = "block b(x: [B, T, 8])\n  y = norm.fake(x=x)\n  -> y=y\n"


def test_blocks_have_ports_but_no_parameters() -> None:
    assert check("  y = b(x=x) repeat 3", blocks=BLOCK) == []
    assert only(check("  y = b(x=x) n=3", blocks=BLOCK)).message == "block 'b' has no parameter 'n'"
    assert only(check("  y = b(x=x)", "y.z", BLOCK)).message == "block 'b' has no output 'z'"
    assert type(only(check("  y = b()", blocks=BLOCK))) is MissingInput


def test_an_unused_block_is_reported_and_what_it_uses_is_not() -> None:
    outer = BLOCK + "block c(x: [B, T, 8])\n  y = b(x=x)\n  -> y=y\n"
    assert only(check("  y = norm.fake(x=x)", blocks=outer)).message == "block 'c' is never used"
    assert type(only(check("  y = bb(x=x)", blocks="block bbb" + BLOCK[7:]))) is UnknownComponent


def test_a_block_inside_itself_is_an_error() -> None:
    blocks = "block a(x: [B, T, 8])\n  y = b(x=x)\n  -> y=y\nblock b(x: [B, T, 8])\n  y = a(x=x)\n  -> y=y\n"
    problem = only(check("  y = a(x=x)", blocks=blocks))
    assert type(problem) is LimitExceeded
    assert problem.message == "block 'a' contains itself: a -> b -> a"


def test_long_chains_of_blocks_and_many_copies_are_bounded() -> None:
    head = "block b{}(x: [B, T, 8])\n  y = {}(x=x) {}\n  -> y=y\n"
    deep = "".join(head.format(i, f"b{i + 1}", "") for i in range(2000)) + head.format(2000, "norm.fake", "")
    assert only(check("  y = b0(x=x)", blocks=deep)).message == "blocks are nested deeper than 64"
    wide = "".join(head.format(i, f"b{i + 1}", "repeat 10000") for i in range(30)) + head.format(30, "norm.fake", "")
    assert only(check("  y = b0(x=x)", blocks=wide)).message == "blocks and repeats make more than 20000 nodes"
    circle = "".join(head.format(i, f"b{(i + 1) % 2000}", "") for i in range(2000))
    assert only(check("  y = b0(x=x)", blocks=circle)).message.endswith("b4 -> b5 -> ... -> b0")


@pytest.mark.parametrize("value", [object(), {1: 2}, float("nan"), float("inf"), 2**64, (1, 2), {"a": [b"x"]}])
def test_values_that_no_spec_can_hold_are_refused(value: Any) -> None:
    node = Node("y", "any.fake", {"value": value}, {"x": (Ref("x"),)})
    graph = Graph("g", Block("main", {"x": stream(8)}, (node,), {"y": Ref("y")}))
    assert type(only(validate(graph))) is WrongType


def test_endless_values_are_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    wide: list[Any] = [0]
    for _ in range(40):
        wide = [wide, wide]
    for value in (loop, wide):
        node = Node("y", "any.fake", {"value": value}, {"x": (Ref("x"),)})
        graph = Graph("g", Block("main", {"x": stream(8)}, (node,), {"y": Ref("y")}))
        assert type(only(validate(graph))) is WrongType
        pruned = prune(graph, frozenset({("main", "y")}))
        assert pruned is not None
        assert pruned.main.nodes[0].parameters == {}


@pytest.mark.parametrize(
    "value", [stream(0), fixed(0, 8), fixed(8, -1), Value((Piece("x"), Piece("y")), 8), stream(2**40), stream(True)]
)
def test_inputs_are_one_piece_of_positive_size(value: Value) -> None:
    node = Node("y", "norm.fake", {}, {"x": (Ref("x"),)})
    assert type(only(validate(Graph("g", Block("main", {"x": value}, (node,), {"y": Ref("y")}))))) is WrongType


def test_frames_are_checked() -> None:
    node = Node("y", "norm.fake", {}, {"x": (Ref("x"),)})
    main = Block("main", {"x": stream(8)}, (node,), {"y": Ref("y")}, segment=0)
    assert only(validate(Graph("g", main))).message == "segment must be a number of tokens, at least 1, got 0"
    assert only(validate(Graph("g", Block("main", {"x": stream(8)}, (node,), {})))).message == "the block has no output"
    lone = Block("main", {}, (Node("y", "tokens.fake"),), {"y": Ref("y")})
    assert only(validate(Graph("g", lone))).message == "the block has no input"
    odd = Block("main", {"use": stream(8)}, (Node("y", "norm.fake", {}, {"x": (Ref("use"),)}),), {"y": Ref("y")})
    assert only(validate(Graph("g", odd))).message == "an input cannot be called 'use'"


def test_a_block_cannot_be_called_main() -> None:
    blocks = BLOCK.replace("block b", "block main")
    assert DuplicateKey in {type(p) for p in check("  y = main(x=x)", blocks=blocks)}


def test_thousands_of_mistakes_are_cut_off() -> None:
    problems = check("\n".join(f"  n{i} = norm.fake(x=nothing{i})" for i in range(5000)))
    assert len(problems) == 101
    assert problems[-1].message.endswith("more mistakes are not shown")


def test_prune_leaves_out_what_cannot_be_followed() -> None:
    graph = parse(FRAME.format(nodes="  y = add.fake(x=[x, lost])\n  z = norm.fake(x=lost)", out="y", blocks=""))
    findings = inspect(graph)
    pruned = prune(graph, frozenset(findings.broken))
    assert pruned is not None
    y, z = pruned.main.nodes
    assert y.inputs == {"x": (Ref("x"),)}
    assert z.inputs == {}
    assert ("main", "z") in findings.broken
