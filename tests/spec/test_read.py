from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from titans_graph import errors
from titans_graph.errors import Diagnostic, IdleOverride, UsageError
from titans_graph.ir import Ref, validate
from titans_graph.shapes import fixed, ids, stream
from titans_graph.spec import Declared, find, read, read_text, shipped, to_yaml

MAC = """\
titans_graph: 1
name: mac
parameters: {vocab: 256, dim: 8, layers: 2, segment: 64}
input: {tokens: [B, T]}
segment: $segment
nodes:
  embedded: {use: embedding.fake, in: tokens, vocab: $vocab, dim: $dim}
  layers: {use: mac, in: embedded, repeat: $layers}
  logits: {use: head.fake, in: layers, table: embedded.table}
output: logits
blocks:
  mac:
    parameters: {expansion: 4}
    input: {x: [B, T, dim]}
    segment: $segment // 2
    nodes:
      normed: {use: norm.fake, in: x, eps: 1e-3}
      memory: {use: memory.fake, write: attended, ask: attended, opening: normed, network: {mlp: $dim * $expansion}}
      context: {use: add.fake, in: [memory.recalled, normed]}
      attended: {use: attention.fake, in: context, keep: normed}
      y: {use: add.fake, in: [x, attended, memory.recall]}
    output: y
"""


def changed(old: str, new: str) -> str:
    assert old in MAC
    return MAC.replace(old, new, 1)


def only(declared: Declared) -> Diagnostic:
    assert len(declared.diagnostics) == 1, [d.render() for d in declared.diagnostics]
    return declared.diagnostics[0]


def test_a_spec_becomes_a_graph() -> None:
    declared = read_text(MAC, dim=16)
    assert declared.diagnostics == []
    assert declared.broken == frozenset()
    assert declared.parameters == {"vocab": 256, "dim": 16, "layers": 2, "segment": 64}
    graph = declared.graph
    assert graph is not None
    assert (graph.name, graph.main.segment, graph.main.inputs) == ("mac", 64, {"tokens": ids()})
    mac = graph.blocks["mac"]
    assert (mac.segment, mac.inputs, mac.outputs) == (32, {"x": stream(16)}, {"y": Ref("y")})
    memory = mac.node("memory")
    assert memory is not None
    assert memory.parameters == {"network": {"mlp": 64}}
    assert memory.inputs == {"write": (Ref("attended"),), "ask": (Ref("attended"),), "opening": (Ref("normed"),)}
    layers = graph.main.node("layers")
    assert layers is not None
    assert (layers.use, layers.repeat, layers.parameters) == ("mac", 2, {})
    assert validate(graph) == []


def test_blocks_used_with_other_parameters_become_other_blocks() -> None:
    use = "  layers: {use: mac, in: embedded, repeat: $layers}\n"
    more = changed(
        use,
        "  a: {use: mac, in: embedded}\n  b: {use: mac, in: a, expansion: 2}\n"
        "  c: {use: mac, in: b, expansion: 4}\n  layers: {use: mac, in: c, expansion: $layers}\n",
    )
    graph = read_text(more).graph
    assert graph is not None
    assert [n.use for n in graph.main.nodes[1:5]] == ["mac", "mac.2", "mac", "mac.2"]
    sizes = [n.parameters for b in graph.blocks.values() for n in b.nodes if n.name == "memory"]
    assert sizes == [{"network": {"mlp": 32}}, {"network": {"mlp": 16}}]


def test_parameters_build_on_each_other_and_are_overridden() -> None:
    text = changed("dim: 8,", "half: 4, dim: $half * 2,").replace("{expansion: 4}", "{expansion: $layers}")
    assert read_text(text).parameters["dim"] == 8
    declared = read_text(text, half=5, layers=3)
    assert declared.parameters["dim"] == 10
    assert declared.graph is not None
    assert declared.graph.blocks["mac"].nodes[1].parameters == {"network": {"mlp": 30}}


def test_anchors_and_merge_keys() -> None:
    text = changed("{use: norm.fake, in: x, eps: 1e-3}", "&n {use: norm.fake, in: x, eps: 1e-3}")
    text = text.replace(
        "y: {use: add.fake, in: [x, attended", "z: {<<: *n, eps: 0.5}\n      y: {use: add.fake, in: [z, attended"
    )
    declared = read_text(text)
    assert declared.diagnostics == []
    assert declared.graph is not None
    node = declared.graph.blocks["mac"].node("z")
    assert node is not None
    assert (node.use, dict(node.parameters)) == ("norm.fake", {"eps": 0.5})


