"""The passes one by one: what they find out about the shipped specs, and that optional ones preserve meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import titans_graph as tg
from tests.models import ALL, MODELS, SMALL, example, parameters, small
from titans_graph.errors import UsageError
from titans_graph.passes import Compilation


def compiled(name: str, **options: Any) -> Compilation:
    chosen = {k: v for k, v in SMALL.items() if k in parameters(name)}
    return tg.compilation(name, **{**chosen, **options})


def test_expand_gives_every_copy_a_path() -> None:
    c = compiled("mac", layers=3)
    assert {n.instance for n in c.nodes.values()} == {"", "layers.0", "layers.1", "layers.2"}
    assert c.nodes["layers.1.normed"].inputs["x"][0].text() == "layers.0.y.out"
    assert c.nodes["logits"].inputs["table"][0].text() == "embedded.table"


def test_shapes_are_inferred_through_the_feedback_loop() -> None:
    c = compiled("mac")
    shown = {ref.text(): value.text() for ref, value in c.types.items()}
    assert shown["layers.0.context.out"] == "[B, 3 + T + T, 16]"
    assert shown["layers.0.memory.recalled"] == "[B, T, 16]"
    assert shown["logits.out"] == "[B, T, 13]"


@pytest.mark.parametrize(("name", "members"), [("mac", {"memory", "context", "attended"}), ("mag", None), ("mal", None)])
def test_feedback_is_found_where_it_is(name: str, members: set[str] | None) -> None:
    c = compiled(name, layers=1)
    if members is None:
        assert c.loops == ()
        return
    (loop,) = c.loops
    assert loop.period == SMALL["segment"]
    assert {n.removeprefix("layers.0.") for n in loop.nodes} == members


def test_two_memories_share_one_loop_in_ladder() -> None:
    (loop,) = compiled("ladder", layers=1).loops
    assert {n.removeprefix("layers.0.") for n in loop.nodes} == {"lower", "upper", "context", "attended"}


def test_everything_outside_the_loop_is_hoisted() -> None:
    c = compiled("mac", layers=1)
    assert c.whole is not None
    kinds = [(r.kind, r.instance) for r in c.whole.regions]
    assert kinds == [("whole", ""), ("whole", "layers.0"), ("loop", "layers.0"), ("whole", "layers.0"), ("whole", "")]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("disabled", ["hoist", "share"])
def test_optional_passes_preserve_meaning(name: str, disabled: str) -> None:
    chosen = {k: v for k, v in SMALL.items() if k in parameters(name)}
    model = small(name)
    other = tg.load(name, disable=(disabled,), **chosen).double()
    other.load_state_dict(model.state_dict())
    x = example(model, 2, 21)
    results = []
    for m in (model, other):
        y, _ = m(x)
        torch.autograd.backward(y.sin().sum())
        results.append((y, [p.grad for p in m.parameters()]))
    assert (results[0][0] - results[1][0]).abs().max() <= 1e-12
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert a is not None
        assert b is not None
        assert (a - b).abs().max() <= 1e-10 * max(1.0, float(a.abs().max()))


def test_passes_are_listed_timed_and_can_be_stopped_after() -> None:
    c = compiled("lmm")
    names = [r.name for r in c.records]
    assert names == [
        "expand",
        "infer-shapes",
        "check-causality",
        "find-feedback",
        "hoist",
        "schedule",
        "choose-kernels",
        "share",
        "lower",
    ]
    assert all(r.seconds >= 0 and r.after is not None for r in c.records)
    assert [r.name for r in compiled("lmm", after="find-feedback").records][-1] == "find-feedback"


def test_unknown_and_mandatory_passes_are_named() -> None:
    with pytest.raises(UsageError, match="did you mean 'schedule'"):
        compiled("lmm", after="shedule")
    with pytest.raises(UsageError, match="cannot be disabled; optional passes: hoist, share"):
        compiled("lmm", disable=("schedule",))


@pytest.mark.parametrize("name", MODELS)
def test_equal_layers_share_their_functions(name: str) -> None:
    assert len(compiled(name, layers=2).lowered.codes) == len(compiled(name, layers=4).lowered.codes)
    apart = compiled(name, layers=4, disable=("share",)).lowered.codes
    assert len(apart) > len(compiled(name, layers=4).lowered.codes)


def test_the_reference_kernel_can_be_forced_and_agrees() -> None:
    text = "titans_graph: 1\ninput: {x: [B, T, 8]}\nnodes:\n  y: {use: memory.neural, in: x, heads: 2, chunk: 4%s}\noutput: y\n"
    from titans_graph.runtime.api import compilation
    from titans_graph.spec import read_text

    models = []
    for extra in ("", ", kernel: reference"):
        declared = read_text(text % extra)
        assert declared.graph is not None
        assert compilation(declared.graph).kernels == {"y": "reference" if extra else "by device"}
        torch.manual_seed(0)
        models.append(tg.build(declared.graph).double())
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    assert (models[0](x)[0] - models[1](x)[0]).abs().max() <= 1e-12


TWO_LOOPS = """
titans_graph: 1
input: {x: [B, T, 4]}
segment: 4
nodes:
  one:    {use: memory.neural, opening: x, write: first, heads: 1, chunk: 2, network: linear}
  seen:   {use: sequence.concat, in: [one.recalled, x]}
  first:  {use: attention.segment, in: seen, keep: x, heads: 1}
  norm:   {use: norm.rms, in: first}
  two:    {use: memory.neural, opening: norm, write: second, heads: 2, chunk: 4, network: {mlp: 2}}
  again:  {use: sequence.concat, in: [two.recalled, norm]}
  second: {use: attention.segment, in: again, keep: norm, heads: 1}
  y:      {use: add, in: [second, one, two]}
output: y
"""


@pytest.mark.parametrize("disabled", ["hoist", "share"])
def test_two_loops_of_one_block(disabled: str, tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(TWO_LOOPS)
    torch.manual_seed(0)
    model = tg.load(path).double()
    plain = tg.load(path, disable=[disabled]).double()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    assert (model(x)[0] - plain(x)[0]).abs().max() <= 1e-9
