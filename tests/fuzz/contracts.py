"""What must hold for any input whatever, one function for each kind of input. Any exception is a finding.

The contract: a reader gives its result or diagnostics, or raises an error under TitansGraphError. Every diagnostic of a
text has a place inside that text and prints, without control characters. What is called sound prints, reads back, and
can be built.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import titans_graph as tg
from titans_graph.cli.options import settings
from titans_graph.errors import Diagnostic, TitansGraphError
from titans_graph.ir.limits import MAX_DIAGNOSTICS
from titans_graph.kernels.memory_objectives import parse_objective
from titans_graph.kernels.network_ops import NetworkError
from titans_graph.kernels.networks import parse_network
from titans_graph.runtime import api
from titans_graph.spec import read, read_text, to_yaml

LONGEST_MESSAGE = 3000
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")

Outcome = str
"""In one word what became of an input, for the summary."""
Contract = Callable[[bytes, Path], Outcome]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def printable(message: str) -> None:
    """Assert that a message can be shown to anybody: bounded, encodable, nothing that a terminal would obey."""
    message.encode("utf-8")
    assert 0 < len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters"
    assert not _CONTROL.search(message), f"control characters in {message!r}"


def placed(found: Iterable[Diagnostic], text: str, file: str) -> list[Diagnostic]:
    """Assert that diagnostics print, are bounded, and stand inside the text."""
    found = list(found)
    assert len(found) <= MAX_DIAGNOSTICS + 1
    rows = _BREAK.split(text.removeprefix("\ufeff"))
    for problem in found:
        printable(problem.render())
        if problem.span is None:
            assert problem.message.endswith("more mistakes are not shown"), f"no place: {problem.render()}"
            continue
        span = problem.span
        assert span.file == file, span
        assert 1 <= span.line <= len(rows), f"{span} of {len(rows)} lines"
        assert 1 <= span.column <= len(rows[span.line - 1]) + 1, f"{span} in {rows[span.line - 1]!r}"
        assert span.width >= 1, span
    return found


def _text_of(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def spec(data: bytes, folder: Path) -> Outcome:
    """A spec file: read, checked, and where it is sound printed, read back and built."""
    path = folder / "fuzz.yaml"
    path.write_bytes(data)
    declared = read(path)
    placed(declared.diagnostics, _text_of(data), str(path))
    found = placed(api.check_declared(declared), _text_of(data), str(path))
    if any(p.severity == "error" for p in found):
        return "refused" if declared.graph is None else "diagnosed"
    assert declared.graph is not None
    assert declared.graph.text()
    _reads_back(declared.graph)
    return _built(declared.graph, zlib.crc32(data))


def _reads_back(graph: tg.Graph) -> None:
    assert tg.parse(graph.text()) == graph
    again = read_text(to_yaml(graph))
    assert not again.diagnostics, [p.render() for p in again.diagnostics]
    assert again.graph == graph


def _built(graph: tg.Graph, number: int) -> Outcome:
    """Build one sound graph in sixteen, and where it is small let it read."""
    if number % 16:
        return "sound"
    with torch.device("meta"):
        try:
            model = tg.build(graph)
            size = model.summary()
        except TitansGraphError as error:
            printable(str(error))
            return "not built"
    if size.parameters > 200_000 or size.state_bytes > 2_000_000 or len(model.compilation.nodes) > 80:
        return "built"
    if len(model.compilation.inputs) != 1 or model.compilation.period > 512:
        return "built"
    (kind,) = model.compilation.inputs.values()
    model = tg.build(graph)
    vocab = min(model._vocabulary() or 2, 1000)
    x = torch.randint(vocab, (1, 5)) if kind.dim is None else torch.randn(1, 5, kind.dim)
    with torch.no_grad():
        model(x)
    return "run"


def graph_text(data: bytes, folder: Path) -> Outcome:
    """A graph as text: parsed or refused with places; what is parsed prints, reads back and can be checked."""
    text = data.decode("utf-8", "surrogatepass") if _decodes(data) else _text_of(data)
    try:
        graph = tg.parse(text, "fuzz.txt")
    except tg.SpecError as error:
        _placed_in_lines(error.diagnostics, text)
        _require(bool(error.diagnostics), "an error without diagnostics")
        return "refused"
    assert tg.parse(graph.text()) == graph
    found = tg.check(graph)
    _placed_in_lines(found, text)
    if any(p.severity == "error" for p in found):
        return "diagnosed"
    _reads_back(graph)
    return _built(graph, zlib.crc32(data))


def _decodes(data: bytes) -> bool:
    try:
        data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


def _placed_in_lines(found: Iterable[Diagnostic], text: str) -> None:
    """Graph text knows one line end, so other ones count as characters."""
    placed(found, re.sub("[\r\x85\u2028\u2029]", " ", text), "fuzz.txt")


def _json(data: bytes) -> tuple[bool, Any]:
    """JSON as Python reads it, with its NaN, huge numbers and doubled keys."""
    try:
        return True, json.loads(data)
    except (ValueError, RecursionError):
        return False, None


def network(data: bytes, folder: Path) -> Outcome:
    """A memory network: as plain data, and as text; what is understood has shapes, a text, and reads back."""
    known, description = _json(data)
    outcomes = [_network(_text_of(data))]
    if known:
        outcomes.append(_network(description))
    return outcomes[-1]


def _network(description: Any) -> Outcome:
    try:
        found = parse_network(description)
    except NetworkError as error:
        printable(str(error))
        _require(all(isinstance(key, str) for key in error.path), f"path {error.path!r}")
        return "refused"
    assert parse_network(found.text()) == found
    hash(found)
    try:
        found.weights(12)
    except NetworkError as error:
        printable(str(error))
        return "misfit"
    return "understood"


def objective(data: bytes, folder: Path) -> Outcome:
    """A memory's objective, in the same two forms."""
    known, description = _json(data)
    outcome = _objective(_text_of(data))
    return _objective(description) if known else outcome


def _objective(description: Any) -> Outcome:
    try:
        found = parse_objective(description)
    except TitansGraphError as error:
        printable(str(error))
        return "refused"
    assert parse_objective(found.text()) == found
    hash(found)
    return "understood"


def setting(data: bytes, folder: Path) -> Outcome:
    """``--set`` on the command line, and the same value as keyword of a spec."""
    text = _text_of(data)
    try:
        values = settings([f"network={text}", "dim=16"])
    except TitansGraphError as error:
        printable(str(error).replace(text.strip(), ""))
        return "refused"
    declared = read("blocks/mac", **values)
    found = [*declared.diagnostics, *api.check_declared(declared)]
    for problem in found:
        printable(problem.render())
    return "diagnosed" if found else "sound"
