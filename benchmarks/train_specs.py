"""Train every shipped language model for the same steps on the same text, and compare with what counting achieves.

    python benchmarks/train_specs.py --out runs/specs

An interrupted run goes on where it stopped. Writes ``benchmarks/results/train_specs.json`` and ``docs/figures/specs.png``.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

import titans_graph as tg
from titans_graph.spec import shipped
from titans_graph.tasks.floors import floors
from titans_graph.tasks.text import load
from titans_graph.training import figures, logs
from titans_graph.training.config import TrainConfig
from titans_graph.training.loop import train

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS: dict[str, Any] = {"dim": 64, "layers": 2, "hidden": 32}
CONFIG = TrainConfig(
    steps=300,
    batch=8,
    length=256,
    learning_rate=2e-3,
    warmup=30,
    eval_every=50,
    eval_bytes=16384,
    eval_restart=256,
    checkpoint_every=50,
)


def main() -> None:
    """Train, print a table, write results and curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/specs"))
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = load(options.data)
    floor = floors(text.train, text.stretch(CONFIG.eval_bytes))
    rows: list[dict[str, Any]] = []
    records = {}
    for name in (n for n in shipped() if "/" not in n):
        torch.manual_seed(CONFIG.seed)
        chosen = {k: v for k, v in PARAMETERS.items() if not (k == "hidden" and name == "transformer")}
        model = tg.load(name, **chosen)
        result = train(model, text, CONFIG, options.out / name)
        if result.signal:
            return
        records[name] = logs.read(options.out / name)
        speed = median(r["tokens_per_s"] for r in records[name] if r["kind"] == "train")
        size = model.summary()
        rows.append({"spec": name, "bits_per_byte": result.bits_per_byte, "bytes_per_second": speed, **asdict(size)})
        print(json.dumps(rows[-1]), flush=True)
    found = {
        "config": CONFIG.plain(),
        "parameters": PARAMETERS,
        "text": text.name,
        "floors": asdict(floor),
        "machine": f"{platform.machine()}, {options.threads} thread(s)",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": rows,
    }
    for folder in ("benchmarks/results", "docs/figures"):
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
    (ROOT / "benchmarks/results/train_specs.json").write_text(json.dumps(found, indent=1) + "\n")
    shown = {"bigram": floor.bigram, "bzip2": floor.bzip2}
    figures.loss_curves(ROOT / "docs/figures/specs.png", records, shown, f"{CONFIG.steps} steps on the {text.name}")


if __name__ == "__main__":
    main()