def test_shapes_of_inputs() -> None:
    text = "titans_graph: 1\nparameters: {dim: 8}\ninput: {x: [B, T, $dim], t: [B, T], p: [16, dim * 1]}\n"
    text = text.replace("dim * 1", "$dim * 2") + "nodes: {y: {use: add.fake, in: [x, t, p]}}\noutput: {a: y, b: x}\n"
    graph = read_text(text, "folder/my spec.yaml").graph
    assert graph is not None
    assert graph.name == "my spec"
    assert graph.main.inputs == {"x": stream(8), "t": ids("t"), "p": fixed(16, 16, "p")}
    assert graph.main.outputs == {"a": Ref("y"), "b": Ref("x")}


CASES: list[tuple[str, str, str, str, str]] = [
    ("titans_graph: 1\n", "", "UnsupportedVersion", "the version of the language is missing", "name: mac"),
    ("titans_graph: 1", "titans_graph: 2", "UnsupportedVersion", "this titans_graph reads version 1 of", "2"),
    ("titans_graph: 1", "titans_graph: true", "UnsupportedVersion", "this titans_graph reads version 1 of", "true"),
    ("name: mac", "name: 1", "WrongType", "name is a word", "1"),
    ("segment: $segment\nnodes", "segmnt: $segment\nnodes", "UnknownKey", "unknown key 'segmnt'", "segmnt"),
    ("output: logits", "outptu: logits", "UnknownKey", "unknown key 'outptu'", "outptu"),
    ("output: logits\n", "", "MissingKey", "the spec has no 'output'", "titans_graph"),
    ("    output: y\n", "", "MissingKey", "the block 'mac' has no 'output'", "mac:"),
    ("input: {tokens: [B, T]}", "input: tokens", "WrongType", "input is a mapping", "tokens"),
    ("[B, T]}", "[T, B]}", "WrongType", "input 'tokens' needs a list of axes", "[T, B]"),
    ("[B, T, dim]", "[B, T, dmi]", "UnknownName", "unknown parameter 'dmi'", "dmi"),
    ("[B, T, dim]", "[B, T, 8.5]", "WrongType", "an axis is a whole number, got 8.5", "8.5"),
    ("[B, T, dim]", "[B, T, [8]]", "WrongType", "an axis is a whole number", "[8]"),
    ("dim: $dim}", "dim: $dmi}", "UnknownName", "unknown parameter '$dmi'", "$dmi"),
    ("dim: $dim}", "dim: $dim +}", "SyntaxProblem", "a number or $name is missing at the end", "$dim +"),
    ("dim: $dim}", "dim: $dim % 2}", "SyntaxProblem", "'%' is out of place in a formula", "$dim % 2"),
    ("dim: $dim}", "dim: $dim / 2}", "WrongType", "parameter 'dim' must be a whole number, got 4.0", "$dim / 2"),
    ("dim: $dim}", "dim: $dim // 0}", "WrongType", "a formula divides by zero", "$dim // 0"),
    ("dim: $dim}", "dim: ($dim}", "SyntaxProblem", "a parenthesis is not closed", "($dim"),
    ("dim: $dim}", "dim: on}", "WrongType", "parameter 'dim' must be a whole number, got 'on'", "on}"),
    ("dim: $dim}", "dim: 08}", "WrongType", "parameter 'dim' must be a whole number, got '08'", "08"),
    ("dim: $dim}", "dim: 12:30}", "WrongType", "parameter 'dim' must be a whole number, got '12:30'", "12:30"),
    (", dim: $dim}", "}", "WrongType", "parameter 'dim' is missing (features)", "embedded"),
    ("eps: 1e-3", "eps: yes", "WrongType", "parameter 'eps' must be a number, got 'yes'", "yes"),
    ("eps: 1e-3", "esp: 1e-3", "UnknownParameter", "norm.fake has no parameter 'esp'", "esp"),
    ("eps: 1e-3", "eps: .inf", "LimitExceeded", "a number must be finite", ".inf"),
    ("eps: 1e-3", "eps: 1, eps: 2", "DuplicateKey", "key 'eps' stands here again", "eps: 2"),
    ("eps: 1e-3", "x: x", "DuplicateKey", "'in' means input 'x', which is connected twice", "x: x}"),
    ("use: norm.fake", "use: norm.fkae", "UnknownComponent", "unknown component 'norm.fkae'", "norm.fkae"),
    ("use: mac", "use: mca", "UnknownComponent", "unknown component 'mca'", "mca"),
    ("{use: norm.fake, in: x, eps: 1e-3}", "norm.fake", "WrongType", "node 'normed' is not a mapping", "norm.fake"),
    ("{use: norm.fake, in: x, eps: 1e-3}", "{in: x}", "MissingKey", "node 'normed' does not say what", "normed"),
    ("use: norm.fake", "use: [a]", "WrongType", "use names a component or block", "[a]"),
    ("in: embedded", "in: embeded", "UnknownName", "unknown name 'embeded'", "embeded"),
    ("in: embedded", "in: {a: b}", "WrongType", "expected a reference", "{a: b}"),
    ("in: embedded", "in: 5", "WrongType", "expected a reference, got '5'", "5"),
    ("in: embedded, ", "", "MissingInput", "input 'x' of block 'mac' is not connected", "layers: {"),
    ("embedded.table", "embedded.tabel", "UnknownPort", "embedding.fake has no output 'tabel'", "embedded.tabel"),
    ("memory.recalled", "memory.recaled", "UnknownPort", "memory.fake has no output 'recaled'", "memory.recaled"),
    ("write: attended", "wirte: attended", "UnknownPort", "memory.fake has no input 'wirte'", "wirte"),
    ("repeat: $layers", "repeat: 1.5, expansion: $layers", "WrongType", "repeat must be a whole number", "1.5"),
    ("repeat: $layers", "repeat: 99999, expansion: $layers", "LimitExceeded", "repeat is at most 10000", "99999"),
    ("repeat: $layers", "expnsion: $layers", "UnknownParameter", "block 'mac' has no parameter 'expnsion'", "expnsion"),
    ("segment: 64}", "segment: 64, idle: 1}", "UnusedParameter", "parameter 'idle' is never used", "idle"),
    ("{expansion: 4}", "{expansion: 4, a: 1}", "UnusedParameter", "parameter 'a' is never used", "a: 1"),
    ("{expansion: 4}", "{expansion: 4, x: $layers}", "DuplicateKey", "'x' is both an input and a parameter", "x: $"),
    ("  logits:", "  spare: {use: norm.fake, in: layers}\n  logits:", "UnusedNode", "node 'spare' is never", "spare"),
    ("{tokens: [B, T]}", "{tokens: [B, T], q: [B, T]}", "UnusedNode", "input 'q' is never used", "[B, T]}"),
    (
        "blocks:\n",
        "blocks:\n  idle: {input: {x: [B, T]}, nodes: {}, output: x}\n",
        "UnusedNode",
        "block 'idle'",
        "idle",
    ),
    ("add.fake, in: [memory.recalled, normed]", "mac, in: normed", "LimitExceeded", "block 'mac' contains", "mac, in"),
    ("vocab: 256", "vocab: !!python/object:os.system {}", "SyntaxProblem", "tag 'tag:yaml.org,2002:python", "!!py"),
    ("blocks:\n", "blocks:\n  bad: 3\n", "WrongType", "block 'bad' is not a mapping", "3\n"),
    ("use: mac", "use: *nobody", "SyntaxProblem", "unknown alias '*nobody'", "*nobody"),
    ("name: mac", "name: [", "SyntaxProblem", "", ""),
    ("name: mac", "name: \x00", "SyntaxProblem", "character U+0000 is not allowed", "\x00"),
    ("name: mac", "? [a]\n: b", "SyntaxProblem", "a key must be a word", "[a]"),
    ("name: mac", "<<: 3", "SyntaxProblem", "'<<' takes a mapping, or a list of mappings", "3"),
]


