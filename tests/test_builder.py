from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from tests.ir import fakes
from titans_graph.builder import Builder
from titans_graph.errors import (
    Diagnostic,
    DuplicateKey,
    MissingInput,
    SpecError,
    SyntaxProblem,
    UnknownComponent,
    UnknownName,
    UnknownParameter,
    UnknownPort,
    UnusedNode,
    UnusedParameter,
    UsageError,
    WrongType,
)
from titans_graph.ir import parse
from titans_graph.spec import read_text


@pytest.fixture(autouse=True)
def _fake_components() -> Iterator[None]:
    with fakes.installed():
        yield


def mac() -> Builder:
    b = Builder("mac", segment=64, dim=8)
    block = b.block("mac", segment=32)
    x = block.input("x", ["B", "T", "dim"])
    normed = block.add("norm.fake", x, name="normed", eps=1e-3)
    memory = block.add("memory.fake", opening=normed, name="memory", network={"mlp": ["$dim * 4"]})
    context = block.add("add.fake", [memory.recalled, normed])
    attended = block.add("attention.fake", context, keep="normed")
    block.connect(memory, write=attended, ask="attention_fake")
    block.output(block.add("add.fake", x, attended, memory.recall, name="y"))
    tokens = b.input("tokens", ["B", "T"])
    embedded = b.add("embedding.fake", tokens, vocab=256, dim="$dim", name="embedded")
    layers = b.add(block, embedded, repeat=2, name="layers")
    b.output(logits=b.add("head.fake", layers, table=embedded.table))
    return b


TEXT = """\
graph mac
block mac(x: [B, T, 8]) segment 32
  normed = norm.fake(x=x) eps=0.001
  memory = memory.fake(opening=normed, write=attention_fake, ask=attention_fake) network={"mlp": [32]}
  add_fake = add.fake(x=[memory.recalled, normed])
  attention_fake = attention.fake(x=add_fake) keep="normed"
  y = add.fake(x=[x, attention_fake, memory.recall])
  -> y=y
main(tokens: [B, T]) segment 64
  embedded = embedding.fake(x=tokens) vocab=256 dim=8
  layers = mac(x=embedded) repeat 2
  head_fake = head.fake(x=layers, table=embedded.table)
  -> logits=head_fake
"""


def test_calls_become_the_graph_that_a_text_declares() -> None:
    assert mac().check() == []
    assert mac().graph() == parse(TEXT)
    assert mac().graph().text() == TEXT


def test_automatic_names_are_unique() -> None:
    b = Builder()
    x = b.input("x", ["B", "T", 8])
    y = b.add("norm.fake", x)
    z = b.add("norm.fake", y)
    b.output(b.add("norm.fake", z), first=y)
    graph = b.graph()
    assert [n.name for n in graph.main.nodes] == ["norm_fake", "norm_fake_2", "norm_fake_3"]
    assert list(graph.main.outputs) == ["norm_fake_3", "first"]
    assert b.check() == []


def test_a_text_names_a_node_that_comes_later() -> None:
    b = Builder()
    b.input("x", ["B", "T", 8])
    b.add("norm.fake", "second.out", name="first")
    b.add("norm.fake", "x", name="second")
    b.output("first")
    assert b.check() == []


def test_repeat_may_be_a_formula_and_dollar_signs_are_doubled() -> None:
    b = Builder(layers=3)
    x = b.input("x", ["B", "T", 8])
    b.output(b.add("norm.fake", b.add("any.fake", x, value="$$x"), repeat="$layers * 2"))
    first, second = b.graph().main.nodes
    assert (first.parameters, second.repeat) == ({"value": "$x"}, 6)


Mistake = Callable[[Builder, Any], Any]
MISTAKES: list[tuple[Mistake, type[Diagnostic], str, str]] = [
    (lambda b, x: b.add("norm.fke", x), UnknownComponent, "unknown component 'norm.fke'", "bad"),
    (lambda b, x: b.add("norm.fake", x, esp=1), UnknownParameter, "norm.fake has no parameter 'esp'", "bad"),
    (lambda b, x: b.add("norm.fake", x, eps=-1), WrongType, "parameter 'eps' must be at least 0.0, got -1", "bad"),
    (lambda b, x: b.add("norm.fake", x, eps=object()), WrongType, "parameter 'eps': a value must be", "bad"),
    (lambda b, x: b.add("norm.fake", x, eps="$nope"), UnknownName, "unknown parameter '$nope'", "bad"),
    (lambda b, x: b.add("norm.fake", x, eps="$dim +"), SyntaxProblem, "a number or $name is missing", "bad"),
    (lambda b, x: b.add("norm.fake"), MissingInput, "input 'x' of norm.fake is not connected", "bad"),
    (lambda b, x: b.add("norm.fake", x, repeat=0), WrongType, "repeat must be a whole number", "bad"),
    (lambda b, x: b.add("norm.fake", x, x), WrongType, "input 'x' of norm.fake takes one value", "bad"),
    (lambda b, x: b.add("norm.fake", x, x=x), DuplicateKey, "input 'x' is connected twice", "bad"),
    (lambda b, x: b.add("norm.fake", cast(Any, 3)), WrongType, "expected a reference, got 3", "bad"),
    (lambda b, x: b.add("norm.fake", "a b"), WrongType, "expected a reference, got 'a b'", "bad"),
    (lambda b, x: b.add("norm.fake", "lost"), UnknownName, "unknown name 'lost'", "bad"),
    (lambda b, x: b.add("norm.fake", x.out), UnknownPort, "'x' is an input and has no ports", "bad"),
    (lambda b, x: b.add("memory.fake", x, wirte=x), UnknownPort, "memory.fake has no input 'wirte'", "bad"),
    (lambda b, x: b.add("norm.fake", Builder("z").input("x", ["B", "T"])), UnknownName, "'x' belongs to 'z'", "bad"),
]


