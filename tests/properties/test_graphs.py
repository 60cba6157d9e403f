"""Properties of any graph the language can express, not only of shipped specs: drawn graphs, in float64 (see laws.py)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.properties import laws
from titans_graph.ir import Graph
from titans_graph.testing import strategies as tgs

MANY = settings(max_examples=min(2000, 4 * settings().max_examples))
FEWER = settings(max_examples=max(10, settings().max_examples // 2))
COMPILED = settings(max_examples=max(2, settings().max_examples // 20))


@MANY
@given(graph=tgs.graphs())
def test_a_drawn_graph_is_sound_and_reads_back(graph: Graph) -> None:
    laws.check_reads_back(graph)


@MANY
@given(graph=tgs.graphs(), data=st.data())
def test_programs_equal_the_naive_evaluation(graph: Graph, data: st.DataObject) -> None:
    laws.check_naive(graph, data.draw(tgs.readings(graph), "reading"))


@FEWER
@given(graph=tgs.graphs(), data=st.data())
def test_programs_in_single_precision_equal_the_naive_evaluation(graph: Graph, data: st.DataObject) -> None:
    laws.check_single_precision(graph, data.draw(tgs.readings(graph), "reading"))


@given(graph=tgs.graphs(), data=st.data())
def test_any_split_streams_to_the_same_output(graph: Graph, data: st.DataObject) -> None:
    laws.check_streaming(graph, data.draw(tgs.readings(graph), "reading"))


@FEWER
@given(graph=tgs.graphs(), data=st.data())
def test_gradients_through_a_split_equal_those_of_the_whole(graph: Graph, data: st.DataObject) -> None:
    laws.check_split_gradients(graph, data.draw(tgs.readings(graph), "reading"))


@given(graph=tgs.graphs(), data=st.data())
def test_later_tokens_change_no_earlier_output(graph: Graph, data: st.DataObject) -> None:
    reading = data.draw(tgs.readings(graph), "reading")
    laws.check_no_leak(graph, reading, data.draw(st.integers(0, reading.x.shape[1]), "cut"))


@FEWER
@given(graph=tgs.graphs(), data=st.data())
def test_rows_do_not_influence_each_other(graph: Graph, data: st.DataObject) -> None:
    laws.check_rows_apart(graph, data.draw(tgs.readings(graph), "reading"))


@given(graph=tgs.graphs(), data=st.data())
def test_packed_documents_equal_documents_apart(graph: Graph, data: st.DataObject) -> None:
    laws.check_documents_apart(graph, data.draw(tgs.readings(graph), "reading"))


# Loops, several of them in one block, and blocks used more than once are what the optional passes work on.
LOOPS = tgs.graphs(max_nodes=3, always=["memory.neural", "memory.neural"])


@given(graph=tgs.graphs() | LOOPS, data=st.data())
def test_optional_passes_preserve_meaning(graph: Graph, data: st.DataObject) -> None:
    laws.check_passes(graph, data.draw(tgs.readings(graph, max_batch=2, max_tokens=16), "reading"))


@given(graph=tgs.graphs())
def test_passes_are_idempotent(graph: Graph) -> None:
    laws.check_idempotent(graph)


@FEWER
@given(graph=tgs.graphs(), data=st.data())
def test_inferred_shapes_are_those_at_run_time(graph: Graph, data: st.DataObject) -> None:
    laws.check_shapes(graph, data.draw(tgs.readings(graph), "reading"))


@FEWER
@given(graph=tgs.graphs(), data=st.data())
def test_spec_weights_and_state_are_saved_bit_for_bit(graph: Graph, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        laws.check_saved(graph, data.draw(tgs.readings(graph), "reading"), Path(folder))


@FEWER
@given(graph=tgs.graphs(), data=st.data())
def test_a_seed_determines_everything(graph: Graph, data: st.DataObject) -> None:
    laws.check_seed(graph, data.draw(tgs.readings(graph), "reading"))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks at it
@COMPILED
@given(graph=tgs.graphs(max_nodes=2), data=st.data())
def test_compiled_equals_eager(graph: Graph, data: st.DataObject) -> None:
    laws.check_compiled(graph, data.draw(tgs.readings(graph, max_batch=2, max_tokens=12), "reading"))
