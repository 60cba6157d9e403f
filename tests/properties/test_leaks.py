"""The judgement of causality: no graph that passes leaks, and each that is refused without leaking has a known reason."""

from __future__ import annotations

import pytest
from hypothesis import find, given, settings

from tests.properties import laws
from tests.properties.leaks import REASONS, candidates, judged, leaks, reason
from titans_graph.ir import Graph


@settings(max_examples=2 * settings().max_examples)
@given(graph=candidates())
def test_a_graph_judged_causal_never_leaks_and_a_false_alarm_has_a_reason(graph: Graph) -> None:
    laws.check_judgement(graph)


@pytest.mark.parametrize("name", REASONS)
def test_every_reason_for_a_false_alarm_is_met(name: str) -> None:
    """The list of reasons is not longer than it has to be: each explains some refusal alone."""

    def met(graph: Graph) -> bool:
        c = judged(graph)
        return not c.sound and reason(c) == (name,) and not leaks(graph, c, tokens=8)

    find(candidates(), met, settings=settings(max_examples=500, derandomize=True, database=None))
