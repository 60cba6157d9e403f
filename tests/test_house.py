"""The house rules that no linter checks: sizes, the folders without ``__init__.py``, nothing about one machine."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LIMIT = 400
HARD_LIMIT = 500
# Files between the two limits, each with its reason.
LONG: dict[str, str] = {}

CODE = ("titans_graph/", "components/", "kernels/", "specs/", "tests/", "benchmarks/")
BARE = ("components", "kernels", "specs")

# Put together here so that this file does not name them itself.
PRIVATE_PLACES = ("/" + "work/", ".." + "/shared")


def text_of(name: str) -> str | None:
    """The text of a file, or None for links and binary files."""
    path = ROOT / name
    if path.is_symlink() or not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def test_files_are_short(project_files: list[str]) -> None:
    long = []
    for name in project_files:
        if not name.startswith(CODE) or not name.endswith((".py", ".yaml")):
            continue
        count = len((text_of(name) or "").splitlines())
        if count > (HARD_LIMIT if name in LONG else LIMIT):
            long.append(f"{name}: {count} lines")
    assert not long, f"longer than {LIMIT} lines:\n" + "\n".join(long)


def test_long_list_is_current() -> None:
    gone = [name for name in LONG if len((text_of(name) or "").splitlines()) <= LIMIT]
    assert not gone, f"no longer long, or no longer there: {gone}"


@pytest.mark.parametrize("folder", BARE)
def test_no_importable_top_level_folder(folder: str) -> None:
    """A ``kernels/__init__.py`` on the path hides the PyPI package of that name, and importing transformers fails."""
    found = sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("__init__.py"))
    assert not found, f"{folder} is imported as titans_graph.{folder} and has no __init__.py: {found}"


@pytest.mark.parametrize("folder", BARE)
def test_linked_into_the_package(folder: str) -> None:
    link = ROOT / "titans_graph" / folder
    if not link.is_symlink():
        pytest.skip("this checkout has no links")
    assert link.readlink() == Path("..") / folder


def test_nothing_about_one_machine(project_files: list[str]) -> None:
    found = [
        f"{name}:{number}: {place}"
        for name in project_files
        for number, line in enumerate((text_of(name) or "").splitlines(), 1)
        for place in PRIVATE_PLACES
        if place in line
    ]
    assert not found, "paths of somebody's machine:\n" + "\n".join(found)
