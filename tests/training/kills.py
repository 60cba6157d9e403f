"""Kill a training run with SIGKILL again and again, go on each time, and compare with a run that nobody killed.

``python -m tests.training.kills --kills 60 --seed 1`` prints what happened as JSON; exit status 1 where anything differs.

Every victim is a process of its own that runs ``titans-graph train`` on a tiny model with a checkpoint every second step
(forked from one that imported torch before: starting Python costs more than the rest). It is killed in one of three ways,
drawn from the seed:

- ``time``: by this process, at a random time in a random one of its next dozen steps;
- ``write``: by itself, at a random one of the boundaries that :func:`titans_graph.training.atomic.boundary` marks: inside
  a save, or inside another atomic write;
- ``start``: by this process while it restores and opens its log.

After each kill the run's folder is examined: the newest undamaged checkpoint is at least as new as the last one that the
log speaks of. A run that is complete is compared with the reference, byte for byte, and the next one begins.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from titans_graph import cli
from titans_graph.training import atomic, checkpoint, logs

EVERY = 2
SIZES = ["dim=8", "layers=1", "heads=1", "hidden=4", "segment=8", "chunk=4"]
FORK = multiprocessing.get_context("forkserver")
WAYS = ("time", "time", "write", "write", "start")


def arguments(out: Path, text: Path, steps: int) -> list[str]:
    """``titans-graph train`` of the victims."""
    sizes = ["--steps", str(steps), "--batch", "2", "--length", "16", "--warmup", "2", "--eval-bytes", "64"]
    every = ["--checkpoint-every", str(EVERY), "--eval-every", "10", "--device", "cpu"]
    return ["train", "mac", "--set", *SIZES, "--data", str(text), "--out", str(out), *sizes, *every]


def victim(die_at: int, given: list[str]) -> None:
    """Train; at boundary number ``die_at`` (from 0; -1: never) die as ``kill -9`` would have it."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    logs._board = lambda folder, step: None  # two seconds to import
    passed = 0

    def boundary(name: str) -> None:
        nonlocal passed
        if passed == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        passed += 1

    atomic.boundary = boundary
    sys.exit(cli.main(given))


@dataclass
class Campaign:
    """Kills so far, by way; how many fell into a write of a checkpoint; completed runs; everything that was wrong."""

    folder: Path
    draw: random.Random
    steps: int
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WAYS, 0))
    in_a_save: int = 0
    repeated: int = 0
    runs: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def text(self) -> Path:
        """What the victims train on."""
        path = self.folder / "text.txt"
        if not path.is_file():
            path.write_bytes(b"the quick brown fox jumps over the lazy dog; " * 60)
        return path

    @property
    def fallen(self) -> int:
        """Kills of all kinds."""
        return sum(self.kills.values())

    def until(self, kills: int) -> None:
        """Go on until there were that many kills, then finish the run that was begun."""
        wanted = self.reference()
        while self.fallen < kills:
            out = self.folder / f"run{self.runs}"
            while self.fallen < kills and self.once(out):
                self.examine(out)
            if not self.finished(out):
                self.ended(self.spawn(out))
            if not self.finished(out) or self.outcome(out) != wanted:
                self.wrong.append(f"{out.name}: losses, validations or weights differ from those of the reference")
            self.runs += 1

    def reference(self) -> Any:
        """The outcome of a run that nobody kills."""
        out = self.folder / "reference"
        self.ended(self.spawn(out))
        return self.outcome(out)

    def once(self, out: Path) -> bool:
        """Start or resume the run and kill it; False where it was complete before the blow fell."""
        way = self.draw.choice(WAYS)
        # A resumed run passes 3 boundaries to write its log, a save about 18; so this reaches ten saves far.
        process = self.spawn(out, self.draw.randrange(200) if way == "write" else -1)
        if way == "time":
            wait_for(out, self.draw.randrange(12), process)
        if way != "write":
            time.sleep(self.draw.random() * (0.1 if way == "time" else 0.5))
            process.kill()
        if not self.ended(process):
            return False
        self.kills[way] += 1
        return True

    def spawn(self, out: Path, die_at: int = -1) -> BaseProcess:
        """A victim."""
        process = FORK.Process(target=victim, args=(die_at, arguments(out, self.text, self.steps)))
        process.start()
        return process

    def ended(self, process: BaseProcess) -> bool:
        """Wait for a victim's end; whether it was killed. Any other end but success is wrong."""
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            self.wrong.append(f"run{self.runs}: a victim ended with {process.exitcode}")
        return process.exitcode == -signal.SIGKILL

    def finished(self, out: Path) -> bool:
        """Whether the last step is in a checkpoint."""
        return (out / "checkpoints" / f"step-{self.steps:08d}").is_dir()

    def outcome(self, out: Path) -> Any:
        """All that must not depend on kills: losses, gradient norms, rates, validations, and the last weights and moments."""
        kept = ("kind", "step", "loss", "lr", "grad_norm", "bits_per_byte")
        records = [{k: r.get(k) for k in kept} for r in logs.read(out) if r["kind"] in ("train", "eval")]
        last = out / "checkpoints" / f"step-{self.steps:08d}"
        return records, *((last / f"{name}.safetensors").read_bytes() for name in ("weights", "optimizer"))

    def examine(self, out: Path) -> None:
        """What a kill left: nothing that the log calls written is lost."""
        folder = out / "checkpoints"
        left = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        self.in_a_save += any(name.startswith(".") for name in left)
        records = logs.read(out)
        saved = max((r["step"] for r in records if r["kind"] == "checkpoint"), default=0)
        found = checkpoint.newest(out, self.wrong.append)
        at = found.step if found else 0
        if at < saved:
            self.wrong.append(f"{out.name}: the log speaks of a checkpoint of step {saved}, the newest is of step {at}")
        self.repeated += max(0, max((r["step"] for r in records), default=0) - at)


def wait_for(out: Path, lines: int, process: BaseProcess) -> None:
    """Until the log of a victim has grown by so many lines from when it opened it, or the victim has ended."""
    log, opened = out / logs.FILE, time.time_ns()
    start = -1
    while process.is_alive():
        if log.is_file() and log.stat().st_mtime_ns > opened:
            now = log.read_bytes().count(b"\n")
            start = now if start < 0 else start
            if now >= start + lines:
                return
        time.sleep(0.005)


def run(kills: int, seed: int, steps: int) -> dict[str, Any]:
    """A campaign, and what came of it."""
    FORK.set_forkserver_preload(["titans_graph.cli.main", "titans_graph.training.loop", "accelerate"])
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), random.Random(seed), steps)
        campaign.until(kills)
    return {
        "kills": campaign.fallen,
        "ways": campaign.kills,
        "in a save": campaign.in_a_save,
        "runs": campaign.runs,
        "steps run again": campaign.repeated,
        "wrong": campaign.wrong,
    }


def main() -> int:
    """The campaign."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="steps of a run")
    options = parser.parse_args()
    found = run(options.kills, options.seed, options.steps)
    json.dump(found, sys.stdout, indent=1)
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
