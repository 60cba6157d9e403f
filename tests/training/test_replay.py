"""A step that gave a NaN: kept, run again, and traced to its node."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import titans_graph as tg
from tests.models import small
from tests.training.data import SENTENCE, quick, run
from tests.training.stand_in import build
from tests.training.test_loop import Breaking, Stopping
from titans_graph.cli import main
from titans_graph.errors import CheckpointError
from titans_graph.training import atomic, checkpoint, logs, replay
from titans_graph.training.objective import LossModule
from titans_graph.training.replay import NonFiniteError
from titans_graph.training.trace import Trace, trace

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_board", lambda folder, step: None)


class Poison(torch.autograd.Function):
    """Identity whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.nan


def traced(model: tg.Model) -> Trace:
    windows = torch.randint(0, 256, (2, 22), generator=torch.Generator().manual_seed(0))
    module = LossModule(model, compile=False)
    return trace(model, lambda: module(windows), windows)


def mac() -> tg.Model:
    return small("mac", torch.float32, vocab=256)


def test_a_sound_step_is_said_to_be_so_and_leaves_nothing_behind() -> None:
    model = mac()
    found = traced(model)
    assert found.finite
    assert found.lines() == ["every output and gradient is finite"]
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    loss = LossModule(model, compile=False)(torch.randint(0, 256, (2, 22), generator=torch.Generator().manual_seed(0)))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert found.loss == float(loss.detach())
    assert found.norm == pytest.approx(float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()))


@pytest.mark.parametrize("node", ["layers.1.mixed", "layers.1.memory", "layers.0.attended", "layers.0.normed", "logits"])
def test_the_first_gradient_that_is_not_finite_is_found(node: str) -> None:
    model = mac()
    if node == "logits":
        node = next(iter(model.compilation.outputs.values())).node
    module = model.body.get_submodule(node)
    inner = module.forward

    def forward(*args: Any, **given: Any) -> Any:
        for key in ("write", "x"):
            if key in given and given.get("stage") != "open":
                value = given[key]
                given[key] = tuple(map(Poison.apply, value)) if isinstance(value, tuple) else Poison.apply(value)  # type: ignore[no-untyped-call]
        return inner(*args, **given)

    module.forward = forward
    found = traced(model)
    assert found.forward == ""
    assert found.backward == f"{node}, for one of its inputs"
    assert f"the first gradient that is not finite: {node}" in found.lines()[0]


def test_a_gradient_of_a_parameter_alone_is_found() -> None:
    model = mac()
    module = model.body.get_submodule("layers.0.normed")
    inner = module.forward
    module.forward = lambda x: inner(x) + 0 * Poison.apply(module.gain)  # type: ignore[no-untyped-call]
    assert traced(model).backward == "layers.0.normed, for its parameter gain"


def test_a_nan_in_a_weight_is_traced_forward() -> None:
    model = mac()
    with torch.no_grad():
        model.body.get_parameter("layers.1.mixed.gain_b")[0] = torch.nan
    found = traced(model)
    assert found.parameters == ("body.layers.1.mixed.gain_b",)
    assert found.forward == "layers.1.mixed.out at token 0"
    json.dumps(found.plain(), allow_nan=False)


def test_what_only_the_norm_or_the_loss_overflows_is_said() -> None:
    assert Trace(1.0, torch.inf, (), "", "").lines() == [
        "every gradient is finite, their norm is not: it is too large for float32"
    ]
    assert Trace(torch.inf, torch.nan, (), "", "").lines() == [
        "every node's output is finite, the loss is not: the logits are too large"
    ]


def failed(out: Path, in_gradient: bool) -> NonFiniteError:
    with pytest.raises(NonFiniteError) as caught:
        run(out, quick(checkpoint_every=2), Breaking(4, in_gradient))
    return caught.value


