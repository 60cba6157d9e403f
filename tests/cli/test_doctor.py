"""``titans-graph doctor``: what it measures against numbers made by hand, and what it finds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import titans_graph as tg
from tests.models import ALL, MODELS, example, parameters, small
from titans_graph.cli import main
from titans_graph.errors import InputError, UsageError
from titans_graph.runtime.findings import Head
from titans_graph.runtime.health import doctor, sample

Capture = pytest.CaptureFixture[str]
TINY = ["--set", "dim=16", "layers=1", "heads=2", "hidden=4", "segment=8", "chunk=4"]


def memory_of(model: tg.Model) -> Any:
    return next(m for path, m in model.body.named_modules() if path.endswith("memory"))


def spread(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1]


def near(found: Any, values: list[float]) -> None:
    got = (found.minimum, found.median, found.maximum)
    assert got == pytest.approx(spread(values), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("cap", ["keys", "none"])
def test_the_numbers_are_those_of_the_equations(cap: str) -> None:
    """A linear memory of one head, three chunks (the last one short), by a loop over tokens."""
    torch.manual_seed(1)
    b = tg.Builder(dim=6)
    x = b.input("x", ["B", "T", "dim"])
    memory = b.add("memory.neural", x, heads=1, chunk=4, network="linear", conv=0, cap=cap, max_step=0.7, name="memory")
    b.output(memory.recall)
    model = b.build().double()
    tokens = torch.randn(1, 10, 6, dtype=torch.float64)
    (found,) = doctor(model, tokens).memories
    (head,) = found.heads
    by_hand(model.body.get_submodule("memory"), tokens[0], head, cap)
    assert (found.node, found.network, found.cap, found.chunk) == ("memory", "linear", cap, 4)


def by_hand(c: Any, tokens: Tensor, head: Head, cap: str) -> None:
    """Equations 8-14 for one row, and every number of the report."""
    seen: dict[str, list[float]] = {key: [] for key in ("asked", "step", "limit", "eta", "keep", "surprise", "crowding")}
    written: list[float] = []
    with torch.no_grad():
        w = c.initial["w"][0].clone()
        first, s, anchor = w.norm(), torch.zeros_like(w), w
        keys: list[Tensor] = []
        for t, x in enumerate(tokens):
            if t % 4 == 0:
                written += [float((w - anchor).norm())] if t else []
                anchor, keys = w, []
            k = functional.normalize(functional.silu(c.key(x)), dim=-1)
            v = functional.silu(c.value(x))
            keys.append(k)
            a, e, f = c.controls(x).sigmoid()
            r = max(1.0, float(sum((o @ k).abs() for o in keys)))
            limit = 0.1 / (3 * r * (1 + math.log(r)))
            asked = 0.7 * float(a)
            step = asked * limit if cap == "keys" else asked
            gradient = 2 * torch.outer(k, k @ anchor - v)
            s = 0.9 * e * s - step * gradient
            w = f * w + s
            row = (asked, step, limit, 0.9 * float(e), float(f), float(gradient.norm()), r)
            for key, value in zip(seen, row, strict=True):
                seen[key].append(value)
        written.append(float((w - anchor).norm()))
    for key, measured in zip(
        seen, (head.asked, head.step, head.limit, head.momentum, head.keep, head.surprise, head.crowding), strict=True
    ):
        near(measured, seen[key])
    near(head.writes["w"], written)
    assert head.start["w"] == pytest.approx(float(first))
    assert head.end["w"] == pytest.approx(float(w.norm()))
    assert head.growth == pytest.approx(float(w.norm() / first))
    assert head.above == (sum(a > b for a, b in zip(seen["step"], seen["limit"], strict=True)))


@pytest.mark.parametrize("name", ALL)
def test_every_shipped_spec_is_sound_and_left_as_it_was(name: str) -> None:
    model = small(name)
    x = example(model, 2, 19)
    before, _ = model(x)
    found = doctor(model, x)
    assert found.sound, found.text()
    assert len(found.memories) == sum(node.use == "memory.neural" for node in model.compilation.nodes.values())
    assert torch.equal(model(x)[0], before)
    assert not any(m._forward_hooks for m in model.body.modules())
    json.dumps(found.plain(), allow_nan=False)


@pytest.mark.parametrize("tokens", [1, 3, 8, 21])
def test_the_end_is_that_of_the_state(tokens: int) -> None:
    """In a feedback loop too: the weights that the doctor follows are those the model ends with."""
    model = small("mac")
    x = example(model, 2, tokens)
    with torch.no_grad():
        _, state = model(x)
    for memory in doctor(model, x).memories:
        for head in memory.heads:
            for name, norm in head.end.items():
                weights = state.nodes[memory.node][f"weights.{name}"][:, head.head]
                assert norm == pytest.approx(float(weights.flatten(1).norm(dim=1).max()))


@pytest.mark.parametrize(
    ("parameter", "first"),
    [
        ("layers.1.memory.key.weight", "layers.1.memory.recall in the chunk of tokens 0-3"),
        ("layers.0.attended.project.weight", "layers.0.attended.out at token 0"),
        ("layers.1.mixed.gain_b", "layers.1.mixed.out at token 0"),
        ("layers.0.prefix.tokens", "layers.0.prefix.out"),
        ("layers.0.memory.query.weight", "layers.0.memory.recalled at token 0"),
    ],
)
def test_a_planted_nan_is_found_where_it_is(parameter: str, first: str) -> None:
    model = small("mac")
    with torch.no_grad():
        model.body.get_parameter(parameter).view(-1)[0] = torch.nan
    found = doctor(model, example(model, 1, 20))
    assert not found.sound
    assert found.parameters == (f"body.{parameter}",)
    assert found.first is not None
    assert found.first.text() == first
    assert f"first output that is not finite: {first}" in found.text()
    json.dumps(found.plain(), allow_nan=False)


def test_an_infinity_of_one_token_is_found_at_that_token() -> None:
    model = small("mal")
    with torch.no_grad():
        model.body.get_parameter("embedded.embedding.weight")[5] = torch.inf
    x = torch.full((2, 20), 3)
    x[1, 13] = 5
    found = doctor(model, x)
    assert found.first is not None
    assert found.first.text() == "embedded.out at token 13"


def test_a_nan_in_the_input_is_told_from_one_in_the_model() -> None:
    model = small("blocks/mag")
    x = example(model, 2, 20)
    x[1, 7, 2] = torch.nan
    found = doctor(model, x)
    assert found.input == 7
    assert found.first is not None
    assert (found.first.node, found.first.token) == ("normed", 7)
    assert "the input is not finite at token 7" in found.problems


@pytest.mark.parametrize(
    ("bad", "said"),
    [(5, "in the chunk of tokens 4-7"), (9, "in the chunk of tokens 8-9"), (10, "at token 10")],
)
def test_a_memory_that_reads_an_infinity_names_the_chunk(bad: int, said: str) -> None:
    b = tg.Builder(dim=4)
    memory = b.add("memory.neural", b.input("x", ["B", "T", "dim"]), heads=1, chunk=4 if bad < 10 else 1, name="memory")
    b.output(memory.recall)
    x = torch.randn(1, 10 if bad < 10 else 12, 4)
    x[0, bad, 2] = torch.inf
    found = doctor(b.build(), x)
    assert found.first is not None
    assert found.first.text() == f"memory.recall {said}"


def linear(objective: Any, **given: Any) -> tg.Model:
    torch.manual_seed(1)
    b = tg.Builder(dim=8)
    x = b.input("x", ["B", "T", "dim"])
    b.output(b.add("memory.neural", x, heads=1, chunk=8, network="linear", objective=objective, **given).recall)
    model: tg.Model = b.build()
    return model


def curved(prediction: Tensor, value: Tensor) -> Tensor:
    return 4 * (prediction - value).square()


tg.register_objective("test_doctor_known", curved, curvature=8)
tg.register_objective("test_doctor_unknown", lambda p, v: curved(p, v))


def test_the_cap_shrinks_with_the_curvature_of_the_objective() -> None:
    x = torch.randn(2, 40, 8)
    first, *others = (doctor(linear(o), x) for o in ("l2", "test_doctor_known", {"huber": {"delta": 1}}, "test_doctor_unknown"))
    limits, steps = zip(*[(f.memories[0].heads[0].limit, f.memories[0].heads[0].step) for f in (first, *others)], strict=True)
    for found, factor in ((1, 0.25), (2, 1.0)):
        assert limits[found].maximum == pytest.approx(factor * limits[0].maximum)
        assert steps[found].maximum == pytest.approx(factor * steps[0].maximum)
    assert math.isnan(limits[3].maximum)
    assert steps[3].maximum == pytest.approx(steps[0].maximum)


def test_an_unknown_stable_step_is_said_and_not_judged() -> None:
    found = doctor(linear("test_doctor_unknown", cap="none"), 0.01 * torch.randn(1, 8, 8))
    note = "the largest stable step is not known for the objective test_doctor_unknown"
    assert note in found.text()
    assert not any("stable" in problem for problem in found.problems)
    assert "no step above" not in found.text()
    assert "  largest stable step" not in found.text()
    assert found.plain()["memories"][0]["curvature"] is None
    assert note in found.plain()["notes"][0]
    json.dumps(found.plain(), allow_nan=False)


@pytest.mark.parametrize("objective", ["l2", "test_doctor_unknown", {"lp": {"p": 2}}])
def test_a_memory_that_diverges_is_found(objective: Any) -> None:
    x = torch.ones(1, 48, 8)
    (line,) = [p for p in doctor(linear(objective, cap="none"), x).problems if "grew from" in p]
    assert "more than 1,000-fold" in line
    assert doctor(linear("l2"), x).sound


def test_an_infinite_first_weight_is_found_at_the_memory() -> None:
    model = small("blocks/lmm")
    with torch.no_grad():
        memory_of(model).initial["w1"].view(-1)[0] = torch.inf
    found = doctor(model, example(model, 1, 5))
    assert found.parameters == ("body.memory.initial.w1",)
    assert found.first is not None
    assert found.first.node == "memory"


def test_a_step_that_is_too_large_is_found(tmp_path: Path, capsys: Capture) -> None:
    spec = tmp_path / "bold.yaml"
    shipped = (Path(str(tg.__file__)).parents[1] / "specs" / "lmm.yaml").read_text()
    spec.write_text(shipped.replace("conv: $conv\n", "conv: $conv\n        cap: none\n        max_step: 50.0\n"))
    command = ["doctor", str(spec), "--set", "dim=16", "layers=1", "heads=2", "hidden=4", "chunk=4", "--tokens", "8"]
    assert main(command) == 1
    shown = capsys.readouterr().out
    assert "layers.0.memory head 0: the step is above the largest stable one at 8 tokens" in shown
    spec.write_text(shipped.replace("conv: $conv\n", "conv: $conv\n        max_step: 50.0\n"))
    assert main(command) == 1
    assert "max_step is above 1" in capsys.readouterr().out


@pytest.mark.parametrize("name", MODELS)
def test_a_sound_spec_ends_with_zero(name: str, capsys: Capture) -> None:
    given = [pair for pair in TINY[1:] if pair.partition("=")[0] in parameters(name)]
    assert main(["doctor", name, "--set", *given, "--tokens", "40", "--batch", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{name}: 2 x 40 tokens\n")
    assert shown.endswith("sound: all finite, no step above the largest stable one\n")
    assert ("no memory in this model" in shown) == (name == "transformer")


def test_json_text_and_seed(tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(256)))
    command = ["doctor", "mac", *TINY, "--tokens", "30", "--json"]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["sound"] is True
    assert first["memories"][0]["heads"][1]["growth"] > 0
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert main([*command, "--text", str(text), "--batch", "3"]) == 0
    assert json.loads(capsys.readouterr().out) != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mac", "--tokens", "0"], "at least 1"),
        (["mac", "--batch", "0"], "at least 1"),
        (["blocks/mac", "--text", "TEXT"], "stream of features"),
        (["mac", "--text", "TEXT", "--tokens", "9"], "has 4 bytes"),
        (["mac", "--text", "/dev/null"], "is empty"),
        (["nowhere"], "nowhere"),
    ],
)
def test_bad_usage_is_two(arguments: list[str], message: str, tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"four")
    assert main(["doctor", *(str(text) if a == "TEXT" else a for a in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_help_has_examples(capsys: Capture) -> None:
    assert main(["doctor", "--help"]) == 0
    assert "example:\n  titans-graph doctor" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "  doctor " in capsys.readouterr().out


def test_a_trained_run_is_taken_with_its_weights(tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"the same words again and again, " * 60)
    run = str(tmp_path / "run")
    sizes = ["--steps", "1", "--batch", "1", "--length", "8", "--warmup", "1", "--eval-bytes", "20", "--device", "cpu"]
    assert main(["train", "lmm", "--set", "dim=16", "layers=1", "hidden=4", "--data", str(text), "--out", run, *sizes]) == 0
    capsys.readouterr()
    assert main(["doctor", run, "--tokens", "20"]) == 0
    assert capsys.readouterr().out.startswith("lmm: 1 x 20 tokens")
    assert main(["doctor", run, "--set", "dim=8"]) == 2
    assert "--set goes with a spec" in capsys.readouterr().err


@pytest.mark.parametrize("x", [torch.zeros(3, dtype=torch.int64), [[1, 2]], torch.zeros(1, 3), torch.tensor(3)])
def test_what_does_not_fit_the_model_is_an_input_error(x: Any) -> None:
    with pytest.raises(InputError, match=r"ids \[B, T\]|must be a tensor"):
        doctor(small("mac"), x)


def test_nothing_to_read_is_refused_and_samples_fit_every_vocabulary() -> None:
    with pytest.raises(UsageError, match="nothing to read"):
        doctor(small("mac"), torch.zeros(1, 0, dtype=torch.int64))
    for vocab in (1, 2, 13, 256):
        x = sample(tg.load("lmm", dim=8, layers=1, heads=1, vocab=vocab), 3, 50)
        assert x.shape == (3, 50)
        assert 0 <= int(x.min()) <= int(x.max()) < vocab
    assert sample(small("blocks/mac"), 2, 7).shape == (2, 7, 16)
