"""The documentation is true: its Python runs, its links and names lead somewhere, and what is generated is fresh.

Markers in the documents, each on a line of its own before a fenced block or around a part:

- ``<!-- file: NAME -->``          the block is written to NAME in the folder that the document's examples run in;
- ``<!-- output: titans-graph ... -->``  the block is what the command prints; `make golden` writes it anew;
- ``<!-- nightly: why -->``        the Python block takes long and runs under `make nightly` only;
- ``<!-- components -->`` ... ``<!-- /components -->`` and the same with ``api``, ``errors`` and ``defects``: generated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.api import api
from tests.test_imports import LAYERS
from titans_graph import errors, registry
from titans_graph.cli import main
from titans_graph.registry import TABLE, lookup, parameter_types

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]

FENCE = re.compile(
    r"^(?:<!-- (?P<mark>\w+): (?P<what>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE
)
LINK = re.compile(r"\[[^\]\[]*\]\((?P<target>[^)\s]+)\)")
PATH = re.compile(r"(?:tests|kernels|components|specs|titans_graph)/[\w/.-]*\.(?:py|yaml)(?:::test_\w+)?")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[dict[str, str]]:
    """The fenced blocks of a document: ``mark``, ``what``, ``language``, ``body``."""
    return [{k: v or "" for k, v in found.groupdict().items()} for found in FENCE.finditer(text)]


def write_files(text: str, folder: Path) -> None:
    for block in blocks(text):
        if block["mark"] == "file":
            (folder / block["what"]).write_text(block["body"], encoding="utf-8")


def run_python(name: str, marks: tuple[str, ...]) -> int:
    """Run the Python blocks of a document in one namespace; lines of an error are those of the document."""
    text, space, count = text_of(name), dict[str, Any](__name__="__docs__"), 0
    for found in FENCE.finditer(text):
        if found["language"] == "python" and (found["mark"] or "") in marks:
            above = text.count("\n", 0, found.start("body"))
            exec(compile("\n" * above + found["body"], name, "exec", dont_inherit=True), space)
            count += 1
    return count


@pytest.mark.parametrize("name", DOCUMENTS)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_REGISTERED", {})
    write_files(text_of(name), tmp_path)
    run_python(name, ("", "file"))
    registry.lookup.cache_clear()


@pytest.mark.nightly
@pytest.mark.compile
@pytest.mark.parametrize("name", [name for name in DOCUMENTS if "<!-- nightly: " in text_of(name)])
def test_long_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(text_of(name), tmp_path)
    assert run_python(name, ("", "file", "nightly"))


def anchors(text: str) -> set[str]:
    """The anchors that headings get on common hosting sites."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    lost = []
    for found in LINK.finditer(FENCE.sub("", text_of(name))):
        target, _, anchor = found["target"].partition("#")
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path = (ROOT / name).parent / target if target else ROOT / name
        known = anchors(path.read_text("utf-8")) if path.suffix == ".md" and path.is_file() else {anchor}
        if not path.exists() or (anchor and anchor not in known):
            lost.append(found["target"])
    assert not lost


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_files_and_tests_exist(name: str) -> None:
    lost = []
    for mention in sorted(set(PATH.findall(text_of(name)))):
        path, _, test = mention.partition("::")
        if not (ROOT / path).is_file() or (test and f"def {test}(" not in text_of(path)):
            lost.append(mention)
    assert not lost


