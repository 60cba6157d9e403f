"""What is installed is what is in the checkout, however the checkout came about.

setuptools leaves out without a word a package that pyproject.toml does not list, so the wheel is compared with git's
list of files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("components", "kernels", "specs")
PACKAGED = ("titans_graph", *LINKED)


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def installed_name(name: str) -> str:
    """Where a file of the checkout lies in an installation."""
    return name if name.startswith("titans_graph/") else f"titans_graph/{name}"


def packaged(files: list[str]) -> list[str]:
    """The files that belong into the wheel; links into the package are not files of their own."""
    return [n for n in files if n.split("/")[0] in PACKAGED and "/" in n and not (ROOT / n).is_symlink()]


def copy_checkout(files: list[str], target: Path, *, links: str = "kept") -> Path:
    """Copy what git lists. ``links`` are ``kept``, ``lost`` (a zip), or became ``text`` (Git on Windows)."""
    for name in files:
        source, copy = ROOT / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not source.is_symlink():
            shutil.copy2(source, copy)
        elif links == "kept":
            copy.symlink_to(source.readlink())
        elif links == "text":
            copy.write_text(str(source.readlink()), encoding="utf-8")
    return target


def run_python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Run this Python away from the checkout's own settings; what it printed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COVERAGE", "PYTEST"))}
    if path is not None:
        kept["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=kept, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"python {arguments} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def test_every_folder_is_a_listed_package(project_files: list[str]) -> None:
    folders = {str(Path(installed_name(name)).parent).replace("/", ".") for name in packaged(project_files)}
    listed = set(pyproject()["tool"]["setuptools"]["packages"])
    problems = [f"{p}: not in `packages` of pyproject.toml" for p in sorted(folders - listed)]
    problems += [f"{p}: in `packages` of pyproject.toml, but holds no file" for p in sorted(listed - folders)]
    assert not problems, "\n".join(problems)


def test_the_wheel_holds_every_file_and_no_other(project_files: list[str], tmp_path: Path) -> None:
    checkout = copy_checkout(project_files, tmp_path / "checkout")
    run_python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), cwd=checkout)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    held = sorted(n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n)
    wanted = sorted(installed_name(name) for name in packaged(project_files))
    missing, extra = sorted(set(wanted) - set(held)), sorted(set(held) - set(wanted))
    assert held == wanted, f"missing in the wheel: {missing}\nonly in the wheel: {extra}"


PROBE = """
import importlib.util, json, sys
import titans_graph, titans_graph.components, titans_graph.kernels, titans_graph.specs
found = {name: importlib.util.find_spec(name).origin for name in sys.argv[1:]}
folders = {name: list(sys.modules[f"titans_graph.{name}"].__path__) for name in ("components", "kernels", "specs")}
bare = {name: getattr(importlib.util.find_spec(name), "origin", None) for name in ("components", "kernels")}
print(json.dumps([titans_graph.__file__, folders, found, bare]))
"""


@pytest.mark.parametrize("links", ["kept", "lost", "text"])
def test_a_checkout_works_without_installation(project_files: list[str], tmp_path: Path, links: str) -> None:
    checkout = copy_checkout(project_files, tmp_path / "checkout", links=links).resolve()
    for folder in LINKED:  # git keeps no empty folder
        (checkout / folder).mkdir(exist_ok=True)
    sources = {
        f"titans_graph.{name.removesuffix('.py').replace('/', '.')}": checkout / name
        for name in packaged(project_files)
        if name.startswith(("components/", "kernels/")) and name.endswith(".py")
    }
    home, folders, found, bare = json.loads(run_python("-c", PROBE, *sources, cwd=tmp_path, path=checkout))
    assert Path(home) == checkout / "titans_graph" / "__init__.py"
    for folder in LINKED:
        assert {Path(p).resolve() for p in folders[folder]} == {checkout / folder}
    assert {name: Path(origin).resolve() for name, origin in found.items()} == sources
    # Found or not, the bare names must not lead to modules of this project.
    assert not any(str(checkout) in (origin or "") for origin in bare.values())


def test_every_dependency_is_pinned() -> None:
    project = pyproject()["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {normal(d) for d in wanted} - {normal(project["name"])}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {normal(line) for line in lines if line and not line.startswith("#")}
    assert names <= pins, f"not in constraints.txt: {sorted(names - pins)}"


def normal(requirement: str) -> str:
    """The project name of a requirement, as indexes compare it."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def test_versions_agree() -> None:
    text = (ROOT / "titans_graph" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{pyproject()["project"]["version"]}"' in text