@pytest.mark.parametrize(("call", "kind", "message", "node"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_mistakes_name_the_node(call: Mistake, kind: type[Diagnostic], message: str, node: str) -> None:
    b = Builder(dim=8)
    x = b.input("x", ["B", "T", "dim"])
    original = b.add

    def named(*args: Any, **keys: Any) -> Any:
        return original(*args, name="bad", **keys)

    b.add = named  # type: ignore[method-assign]
    b.output(call(b, x))
    problems = b.check()
    assert [(type(p), p.message[: len(message)], p.node, p.span) for p in problems] == [(kind, message, node, None)]
    with pytest.raises(SpecError):
        b.build()


def sound() -> tuple[Builder, Any]:
    b = Builder()
    x = b.input("x", ["B", "T", 8])
    b.output(b.add("norm.fake", x, name="y"))
    return b, x


def test_mistakes_of_the_frame() -> None:
    def check(call: Callable[[Builder, Any], Any]) -> tuple[type[Diagnostic], str]:
        b, x = sound()
        call(b, x)
        problems = b.check()
        assert len(problems) == 1, [p.render() for p in problems]
        return type(problems[0]), problems[0].message

    assert check(lambda b, x: b.input("x", ["B", "T", 8])) == (DuplicateKey, "'x' is already the name of an input")
    assert check(lambda b, x: b.output(y=x)) == (DuplicateKey, "output 'y' is declared twice")
    assert check(lambda b, x: b.output(z=[x, x])) == (WrongType, "an output is one value")
    assert check(lambda b, x: b.connect("lost", x=x)) == (UnknownName, "unknown name 'lost'")
    assert check(lambda b, x: b.connect("y", eps=x))[0] is UnknownPort
    assert check(lambda b, x: b.add("norm.fake", x, name="spare"))[0] is UnusedNode
    assert check(lambda b, x: b.add("norm.fake", x, name="x"))[0] is DuplicateKey
    assert check(lambda b, x: b.input("p", ["B", "dim"]))[1] == "input 'p' needs a list of axes"
    assert check(lambda b, x: b.input("p", ["B", "T", "dim"]))[1] == "unknown parameter 'dim'"
    assert check(lambda b, x: b.input("p", "BT"))[1] == "input 'p' needs a list of axes"


def test_blocks_that_nobody_uses_or_that_exist_twice() -> None:
    b, _ = sound()
    block = b.block("spare")
    block.output(block.add("norm.fake", block.input("x", ["B", "T", 8]), name="n"))
    assert [p.message for p in b.check()] == ["block 'spare' is never used"]
    b.block("spare")
    assert DuplicateKey in {type(p) for p in b.check()}
    with pytest.raises(UsageError, match="ask the builder"):
        block.graph()


def test_a_mistake_in_a_block_names_block_and_node() -> None:
    b, x = sound()
    block = b.block("inner")
    block.output(block.add("norm.fake", block.input("x", ["B", "T", 8]), name="n", eps="no"))
    b.output(z=b.add("inner", x))
    assert [p.render().splitlines()[0] for p in b.check()] == [
        "node 'inner/n': error: parameter 'eps' must be a number, got 'no'"
    ]


def test_unused_parameters_are_mistakes() -> None:
    b = Builder(dim=8, segmnt=64)
    b.output(b.add("norm.fake", b.input("x", ["B", "T", "dim"])))
    assert [(type(p), p.message) for p in b.check()] == [(UnusedParameter, "parameter 'segmnt' is never used")]
    with pytest.raises(SpecError):
        b.graph()


def test_a_spec_and_a_builder_give_the_same_message() -> None:
    b, x = sound()
    b.output(z=b.add("norm.fake", x, esp=1))
    text = "titans_graph: 1\ninput: {x: [B, T, 8]}\nnodes: {z: {use: norm.fake, in: x, esp: 1}}\noutput: z\n"
    built, read = b.check()[0], read_text(text).diagnostics[0]
    assert (type(built), built.message, built.help) == (type(read), read.message, read.help)


def test_foreign_calls_are_refused_at_once() -> None:
    b, x = sound()
    with pytest.raises(UsageError, match="takes the id of a component or a block first"):
        b.add(x)
    with pytest.raises(AttributeError):
        _ = x.out.more
    assert not hasattr(x, "__len__")


def test_build_hands_the_graph_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = types.ModuleType("titans_graph")
    stand_in.build = lambda graph, **options: (graph, options)  # type: ignore[attr-defined]
    b, _ = sound()
    graph = b.graph()
    monkeypatch.setitem(sys.modules, "titans_graph", stand_in)
    assert b.build(device="cpu") == (graph, {"device": "cpu"})