@pytest.mark.parametrize(("old", "new", "kind", "message", "at"), CASES, ids=[c[1][:30] or c[0][:30] for c in CASES])
def test_one_mistake_gives_one_diagnostic_in_its_place(old: str, new: str, kind: str, message: str, at: str) -> None:
    text = changed(old, new)
    problem = only(read_text(text, "mac.yaml"))
    assert (type(problem).__name__, problem.message[: len(message)]) == (kind, message)
    assert problem.span is not None
    assert text.splitlines()[problem.span.line - 1][problem.span.column - 1 :].startswith(at.rstrip("\n"))


GOLDEN = """\
mac.yaml:17:21: error: unknown component 'norm.fkae'
    17 |       normed: {use: norm.fkae, in: x, eps: 1e-3, eps: 2}
       |                     ^^^^^^^^^
  help: did you mean 'norm.fake'?
mac.yaml:17:50: error: key 'eps' stands here again
    17 |       normed: {use: norm.fkae, in: x, eps: 1e-3, eps: 2}
       |                                                  ^^^
  help: first at 17:39
graph: error: spec mac.yaml has no parameter 'dmi'
  help: did you mean 'dim'?"""


def test_diagnostics_as_people_see_them() -> None:
    text = changed("use: norm.fake", "use: norm.fkae").replace("eps: 1e-3", "eps: 1e-3, eps: 2")
    rendered = [d.render() for d in read_text(text, "mac.yaml", dmi=3).diagnostics]
    assert "\n".join(rendered) == GOLDEN


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dim": "x"}, "override of parameter 'dim': must be a number like its default 8, got 'x'"),
        ({"dim": True}, "override of parameter 'dim': must be a number like its default 8, got True"),
        ({"dim": object()}, "override of parameter 'dim': a value must be a number"),
        ({"dim": 2**70}, "override of parameter 'dim': a whole number must fit in 64 bits"),
        ({"dim": -1}, "parameter 'dim' must be at least 1, got -1"),
    ],
)
def test_bad_overrides(overrides: dict[str, Any], message: str) -> None:
    assert read_text(MAC, **overrides).diagnostics[0].message.startswith(message)


