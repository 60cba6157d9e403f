"""The training loop: next-byte prediction on windows of text, on one process or several.

Built on accelerate: the same code runs on one process, under ``torchrun`` (each process takes its rows of the one
global batch), on CPU and GPU. Everything that decides a step is in the checkpoint or a function of (seed, step), so a
run that is stopped, by Ctrl-C, ``kill -9`` or a full disk, and started again gives the same losses and weights, bit
for bit, as one that was not, on the same machine with the same number of processes. (On a GPU this holds as far as
its kernels are deterministic.)
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from titans_graph.errors import TitansGraphError, UsageError
from titans_graph.runtime.denormals import flushed
from titans_graph.tasks.text import Text
from titans_graph.training import atomic, checkpoint, folder, replay
from titans_graph.training.config import TrainConfig, learning_rate
from titans_graph.training.evaluate import bits_per_byte, restart_of
from titans_graph.training.interface import LanguageModel
from titans_graph.training.interrupt import Interrupt
from titans_graph.training.logs import RunLog
from titans_graph.training.objective import LossModule, demand_language_model

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class TrainResult:
    """Where a run stands. ``signal`` is the number of the signal that stopped it, 0 if it ran to its end."""

    step: int
    steps: int
    bits_per_byte: float | None
    tokens_per_second: float
    seconds: float
    signal: int
    path: Path


def is_main_process() -> bool:
    """Whether this process speaks for the run: the only one, or the first that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def print_note(text: str) -> None:
    """Print a note for people, on stderr, where results do not go; once, however many processes there are."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def train(
    model: LanguageModel,
    text: Text,
    config: TrainConfig,
    out: str | Path,
    *,
    init: Mapping[str, Any] | None = None,
    note: Callable[[str], None] = print_note,
    progress: bool = True,
) -> TrainResult:
    """Train ``model`` in place until ``config.steps``, going on from the newest checkpoint in ``out`` if there is one.

    ``init`` is what :func:`titans_graph.training.start.first_weights` said where the weights of ``model`` are not random.
    On return (also after Ctrl-C, see :class:`TrainResult`) the last step is in a checkpoint. Errors: CheckpointError
    (the folder is locked, belongs to another run, or cannot be written), DataError, UsageError, NonFiniteError.
    """
    out = Path(out)
    demand_language_model(model)
    text.starts(config.length)  # before the folder is this run's: the next try has another length
    accelerator = _accelerator(config)
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(atomic.locked(out))
        identity = folder.identity(model, text, config, init)
        if accelerator.is_main_process:
            folder.claim(out, identity, note)
            atomic.sweep(out)
            atomic.sweep(out / "checkpoints")
        accelerator.wait_for_everyone()
        run = _Run(model, text, config, out, accelerator, note, identity)
        stack.callback(run.close)
        stack.enter_context(flushed())
        interrupt = stack.enter_context(Interrupt())
        try:
            return run.loop(interrupt, progress)
        except KeyboardInterrupt:
            last = f"the last checkpoint is of step {run.saved}" if run.saved >= 0 else "there is no checkpoint yet"
            run.note(f"stopped at once, after step {run.step}; {last}")
            raise


def make_optimizer(model: LanguageModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on parameters of two or more axes only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=(config.beta1, config.beta2))


class _Run:
    """One call of :func:`train`, from restoring a checkpoint to the last step."""

    def __init__(
        self,
        model: LanguageModel,
        text: Text,
        config: TrainConfig,
        out: Path,
        accelerator: Accelerator,
        note: Callable[[str], None],
        identity: dict[str, Any],
    ) -> None:
        self.model, self.text, self.config, self.out, self.accelerator = model, text, config, out, accelerator
        self.identity = identity
        self.note = note if accelerator.is_main_process else lambda text: None
        model.to(accelerator.device)
        model.train()
        torch.manual_seed(config.seed)
        self.adamw = make_optimizer(model, config)
        self.step, self.seconds, self.speed, self.bits, self.saved = 0, 0.0, 0.0, None, -1
        self.states: dict[str, Tensor] = {}
        found = checkpoint.newest(out, self.note)
        lost = folder.loss(out, found)
        if found is not None:
            self._resume(found)
        for line in lost:
            self.note(f"note: {line}")
        self.module, self.optimizer = accelerator.prepare(LossModule(model, config.compile), self.adamw)
        self.rows = range(accelerator.process_index, config.batch, accelerator.num_processes)
        self.restart = restart_of(config.eval_restart, config.length, bool(model.summary().grows))
        self.log = RunLog(out, self.step) if accelerator.is_main_process else None

    bits: float | None

    def loop(self, interrupt: Interrupt, progress: bool) -> TrainResult:
        """Steps, validations and checkpoints until the end or a signal."""
        from tqdm import tqdm

        self._record_start()
        main = self.accelerator.is_main_process
        with tqdm(total=self.config.steps, initial=self.step, unit="step", disable=not (progress and main)) as bar:
            stopped = 0
            while self.step < self.config.steps and not stopped:
                loss = self._train_step()
                shown = {"loss": f"{loss:.3f}", "tok/s": f"{self.speed:,.0f}"}
                if self.bits is not None:
                    shown["val bits/byte"] = f"{self.bits:.3f}"
                bar.set_postfix(shown, refresh=False)
                bar.update()
                if self._due(self.config.eval_every):
                    self._evaluate()
                if self._due(self.config.checkpoint_every):
                    self._save()
                stopped = self._stopped(interrupt)
        if self.saved != self.step:
            self._save()
        return TrainResult(self.step, self.config.steps, self.bits, self.speed, self.seconds, stopped, self.out)

    def close(self) -> None:
        """Close the log."""
        if self.log is not None:
            self.log.close()

    def _train_step(self) -> float:
        """One optimizer step; the mean loss over all processes, in nats per byte."""
        started = time.perf_counter()
        windows = self.text.batch(self.config.seed, self.step, self.rows, self.config.length).to(self.accelerator.device)
        self.states = checkpoint.random_tensors()
        rate = learning_rate(self.config, self.step)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        loss = self.module(windows)
        mean = self.accelerator.reduce(loss.detach(), reduction="mean").item()
        self._demand_finite("loss", mean, windows, self.step + 1)
        self.accelerator.backward(loss)
        norm = float(self.accelerator.clip_grad_norm_(self.module.parameters(), self.config.clip or math.inf))
        self._demand_finite("gradient norm", norm, windows, self.step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self._due(self.config.checkpoint_every):
            self._demand_finite("weights after it", self._extent(), windows, self.step)
        elapsed = time.perf_counter() - started
        self.seconds += elapsed
        self.speed = self.config.batch * self.config.length / elapsed
        self._log("train", loss=mean, bits_per_byte=mean / math.log(2), lr=rate, grad_norm=norm, tokens_per_s=self.speed)
        return float(mean)

    def _extent(self) -> float:
        """A number that is finite where every weight is."""
        parameters = [p.detach().flatten() for p in self.model.parameters()]
        return float(torch.stack([(p - p).sum() for p in parameters]).sum())

    def _evaluate(self) -> None:
        """Validation on the main process, the others wait."""
        started = time.perf_counter()
        if self.accelerator.is_main_process:
            self.model.eval()
            with self.accelerator.autocast():
                stretch = self.text.stretch(self.config.eval_bytes)
                self.bits = bits_per_byte(self.model, stretch, restart=self.restart, device=self.accelerator.device)
            self.model.train()
            self.seconds += time.perf_counter() - started
            self._log("eval", bits_per_byte=self.bits, bytes=len(stretch), restart=self.restart)
            if not math.isfinite(self.bits):
                self.note(f"note: step {self.step}: the validation gives {self.bits}; training losses are finite")
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            path = checkpoint.save_checkpoint(self.out, self.model, self.adamw, self._progress(), self.config.keep)
            self._log("checkpoint", path=path.name)
        self.saved = self.step
        self.accelerator.wait_for_everyone()

    def _progress(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "bits_per_byte": self.bits,
            "config": self.config.plain(),
            "identity": self.identity,
        }

    def _resume(self, found: checkpoint.Checkpoint) -> None:
        checkpoint.restore(found, self.model, self.adamw)
        self.step = self.saved = found.step
        self.seconds, self.bits = found.value("seconds"), found.value("bits_per_byte")
        if self.accelerator.is_main_process:
            checkpoint.prune(self.out, self.step, self.config.keep)
        self.note(f"{self.out}: going on from step {self.step} of {self.config.steps} ({found.path.name})")

    def _record_start(self) -> None:
        if self.step:
            self._log("resume", **_versions(self.accelerator.device))
            return
        self._log(
            "start",
            fingerprint=self.model.fingerprint,
            seed=self.config.seed,
            config=self.config.plain(),
            data=self.text.report,
            init=self.identity.get("init"),
            eval_restart_used=self.restart,
            processes=self.accelerator.num_processes,
            precision=self.accelerator.mixed_precision,
            **_versions(self.accelerator.device),
        )

    def _log(self, kind: str, **values: Any) -> None:
        if self.log is not None:
            self.log.add(kind, step=self.step, time=round(self.seconds, 3), **values)

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _stopped(self, interrupt: Interrupt) -> int:
        """The signal that any process has seen, so that all stop after the same step."""
        if self.accelerator.num_processes == 1:
            return interrupt.signal
        seen = torch.tensor([interrupt.signal], device=self.accelerator.device)
        return int(self.accelerator.gather(seen).max())

    def _demand_finite(self, what: str, value: float, windows: Tensor, step: int) -> None:
        if math.isfinite(value):
            return
        every = self.accelerator.gather(windows)
        if not self.accelerator.is_main_process:
            self.accelerator.wait_for_everyone()
            raise TitansGraphError(f"step {step}: the {what} is {value}")
        report = {
            "step": step,
            "what": what,
            "value": value,
            "precision": self.accelerator.mixed_precision,
            "processes": self.accelerator.num_processes,
            **_versions(self.accelerator.device),
        }
        self.adamw.zero_grad()
        files = checkpoint.contents(self.model, self.adamw, self._progress(), self.states)
        error = replay.keep(self.out, self.model, files, every, report, self.accelerator.autocast)
        self.accelerator.wait_for_everyone()
        raise error


def _accelerator(config: TrainConfig) -> Accelerator:
    from accelerate import Accelerator

    # Without this, accelerate takes the processes that torchrun starts on a machine without a GPU for single ones.
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    bf16 = not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    precision = ("bf16" if bf16 else "no") if config.precision == "auto" else config.precision
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
    if config.batch % accelerator.num_processes:
        raise UsageError(f"batch {config.batch} does not divide over {accelerator.num_processes} processes")
    return accelerator


def _versions(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    try:
        package = version("titans-graph")
    except PackageNotFoundError:
        package = "not installed"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "package": package,
        "device": f"{device} ({name})",
    }
