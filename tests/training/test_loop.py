from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.training.data import model, quick, run, small_text
from tests.training.stand_in import StandIn
from titans_graph.errors import CheckpointError, DataError, UsageError
from titans_graph.runtime.denormals import flushed
from titans_graph.training import atomic, logs
from titans_graph.training.loop import TrainResult, make_optimizer, train
from titans_graph.training.replay import NonFiniteError

ROOT = Path(__file__).resolve().parents[2]


class Stopping(StandIn):
    """Sends this process a signal while it computes forward pass number ``at``."""

    def __init__(self, at: int, number: int = signal.SIGINT) -> None:
        torch.manual_seed(0)
        super().__init__(8)
        self.at, self.number, self.calls = at, number, 0

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.calls += self.training
        if self.training and self.calls == self.at:
            os.kill(os.getpid(), self.number)
        return super().forward(tokens, state)


class Breaking(StandIn):
    """Gives NaN from training step ``at`` on, in the loss or only in its gradient."""

    def __init__(self, at: int, in_gradient: bool) -> None:
        torch.manual_seed(0)
        super().__init__(8)
        self.at, self.in_gradient, self.calls = at, in_gradient, 0

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.calls += self.training
        y, state = super().forward(tokens, state)
        if self.calls < self.at:
            return y, state
        return (y + (self.decay.sum() * 0).sqrt() if self.in_gradient else y * torch.nan), state


def losses(out: Path) -> list[float]:
    return [r["loss"] for r in logs.read(out) if r["kind"] == "train"]


def weights(out: Path, step: int) -> dict[str, Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / "weights.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("reference")
    run(out)
    return out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_exactly(tmp_path: Path, reference: Path, number: int) -> None:
    first = run(tmp_path, net=Stopping(3, number))
    assert (first.step, first.signal) == (3, number)
    second = run(tmp_path, net=model(seed=7))  # other initial weights: they must come from the checkpoint
    assert (second.step, second.signal) == (6, 0)
    assert losses(tmp_path) == losses(reference)
    assert same(weights(tmp_path, 6), weights(reference, 6))
    assert [r["kind"] for r in logs.read(tmp_path)].count("resume") == 1


def test_a_run_killed_after_its_last_checkpoint_goes_on_exactly(tmp_path: Path, reference: Path) -> None:
    class Killed(Exception):
        pass

    class Dying(Stopping):
        def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            if self.training and self.calls == self.at:
                raise Killed
            return super().forward(tokens, state)

    with pytest.raises(Killed):
        run(tmp_path, quick(checkpoint_every=2), net=Dying(5, 0))
    assert losses(tmp_path) == losses(reference)[:5]
    run(tmp_path, quick(checkpoint_every=2))
    assert losses(tmp_path) == losses(reference), "the fifth step stands in the log once"
    assert same(weights(tmp_path, 6), weights(reference, 6))


def test_training_learns() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as out:
        result = run(Path(out), quick(steps=40, batch=8, length=16, learning_rate=0.05))
    assert result.bits_per_byte is not None
    assert result.bits_per_byte < 5


def test_the_log_holds_what_it_promises(reference: Path) -> None:
    records = logs.read(reference)
    start = records[0]
    assert start["kind"] == "start"
    assert {"fingerprint", "seed", "config", "data", "torch", "python", "package", "device"} <= start.keys()
    step = next(r for r in records if r["kind"] == "train")
    assert {"step", "time", "loss", "bits_per_byte", "lr", "grad_norm", "tokens_per_s"} <= step.keys()
    assert [r["step"] for r in records if r["kind"] == "eval"] == [3, 6]
    assert list((reference / "tensorboard").glob("events.*"))


def test_a_text_too_short_for_a_window_leaves_the_folder_to_the_next_try(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(DataError, match="one window needs 5001"):
        run(out, quick(length=5000))
    assert not out.exists()
    assert run(out).step == 6


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    first = run(tmp_path)
    again = run(tmp_path)
    assert (again.step, again.bits_per_byte) == (6, first.bits_per_byte)
    assert len(losses(tmp_path)) == 6


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, quick(checkpoint_every=1, keep=2))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize("in_gradient", [False, True])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, in_gradient: bool) -> None:
    net = Breaking(4, in_gradient)
    with pytest.raises(NonFiniteError, match="step 4: the " + ("gradient norm" if in_gradient else "loss")) as caught:
        run(tmp_path, quick(checkpoint_every=2), net=net)
    assert caught.value.step == 4
    windows = load_file(caught.value.folder / "batch.safetensors")["windows"]
    assert torch.equal(windows, small_text().batch(0, 3, range(2), 8))
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()
    assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize(
    ("config", "net", "message"),
    [
        ({"steps": 7}, {}, "steps: 6 there, 7 here"),
        ({"learning_rate": 0.5}, {}, "learning_rate: 0.01 there, 0.5 here"),
        ({}, {"dim": 9}, r'-.*"dim": 8'),
    ],
)
def test_another_run_in_the_folder_is_refused(
    reference: Path, config: dict[str, Any], net: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        run(reference, quick(**config), net=model(**net))


def test_settings_that_do_not_touch_the_weights_may_change(reference: Path) -> None:
    assert run(reference, quick(eval_every=2, keep=1)).step == 6


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom titans_graph.training.atomic import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"id {other.pid}"):
            run(tmp_path)
        other.kill()
    assert run(tmp_path).step == 6, "the lock goes with its process"