@pytest.mark.parametrize("in_gradient", [False, True])
def test_the_step_is_kept_with_batch_state_and_node(tmp_path: Path, in_gradient: bool) -> None:
    error = failed(tmp_path, in_gradient)
    assert error.folder == tmp_path / "nonfinite-step-00000004"
    assert f"titans-graph doctor --replay {error.folder}" in str(error)
    named = "first gradient that is not finite: model, for its parameter decay" if in_gradient else "is not finite: model"
    assert named in str(error)
    assert atomic.damage(error.folder) == ""
    step = replay.find(tmp_path)
    assert (step.start.step, step.report["step"]) == (3, 4)
    net = build(str(step.path / checkpoint.SPEC))
    checkpoint.restore(step.start, net, torch.optim.AdamW(net.parameters()))
    again = replay.rerun(step, build)  # the model of the spec breaks nothing
    assert again.finite
    assert "finite this time" in again.text()
    notes: list[str] = []
    run(tmp_path, quick(checkpoint_every=2), note=notes.append)
    assert any("going on from step 2" in note for note in notes), "the run itself goes on from its last checkpoint"


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **given: Any) -> Any:
        result = real(self, *args, **given)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 4:
            self.param_groups[0]["params"][0].data.view(-1)[0] = torch.inf
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(
        NonFiniteError, match=r"step 4: the weights after it is nan(.|\n)*parameter embedding.weight is not finite"
    ):
        run(tmp_path, quick(checkpoint_every=2))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_validation_that_is_no_number_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titans_graph.training import loop

    monkeypatch.setattr(loop, "bits_per_byte", lambda *args, **given: float("nan"))
    notes: list[str] = []
    run(tmp_path, quick(checkpoint_every=2), Stopping(5), note=notes.append)
    assert notes[0] == "note: step 3: the validation gives nan; training losses are finite"
    assert run(tmp_path, quick(checkpoint_every=2), note=notes.append).step == 6, "the run goes on all the same"
    assert any("going on from step 5" in note for note in notes)


def test_a_trace_that_fails_does_not_hide_the_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise MemoryError("no room\nfor it")

    monkeypatch.setattr(replay, "trace", broken)
    error = failed(tmp_path, in_gradient=False)
    assert "its nodes could not be looked at: MemoryError: no room" in str(error)
    assert replay.find(tmp_path).report["nodes"] == {}


def test_no_step_kept_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no step is kept here"):
        replay.find(tmp_path)
    error = failed(tmp_path, in_gradient=False)
    (error.folder / replay.BATCH).unlink()
    with pytest.raises(CheckpointError, match=r"damaged: batch.safetensors is missing"):
        replay.find(error.folder)


@pytest.fixture(scope="module")
def bold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command that fails: a learning rate of 1e30."""
    folder = tmp_path_factory.mktemp("bold")
    (folder / "text.txt").write_bytes(SENTENCE * 40)
    given = ["--set", "dim=16", "layers=1", "heads=2", "hidden=4", "segment=8", "chunk=4", "--learning-rate", "1e30"]
    sizes = ["--steps", "4", "--batch", "2", "--length", "16", "--warmup", "1", "--eval-bytes", "20", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "_board", lambda folder, step: None)
        assert main(["train", "mac", *given, "--data", str(folder / "text.txt"), "--out", str(folder / "run"), *sizes]) == 1
    return folder / "run"


def test_the_command_of_the_message_reports_the_node(bold: Path, capsys: Capture) -> None:
    (kept,) = bold.glob("nonfinite-*")
    assert main(["doctor", "--replay", str(kept)]) == 1
    shown = capsys.readouterr().out
    assert "step 2, where the loss was nan\nrun again on cpu: loss nan" in shown
    assert "the first output that is not finite: layers.0.attended.out at token 0" in shown
    assert main(["doctor", "--replay", str(bold), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["then"]["nodes"]["forward"] == found["trace"]["forward"] == "layers.0.attended.out at token 0"
    with pytest.raises(NonFiniteError) as caught:
        raise NonFiniteError("loss", float("nan"), 2, kept, found["then"]["found"], "")
    assert caught.value.step == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mac", "--replay", "x"], "SPEC has no effect with it"),
        (["--replay", "x", "--tokens", "3"], "--tokens has no effect with it"),
        (["--replay", "x", "--set", "dim=3"], "--set has no effect with it"),
        ([], "name a SPEC, or --replay FOLDER"),
    ],
)
def test_replay_takes_no_other_setting(arguments: list[str], message: str, capsys: Capture) -> None:
    assert main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_copy_elsewhere_can_be_replayed(bold: Path, tmp_path: Path, capsys: Capture) -> None:
    (kept,) = bold.glob("nonfinite-*")
    shutil.copytree(kept, tmp_path / "sent")
    assert main(["doctor", "--replay", str(tmp_path / "sent")]) == 1
    assert "layers.0.attended.out" in capsys.readouterr().out
