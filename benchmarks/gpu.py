"""The memory's Triton kernels on a GPU: checked, then timed, against targets and published anchors, in one command.

    PYTHONPATH=. python benchmarks/gpu.py --out DIR [--only KEY ..] [--again] [--seconds 460]

Needs torch and triton alone. Each row is first checked against the token-by-token recurrence in fp64 (outputs, final states,
all gradients); only a row that passes is timed: bf16, CUDA graphs, median of 25 runs, L2 flushed before each. Results go to
``DIR/gpu.json``, written anew after every row; a second start goes on where the first was cut and repeats what failed. Ends
with 0, 1 where a check failed, 2 where there is no GPU, 3 where time ran out before all rows were measured.

``--dry-run`` goes through every row's check at tiny sizes on the processor, in Triton's interpreter, in fp32.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

Result = dict[str, Any]


def machine() -> Result:
    """Device, driver, versions, and a hash of the kernels' sources."""
    import torch
    import triton

    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    sources = b"".join(p.read_bytes() for p in sorted((ROOT / "kernels").glob("*.py")))
    found["kernels"] = hashlib.sha256(sources).hexdigest()[:12]
    if not torch.cuda.is_available():
        return {**found, "device": f"none ({platform.machine()})"}
    p = torch.cuda.get_device_properties(0)
    found |= {"device": p.name, "memory_gb": round(p.total_memory / 2**30), "processors": p.multi_processor_count}
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0]
        found |= dict(zip(("driver", "clock"), (x.strip() for x in said.split(",")), strict=False))
    except (OSError, subprocess.CalledProcessError, IndexError):
        found["driver"] = "unknown"
    return found


class Log:
    """``DIR/gpu.json``: the machine and every finished row; replaced as a whole after each."""

    def __init__(self, folder: Path, about: Result, again: bool) -> None:
        self.path = folder / "gpu.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.content: Result = {"machine": about, "rows": {}}
        if not again and self.path.is_file():
            try:
                old = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError:
                old = {}
            if old.get("machine") == about:
                self.content = old
            elif old:
                print(f"{self.path} is of another machine or other kernels: measured anew")

    def __contains__(self, key: str) -> bool:
        return key in self.content["rows"]

    def __getitem__(self, key: str) -> Result:
        found: Result = self.content["rows"][key]
        return found

    def put(self, key: str, result: Result) -> None:
        """Add a row and write the file."""
        self.content["rows"][key] = result
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)


