"""A few hundred inputs for every reader in CI, 200,000 specs in the nightly run, and again all that was ever found."""

from __future__ import annotations

import datetime
import functools
import signal
from pathlib import Path

import pytest

from tests.fuzz import campaign, contracts
from tests.fuzz.campaign import TARGETS

FINDINGS = Path(__file__).parent / "findings"
FEW = {"spec": 250, "graph": 250, "setting": 100}
MANY = {"spec": 200_000, "graph": 100_000, "network": 100_000, "objective": 50_000, "setting": 20_000}
AT_ONCE = 5_000
PARTS = [(name, part) for name in TARGETS for part in range(MANY.get(name, 20_000) // AT_ONCE)]
MOST_CALLS = 5_000_000
"""Python calls of the longest input; a shipped spec takes about 100,000."""
FOUND = sorted(p for p in FINDINGS.rglob("*") if p.is_file())


@pytest.mark.parametrize("path", FOUND, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_what_was_found_is_mended(path: Path, tmp_path: Path) -> None:
    guard = functools.partial(campaign.steps, MOST_CALLS)
    with guard():
        TARGETS[path.parent.name].contract(path.read_bytes(), tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_inputs(name: str, tmp_path: Path) -> None:
    guard = functools.partial(campaign.steps, MOST_CALLS)
    report = campaign.run(TARGETS[name], 0, range(FEW.get(name, 400)), tmp_path, guard)
    assert not report.findings, report.text()
    assert len(report.outcomes) > 1, "inputs that are all alike test nothing"


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "part"), PARTS)
def test_many_inputs(name: str, part: int, tmp_path: Path) -> None:
    """Other inputs every day; the seed is in the message."""
    seed = datetime.date.today().toordinal()
    numbers = range(part * AT_ONCE, (part + 1) * AT_ONCE)
    report = campaign.run(TARGETS[name], seed, numbers, tmp_path, functools.partial(campaign.alarm, 60.0))
    assert not report.findings, f"seed {seed}\n{report.text()}"


def test_an_input_that_takes_too_long_is_a_finding(tmp_path: Path) -> None:
    def endless(data: bytes, folder: Path) -> str:
        while True:
            len(str(data))
            folder.exists()

    guard = functools.partial(campaign.steps, 1000)
    assert campaign.attempt(endless, b"", tmp_path, guard)[1].startswith("TooLong")


def test_the_clock_of_a_suspended_machine_is_no_finding(tmp_path: Path) -> None:
    def rings(times: int) -> contracts.Contract:
        def contract(data: bytes, folder: Path) -> str:
            for _ in range(times):
                signal.raise_signal(signal.SIGALRM)
            return "done"

        return contract

    guard = functools.partial(campaign.alarm, 1000.0)
    assert campaign.attempt(rings(1), b"", tmp_path, guard)[0] == "done"
    assert campaign.attempt(rings(2), b"", tmp_path, guard)[1].startswith("TooLong")


def test_a_finding_is_made_small() -> None:
    assert campaign.shrink(b"a lot of text (with this) and more", lambda data: b"(" in data and b")" in data) == b"()"
