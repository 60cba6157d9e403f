"""What every test stands on: hypothesis profiles, one thread, fixed seeds, torch's global state, golden files.

Environment: ``HYPOTHESIS_PROFILE`` is ``dev`` (new examples each run), ``ci`` (few, always the same; chosen by itself
where ``CI`` is set) or ``nightly`` (many).
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

# Set before torch starts its pools: the test processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

# Without a GPU Triton kernels are tested in its interpreter; triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No deadline and no complaint about slow examples: a busy machine is not a bug.
COMMON = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", COMMON, max_examples=50)
settings.register_profile("ci", COMMON, max_examples=25, derandomize=True, database=None)
settings.register_profile("nightly", COMMON, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--update-golden``."""
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is marked by place; the quick whole-project tests come first, compiling ones last."""
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker("golden")
        if ROOT / "tests" / "properties" in item.path.parents:
            item.add_marker("properties")

    def rank(item: pytest.Item) -> int:
        if item.path.name in ("test_imports.py", "test_house.py"):
            return 0
        return 2 if item.get_closest_marker("compile") else 1

    items.sort(key=rank)


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    """Start every test with the same seeds, and put torch's global switches back after it."""
    random.seed(0)
    torch.manual_seed(0)
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    if torch.are_deterministic_algorithms_enabled():  # the setter imports a good part of torch.compile
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with a golden file, named from the project's root; ``make golden`` writes the files anew."""

    def compare(name: str, text: str) -> None:
        path = ROOT / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
            return
        if not path.is_file():
            pytest.fail(f"{name} does not exist: run `make golden`")
        assert text == path.read_text(encoding="utf-8"), f"{name} differs: fix the code, or run `make golden`"

    return compare


@pytest.fixture(scope="session")
def project_files() -> list[str]:
    """Every file of the checkout that git tracks or would track, links included, as ``folder/name`` from the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    # A file may be deleted and the deletion not committed yet.
    return sorted(name for name in set(listed.split("\0")) if name and os.path.lexists(ROOT / name))