def test_a_full_disk_is_named_and_leaves_the_earlier_checkpoint(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = 0

    def full(name: str) -> None:
        nonlocal saves
        saves += name == "inside weights.safetensors"
        if saves == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "boundary", full)
        with pytest.raises(CheckpointError, match=r"step-00000004: .*No space left"):
            run(tmp_path, quick(checkpoint_every=2))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    run(tmp_path, quick(checkpoint_every=2))
    assert same(weights(tmp_path, 6), weights(reference, 6))


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="file/run"):
        run(tmp_path / "file" / "run")


def test_weight_decay_is_for_matrices_only() -> None:
    groups = make_optimizer(model(), quick()).param_groups
    decayed = {p.ndim for p in groups[0]["params"]}
    assert (decayed, groups[0]["weight_decay"]) == ({2}, 0.1)
    assert ({p.ndim for p in groups[1]["params"]}, groups[1]["weight_decay"]) == ({1}, 0.0)


def test_too_small_a_vocabulary_is_named(tmp_path: Path) -> None:
    text = small_text()
    with pytest.raises(UsageError, match="128 logits"):
        train(StandIn(8, vocabulary=128), text, quick(), tmp_path, note=lambda note: None, progress=False)


def test_compiled_training_shares_the_parameters(tmp_path: Path, reference: Path) -> None:
    run(tmp_path, quick(compile=True))
    assert same(weights(tmp_path, 6), weights(reference, 6))


@pytest.mark.nightly
def test_two_processes_share_one_batch(tmp_path: Path, reference: Path) -> None:
    """The same losses as one process, up to the order of summation."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.training.data import quick, run\n"
        "run(Path(sys.argv[1]), quick(device=sys.argv[2]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, str(program), str(tmp_path / "run"), "cpu" if torch.accelerator.is_available() else "auto"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), rel=1e-5)


def test_the_processor_is_left_as_it_was(reference: Path) -> None:
    run(reference)
    assert sys.float_info.min / 2 > 0
    with flushed():
        assert torch.tensor(sys.float_info.min, dtype=torch.float64).div(2).item() == 0
    assert sys.float_info.min / 2 > 0


def test_results_are_plain(reference: Path) -> None:
    result: TrainResult = run(reference)
    assert json.loads((reference / "run.json").read_text())["config"]["steps"] == result.steps
    check: Callable[[Path], str] = atomic.damage
    assert check(reference / "checkpoints" / "step-00000006") == ""