def test_the_order_of_modules_is_the_one_that_is_checked() -> None:
    for name in ("CONTRIBUTING.md", "docs/architecture.md"):
        (found,) = re.findall(r"^    errors -> .*\n(?:        -> .*\n)*", text_of(name), re.MULTILINE)
        rows = [re.findall(r"\w+", row) for row in found.split("->")]
        assert [set(row) for row in rows] == [set(row) - {"hf", "__main__"} for row in LAYERS], name


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_marker_is_known(name: str) -> None:
    marks = set(re.findall(r"<!-- /?(\w+)", text_of(name)))
    assert marks <= {"file", "output", "nightly", *GENERATED}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_generated_parts_are_fresh(
    name: str, golden: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = text_of(name)
    write_files(text, tmp_path)
    golden(name, refreshed(text))


def refreshed(text: str) -> str:
    """A document with its generated parts made anew."""
    for word, make in GENERATED.items():
        pattern = re.compile(rf"(<!-- {word} -->\n).*?(<!-- /{word} -->)", re.DOTALL)
        text = pattern.sub(lambda found, make=make: f"{found[1]}\n{make()}\n{found[2]}", text)  # type: ignore[misc]
    return FENCE.sub(_printed, text)


def _printed(found: re.Match[str]) -> str:
    if found["mark"] != "output":
        return found[0]
    program, *arguments = shlex.split(found["what"])
    assert program == "titans-graph"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        main(arguments)
    return f"<!-- output: {found['what']} -->\n```{found['language']}\n{printed.getvalue().strip()}\n```"


def cell(text: str) -> str:
    """A text as a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


@functools.cache
def components() -> str:
    """Every registered component with its ports and parameters."""
    return "\n".join(component(name) for name in sorted(TABLE))


def component(name: str) -> str:
    cls = lookup(name)
    lines = [f"### {name}", "", cell((cls.__doc__ or "").split("\n\n")[0]).replace("``", "`"), ""]
    lines += ["| port | takes or gives | |", "|---|---|---|"]
    for port in cls.inputs:
        kind = port.accepts + (", a list" if port.many else "") + ("" if port.required else ", optional")
        lines.append(f"| `{port.name}` | in: {kind} | {cell(port.doc)} |")
    lines += [f"| `{port.name}` | out | {cell(port.doc)} |" for port in cls.outputs]
    fields = dataclasses.fields(cls.Parameters)
    if fields:
        lines += ["", "| parameter | type | default | means | reason for the default |", "|---|---|---|---|---|"]
        lines += [parameter_row(cls.Parameters, field) for field in fields]
    return "\n".join([*lines, ""])


def parameter_row(parameters: type, field: dataclasses.Field[Any]) -> str:
    meta = field.metadata
    default = "(required)" if field.default is dataclasses.MISSING else f"`{shown(field.default)}`"
    hint = parameter_types(parameters)[field.name]
    kind = " or ".join(sorted(words(hint))) if not meta["choices"] else ", ".join(map(str, meta["choices"]))
    low, high = meta["minimum"], meta["maximum"]
    bounds = (f", at least {low:g}" if low is not None else "") + (f", at most {high:g}" if high is not None else "")
    return f"| `{field.name}` | {kind}{bounds} | {cell(default)} | {cell(meta['doc'])} | {cell(meta['reason'])} |"


def words(hint: Any) -> set[str]:
    """The types of a parameter for readers of YAML."""
    known = {int: "whole number", float: "number", bool: "true/false", str: "word", type(None): "null"}
    options = getattr(hint, "__args__", None)
    if hint in known:
        return {known[hint]}
    if options is None or "Mapping" in str(getattr(hint, "__origin__", "")):
        return {"mapping"}
    return {word for option in options for word in words(option)}


def shown(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


def error_table() -> str:
    """The catalogue of diagnostics."""
    lines = ["| class | severity | means |", "|---|---|---|"]
    for cls in errors.Diagnostic.__subclasses__():
        if cls.__module__ == errors.__name__:
            lines.append(f"| `{cls.__name__}` | {cls.severity} | {cell(cls.__doc__ or '').replace('``', '`')} |")
    return "\n".join([*lines, ""])


def defect_tables() -> str:
    """Laws and deliberate defects; they import much, and one document has them."""
    from tests.properties.table import tables

    return tables()


GENERATED: dict[str, Callable[[], str]] = {
    "api": lambda: f"\n{api()}",
    "components": components,
    "errors": error_table,
    "defects": defect_tables,
}