CHAIN = """
titans_graph: 1
parameters: {dim: 8, width: 4, inner: $width * 2, sizes: $inner + 1, other: $width}
input: {tokens: [B, T]}
nodes:
  embedded: {use: embedding.fake, in: tokens, dim: $dim, expansion: %s}
output: {y: embedded}
"""
"""``sizes`` reads ``width`` by way of ``inner``; what else is read depends on the node."""


@pytest.mark.parametrize(
    ("read", "overrides", "idle"),
    [
        ("$sizes + $other", {"sizes": 3, "width": 5}, []),
        ("$sizes + $other", {"sizes": 3, "other": 1, "width": 5}, [("width", "sizes")]),
        ("$sizes + $other", {"sizes": 3, "inner": 2, "dim": 4}, [("inner", "sizes")]),
        ("$sizes + $other", {"inner": 3, "other": 1, "width": 5}, [("width", "inner")]),
        ("$sizes + $width", {"sizes": 3, "other": 1, "width": 5}, []),
        ("$sizes + $other", {"width": 5}, []),
    ],
)
def test_overrides_without_effect(read: str, overrides: dict[str, Any], idle: list[tuple[str, str]]) -> None:
    found = [d for d in read_text(CHAIN % read, **overrides).diagnostics if isinstance(d, IdleOverride)]
    assert [d.message for d in found] == [
        f"override of parameter {name!r} has no effect: only the default of {by!r} reads it" for name, by in idle
    ]


@pytest.mark.parametrize(
    ("read", "overrides", "kind"),
    [
        ("$widht", {"sizes": 3, "other": 1, "width": 5}, "UnknownName"),
        ("$sizes + $other", {"sizes": 3, "other": 1, "width": "x"}, "WrongType"),
        ("$sizes + $other", {"sizes": [object()], "other": 1, "width": 5}, "WrongType"),
    ],
)
def test_mistakes_hide_overrides_without_effect(read: str, overrides: dict[str, Any], kind: str) -> None:
    kinds = [type(d).__name__ for d in read_text(CHAIN % read, **overrides).diagnostics]
    assert kind in kinds
    assert "IdleOverride" not in kinds


def test_a_broken_spec_gives_what_can_be_followed() -> None:
    declared = read_text(changed("in: embedded", "in: nothing").replace("eps: 1e-3", "eps: $no"))
    assert declared.broken == {("main", "layers"), ("mac", "normed")}
    assert declared.graph is not None
    layers = declared.graph.main.node("layers")
    assert layers is not None
    assert layers.inputs == {}


def test_empty_and_foreign_texts() -> None:
    for text in ("", "# nothing", "---\n"):
        assert only(read_text(text)).message in ("the file is empty", "a spec is a mapping")
    assert only(read_text("- a\n- b")).message == "a spec is a mapping"
    assert only(read_text(MAC + "---\na: 1\n")).message == "a second document begins here; a spec is one document"


def test_files_are_found_read_and_refused(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text("\ufeff" + changed("name: mac\n", ""), encoding="utf-8")
    declared = read(file, dim=4)
    assert declared.diagnostics == []
    assert declared.graph is not None
    assert declared.graph.name == "small"
    file.write_bytes(b"titans_graph: 1\nname: caf\xe9\n")
    problem = only(read(file))
    assert (problem.message, problem.span and (problem.span.line, problem.span.column)) == (
        "byte 0xe9 is not UTF-8",
        (2, 10),
    )
    file.write_bytes(b"#" * 1_000_001)
    assert type(only(read(file))) is errors.LimitExceeded
    with pytest.raises(UsageError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(UsageError, match=r"no spec file at .*shipped specs: .*mac"):
        read(tmp_path / "missing.yaml")
    with pytest.raises(UsageError, match="did you mean 'mac'"):
        find("macc")
    with pytest.raises(UsageError):
        find("a\x00b")


def test_shipped_specs_are_found_by_name() -> None:
    assert {"mac", "blocks/mac"} <= set(shipped())
    assert find("blocks/mac").name == "mac.yaml"
    assert find("mac.yaml") == find("mac")


def test_yaml_reads_back() -> None:
    graph = read_text(MAC).graph
    assert graph is not None
    again = read_text(to_yaml(graph))
    assert again.diagnostics == []
    assert again.graph == graph
