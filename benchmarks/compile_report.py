"""Compile shipped specs from a cold cache, each in a process of its own, and count graph breaks and recompiles.

    python benchmarks/compile_report.py [--specs mac mag] [--layers 4] [--training]

Seconds are wall-clock for the warm-up: one-token and longer calls without gradients, or, with ``--training``, a longer call
forward and backward. Torch's own start-up and precompiled headers are included, because the cache is empty. Writes
``benchmarks/results/compile.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/compile.json"
LENGTHS = (1, 7, 64, 65, 1000)


def measure(name: str, layers: int, training: bool) -> dict[str, Any]:
    """Build, warm up, run all lengths; counters and seconds of one spec in this process."""
    import torch

    import titans_graph as tg

    fast = tg.load(name, layers=layers).compile()
    start = time.perf_counter()
    fast.warm_up(2, training=training)
    seconds = time.perf_counter() - start
    with torch.set_grad_enabled(training):
        for tokens in (*LENGTHS, *reversed(LENGTHS)):
            fast(torch.zeros(2, tokens, dtype=torch.int64))
    report = fast.report()
    print(report.text(), file=sys.stderr)
    return {
        "spec": name,
        "layers": layers,
        "training": training,
        "seconds": round(seconds, 1),
        "functions": len(report.functions),
        "variants": report.variants,
        "breaks": report.breaks,
        "recompiles": report.recompiles,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Run every spec in a fresh process with an empty cache, and collect the results."""
    from titans_graph.spec import shipped

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--specs", nargs="*", default=[n for n in shipped() if "/" not in n])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measure(options.specs[0], options.layers, options.training)))
        return
    rows = json.loads(RESULT.read_text()) if RESULT.is_file() else []
    for name in options.specs:
        with tempfile.TemporaryDirectory() as cache:
            flags = ["--training"] if options.training else []
            command = [sys.executable, __file__, "--inside", "--specs", name, "--layers", str(options.layers), *flags]
            # Precompiled headers lie in the default cache, under the folder for temporary files, whatever the cache is.
            environment = {**os.environ, "TMPDIR": cache, "PYTHONPATH": str(ROOT)}
            environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
            row = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
        key = ("spec", "layers", "training")
        rows = [r for r in rows if [r[k] for k in key] != [row[k] for k in key]] + [row]
        print(json.dumps(row), flush=True)
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
