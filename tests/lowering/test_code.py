"""The generated code and the printed graph of every shipped spec, held in golden files (``make golden`` renews them)."""

from __future__ import annotations

import ast
from collections.abc import Callable

import pytest

import titans_graph as tg
from tests.models import ALL
from titans_graph.viz import dot, mermaid


@pytest.mark.parametrize("name", ALL)
def test_the_generated_code_is_as_recorded(name: str, golden: Callable[[str, str], None]) -> None:
    text = tg.compilation(name).lowered.text()
    ast.parse(text)
    golden(f"tests/golden/{name}.code.txt", text)


@pytest.mark.parametrize("name", ALL)
def test_the_printed_graph_is_as_recorded_and_reads_back(name: str, golden: Callable[[str, str], None]) -> None:
    graph = tg.graph(name)
    golden(f"tests/golden/{name}.graph.txt", graph.text())
    assert tg.parse(graph.text()) == graph


def test_pictures_are_as_recorded(golden: Callable[[str, str], None]) -> None:
    graph = tg.graph("mac")
    golden("tests/golden/mac.mermaid.txt", mermaid(graph))
    golden("tests/golden/mac.dot.txt", dot(graph))


@pytest.mark.parametrize("name", ALL)
def test_pictures_show_every_node_and_dash_feedback(name: str) -> None:
    graph = tg.graph(name)
    text = mermaid(graph)
    for block in (graph.main, *graph.blocks.values()):
        for node in block.nodes:
            assert f'"{node.name}<br/>{node.use}' in text
    assert ("-.->" in text) == bool(tg.compilation(name).loops)
    assert ("style=dashed" in dot(graph)) == ("-.->" in text)