def measure_row(row: Any, dry: bool) -> Result:
    """Check a row, and time it where the check passes."""
    import torch

    from benchmarks import gpu_rows as rows

    small = replace(row, dim=16, hidden=32 if row.hidden else 0, chunk=16, heads=2, batch=2, tokens=32) if dry else row
    if dry:
        errors = rows.check(small, torch.float32, "cpu", tokens=32, lost=5, gradients=row.backward)
    else:
        errors = rows.check(row, torch.bfloat16, "cuda", tokens=3 * row.chunk, lost=row.chunk // 3, gradients=True)
    x = rows.make(small, torch.float32, "cpu") if dry else rows.make(row, torch.bfloat16, "cuda")
    errors["whole"] = rows.check_whole(small, x)
    bad = {name: error for name, error in errors.items() if not error <= rows.BARS[name]}
    result: Result = {"title": row.title, "errors": errors, "failed": sorted(bad)}
    if bad or dry:
        return result
    if row.backward:
        x = x.to()
    run = rows.runner(row, x)
    run()
    result["bytes_per_head_token"] = rows.peak_memory(run) / row.head_tokens
    replay, note = rows.graphed(run)
    times = rows.milliseconds(replay)
    ms = statistics.median(times)
    result |= {"ms": ms, "ms_least": min(times), "ms_most": max(times), "note": note}
    result["rate"] = row.head_tokens / ms / 1e3
    result["tflops"] = row.head_tokens * row.operations / ms / 1e9
    result["kernels_us"] = rows.kernel_times(run)
    value = ms if row.unit == "ms" else result["rate"]
    return result | judged(value, row.unit, row.target, row.stretch, row.anchor)


def judged(value: float, unit: str, target: float, stretch: float, anchor: str) -> Result:
    """A measured value beside what was aimed at."""
    met = [value <= aim if unit == "ms" else value >= aim for aim in (target, stretch)]
    verdict = "stretch met" if all(met) else "met" if met[0] else f"MISSED by {max(value / target, target / value):.2f} x"
    return {"value": value, "unit": unit, "target": target, "stretch": stretch, "verdict": verdict, "anchor": anchor}


def measure_peak(dry: bool) -> Result:
    """The rate of the card's own matrix products."""
    if dry:
        return {"title": "bf16 matrix products of this run", "failed": []}
    from benchmarks import gpu_rows as rows

    return {"title": "bf16 matrix products of this run", "failed": [], "tflops": rows.matmul_peak() / 1e12}


def jobs() -> dict[str, Callable[[bool], Result]]:
    """Every line of the table by its key."""
    from benchmarks import gpu_peers, gpu_rows

    found: dict[str, Callable[[bool], Result]] = {"peak": measure_peak}
    for row in gpu_rows.ROWS:
        found[row.key] = partial(measure_row, row)
    return found | gpu_peers.JOBS


def line(key: str, r: Result, peak: float) -> str:
    """One line of the table."""
    if r["failed"]:
        worst = ", ".join(f"{name} {r['errors'][name]:.2g}" for name in r["failed"])
        return f"{r['title']:<54} CHECK FAILED: {worst}"
    if key == "peak":
        return f"{r['title']:<54} " + (f"{r['tflops']:.0f} TFLOP/s" if "tflops" in r else "not measured")
    if "value" not in r:
        return f"{r['title']:<54} {r.get('note') or 'checked, not measured'}"
    share = f"{100 * r['tflops'] / peak:5.1f} %" if peak and "tflops" in r else ""
    memory = f"{r['bytes_per_head_token']:7.0f} B" if "bytes_per_head_token" in r else ""
    aim = f"{'<=' if r['unit'] == 'ms' else '>='} {r['target']:g} ({r['stretch']:g})"
    value = f"{r['value']:9.3f} {r['unit']:<4}"
    said = f"{r['verdict']}  [{r['anchor']}] {r.get('note', '')}".rstrip()
    return f"{r['title']:<54} {value} {share:>8} {memory:>10}  {aim:<14} {said}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where gpu.json is written")
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY", help="these rows")
    parser.add_argument("--again", action="store_true", help="measure rows that are in gpu.json too")
    parser.add_argument("--seconds", type=float, default=460, help="no row is begun after that")
    parser.add_argument("--dry-run", action="store_true", help="the checks alone, tiny, on the processor")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("error: no GPU; --dry-run goes through the checks on the processor", file=sys.stderr)
        return 2
    todo = jobs()
    unknown = sorted(set(options.only) - set(todo))
    if unknown:
        parser.error(f"no row {unknown[0]!r}; there are: {', '.join(todo)}")
    log = Log(options.out, machine() | ({"dry_run": True} if options.dry_run else {}), options.again)
    print(json.dumps(log.content["machine"]), flush=True)
    chosen = {key: job for key, job in todo.items() if not options.only or key in options.only}
    return measure(chosen, log, options.dry_run, begun + options.seconds)


def measure(todo: Mapping[str, Callable[[bool], Result]], log: Log, dry: bool, until: float) -> int:
    """Do the jobs that the log has not, what failed before last: it may fail again and take the others with it."""
    keys = sorted(todo, key=lambda key: key in log and key != "peak" and bool(log[key]["failed"]))
    failed, cut = [], []
    for place, key in enumerate(keys):
        if key not in log or log[key]["failed"]:
            if time.monotonic() > until:
                cut.append(key)
                continue
            start = time.monotonic()
            log.put(key, {**attempted(todo[key], dry), "seconds": round(time.monotonic() - start, 1)})
        peak = log["peak"].get("tflops", 0.0) if "peak" in log else 0.0
        print(line(key, log[key], peak), flush=True)
        failed += [key] if log[key]["failed"] else []
        if log[key]["failed"] == ["raised"] and not dry and not alive():
            left = ", ".join(keys[place + 1 :]) or "no other row"
            print(f"the GPU answers this process no more; not measured: {left}: the same command again goes on")
            return 1
    if cut:
        print(f"time ran out before {', '.join(cut)}: the same command again goes on")
    return 1 if failed else 3 if cut else 0


def alive() -> bool:
    """Whether the GPU still answers: after an error inside a kernel no other call of the process succeeds."""
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:  # the error of the kernel again, whose class differs between torch versions
        return False
    return True


def attempted(job: Callable[[bool], Result], dry: bool) -> Result:
    """A job's result; what it raises is a failed check, so that the other rows are still measured."""
    try:
        return job(dry)
    except Exception as error:  # out of memory, a kernel that cannot be launched
        import traceback

        traceback.print_exc()
        said = f"{type(error).__name__}: {str(error)[:500]}"
        return {"title": said, "failed": ["raised"], "errors": {"raised": float("inf")}}


if __name__ == "__main__":
    sys.exit(main())
