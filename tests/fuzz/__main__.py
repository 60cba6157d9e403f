"""``python -m tests.fuzz TARGET``: try many inputs on one reader, going on where the last call ended.

    python -m tests.fuzz spec --count 200000              # until 200,000 inputs were tried, in as many calls as you like
    python -m tests.fuzz spec --count 200000 --minutes 5  # or for five minutes
    python -m tests.fuzz spec --show 1234                 # the input of that number, on stdout

Progress and findings are kept under ``--store`` (default ``.fuzz/``): a finding as the input, made small, and its
traceback. What is mended moves to ``tests/fuzz/findings/TARGET/``, where CI tries it again. Ends with 1 where anything
was found.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from tests.fuzz import campaign

AT_ONCE = 500
SECONDS = 30.0
"""Half the longest time of one input: only the second ring of the clock ends it."""


def main() -> int:
    """Run a campaign, or a part of one."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, formatter_class=_Raw)
    parser.add_argument("target", choices=sorted(campaign.TARGETS))
    parser.add_argument("--count", type=int, default=200_000, help="inputs to have tried in the end (default: 200000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another campaign (default: 0)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after that long; the next call goes on")
    parser.add_argument("--store", type=Path, default=Path(".fuzz"), help="where progress and findings are kept")
    parser.add_argument("--show", type=int, metavar="NUMBER", help="write the input of that number to stdout, try nothing")
    options = parser.parse_args()
    target = campaign.TARGETS[options.target]
    if options.show is not None:
        sys.stdout.buffer.write(target.input(options.seed, options.show))
        return 0
    return _Campaign(target, options).go()


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


class _Campaign:
    def __init__(self, target: campaign.Target, options: argparse.Namespace) -> None:
        self.target, self.options = target, options
        self.folder: Path = options.store
        self.file = self.folder / f"{target.name}.{options.seed}.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        known = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.tried: int = known.get("tried", 0)
        self.outcomes = Counter(known.get("outcomes", {}))
        self.findings: list[str] = known.get("findings", [])

    def go(self) -> int:
        """Try inputs until there were enough, or the time is over."""
        torch.set_num_threads(1)
        until = time.monotonic() + 60 * self.options.minutes
        with tempfile.TemporaryDirectory() as scratch:
            while self.tried < self.options.count and time.monotonic() < until:
                numbers = range(self.tried, min(self.options.count, self.tried + AT_ONCE))
                guard = functools.partial(campaign.alarm, SECONDS)
                report = campaign.run(self.target, self.options.seed, numbers, Path(scratch), guard)
                for key, (number, data, trace) in report.findings.items():
                    self.keep(key, number, data, trace, Path(scratch))
                self.tried += report.tried
                self.outcomes += report.outcomes
                self.save()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        what = ", ".join(f"{n} {name}" for name, n in self.outcomes.most_common())
        print(f"{self.target.name}, seed {self.options.seed}: {self.tried} inputs: {what}; most memory {memory} MB")
        for key in self.findings:
            print(f"  found: {key}")
        return 1 if self.findings else 0

    def keep(self, key: str, number: int, data: bytes, trace: str, scratch: Path) -> None:
        """Write one finding down, made small, unless it is known."""
        if key in self.findings:
            return
        self.findings.append(key)

        def same(smaller: bytes) -> bool:
            guard = functools.partial(campaign.alarm, SECONDS)
            return campaign.attempt(self.target.contract, smaller, scratch, guard)[1] == key

        small = data if key.startswith("TooLong") else campaign.shrink(data, same)
        name = f"{self.target.name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        (self.folder / f"{name}.input").write_bytes(small)
        text = f"{key}\ninput {number} of seed {self.options.seed}\n{trace}"
        (self.folder / f"{name}.txt").write_text(text, encoding="utf-8", errors="replace")
        print(f"input {number}: {key} ({len(small)} bytes)", flush=True)

    def save(self) -> None:
        """Progress, so that the next call goes on here."""
        content = {"tried": self.tried, "outcomes": self.outcomes, "findings": self.findings}
        temporary = self.file.with_suffix(".new")
        temporary.write_text(json.dumps(content))
        temporary.replace(self.file)


if __name__ == "__main__":
    sys.exit(main())
