"""What a model says to input that does not fit, and what it does with none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import titans_graph as tg
from tests.models import ALL, BLOCKS, MODELS, example, small
from titans_graph.errors import UsageError
from titans_graph.runtime.state import Stepping


@pytest.mark.parametrize("name", MODELS)
def test_ids_out_of_range_are_refused(name: str) -> None:
    model = small(name)
    for bad in (-1, 13):
        with pytest.raises(tg.InputError, match=r"ids must be in 0\.\.12"):
            model(torch.full((1, 4), bad))


@pytest.mark.parametrize("name", ALL)
def test_no_tokens_give_no_output_and_the_same_state(name: str) -> None:
    model = small(name)
    _, state = model(example(model, 2, 9))
    y, after = model(example(model, 2, 0), state)
    assert y.shape[:2] == (2, 0)
    assert after is state
    assert model(example(model, 2, 0))[0].shape[1] == 0


@pytest.mark.parametrize("name", ALL)
def test_an_empty_batch_runs(name: str) -> None:
    model = small(name)
    assert model(example(model, 0, 5))[0].shape[:2] == (0, 5)


def test_wrong_types_and_shapes_are_named() -> None:
    model, block = small("mac"), small("blocks/mac")
    with pytest.raises(tg.InputError, match=r"ids \[B, T\]"):
        model(torch.zeros(2, 3))
    with pytest.raises(tg.InputError, match=r"\[B, T, 16\]"):
        block(torch.zeros(2, 3, 8, dtype=torch.float64))
    with pytest.raises(tg.InputError, match="float32"):
        block(torch.zeros(2, 3, 16))
    with pytest.raises(tg.InputError, match="document"):
        model(torch.zeros(2, 3, dtype=torch.int64), document=torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(tg.InputError, match="0 or more"):
        model(torch.zeros(2, 3, dtype=torch.int64), document=torch.full((2, 3), -1))
    with pytest.raises(tg.InputError, match="tensor"):
        model([[1, 2]])


ODD_IDS: dict[str, Any] = {
    "rank 0": torch.zeros((), dtype=torch.int64),
    "rank 1": torch.zeros(4, dtype=torch.int64),
    "rank 3": torch.zeros(2, 4, 1, dtype=torch.int64),
    "int8": torch.zeros(2, 4, dtype=torch.int8),
    "bool": torch.zeros(2, 4, dtype=torch.bool),
    "float": torch.zeros(2, 4),
    "complex": torch.zeros(2, 4, dtype=torch.complex64),
    "sparse": torch.zeros(2, 4, dtype=torch.int64).to_sparse(),
    "device": torch.zeros(2, 4, dtype=torch.int64, device="meta"),
    "list": [[0, 1]],
    "none": None,
}
ODD_STREAMS: dict[str, Any] = {
    "rank 2": torch.zeros(2, 16, dtype=torch.float64),
    "rank 4": torch.zeros(2, 4, 1, 16, dtype=torch.float64),
    "size": torch.zeros(2, 4, 15, dtype=torch.float64),
    "float16": torch.zeros(2, 4, 16, dtype=torch.float16),
    "bfloat16": torch.zeros(2, 4, 16, dtype=torch.bfloat16),
    "float8": torch.zeros(2, 4, 16).to(torch.float8_e4m3fn),
    "int64": torch.zeros(2, 4, 16, dtype=torch.int64),
    "complex": torch.zeros(2, 4, 16, dtype=torch.complex128),
    "sparse": torch.zeros(2, 4, 16, dtype=torch.float64).to_sparse(),
    "device": torch.zeros(2, 4, 16, dtype=torch.float64, device="meta"),
    "array": [[[0.0] * 16]],
}


@pytest.mark.parametrize("kind", ODD_IDS)
def test_odd_ids_are_named_errors(kind: str) -> None:
    model = small("mac")
    with pytest.raises(tg.InputError, match="tokens"):
        model(ODD_IDS[kind])
    with pytest.raises(tg.InputError, match="tokens"):
        tg.doctor(model, ODD_IDS[kind])


@pytest.mark.parametrize("kind", ODD_STREAMS)
def test_odd_streams_are_named_errors(kind: str) -> None:
    with pytest.raises(tg.InputError, match="input 'x'"):
        small("blocks/mac")(ODD_STREAMS[kind])


@pytest.mark.parametrize(
    "document", ["x", [[0, 1]], torch.zeros(2, 4), torch.zeros(4, dtype=torch.int64), 0, "meta", "bool", "sparse"]
)
def test_odd_documents_are_named_errors(document: Any) -> None:
    odd = {
        "meta": torch.zeros(2, 4, dtype=torch.int64, device="meta"),
        "bool": torch.zeros(2, 4, dtype=torch.bool),
        "sparse": torch.zeros(2, 4, dtype=torch.int64).to_sparse(),
    }
    given = odd.get(document, document) if isinstance(document, str) else document
    with pytest.raises(tg.InputError, match="document"):
        small("mac")(torch.zeros(2, 4, dtype=torch.int64), document=given)


@pytest.mark.parametrize("name", ALL)
def test_a_state_of_another_type_or_device_is_a_named_error(name: str) -> None:
    model = small(name)
    x = example(model, 2, 3)
    _, state = model(x)

    def nodes(change: Callable[[torch.Tensor], torch.Tensor]) -> tg.State:
        changed = {n: {k: change(t) for k, t in ts.items()} for n, ts in state.nodes.items()}
        return tg.State(state.position, state.document, changed, state.fingerprint, state.fresh)

    for change in (torch.Tensor.float, lambda t: t.to("meta")):
        with pytest.raises(tg.StateError, match=r"the model torch\.float64 on cpu"):
            model(x, nodes(change))
    for change in (lambda t: t.to("meta"), torch.Tensor.double):
        with pytest.raises(tg.StateError):
            model(x, state.map(change))
    with pytest.raises(tg.StateError, match="State"):
        model(x, state.nodes)


@pytest.mark.parametrize("name", ALL)
def test_nothing_of_either_axis_with_and_without_documents(name: str) -> None:
    model = small(name)
    for batch, tokens in ((0, 0), (0, 1), (0, 9), (2, 0)):
        x = example(model, batch, tokens)
        for document in (None, torch.zeros(batch, tokens, dtype=torch.int64)):
            y, state = model(x, document=document)
            assert y.shape[:2] == (batch, tokens)
            assert state.batch == batch
            y, _ = model(example(model, batch, 2), state)
            assert y.shape[:2] == (batch, 2)


@pytest.mark.parametrize("rows", [-1, 1.5, "2", None, True, torch.tensor(2)])
def test_a_state_has_a_whole_number_of_rows(rows: Any) -> None:
    with pytest.raises(UsageError, match="number of rows"):
        small("lmm").initial_state(rows)


@pytest.mark.parametrize(
    "rows", [[0.5], "a", None, [[0, 1]], [True], [True, False, True], torch.zeros(1, device="meta"), [None]]
)
def test_odd_rows_are_named_errors(rows: Any) -> None:
    state = small("lmm").initial_state(2)
    for method in (state.reorder, state.reset):
        with pytest.raises(tg.StateError):
            method(rows)
    assert state.reorder([]).batch == 0
    assert state.reorder([True, False]).batch == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_doctor_names_the_first_node_that_saw_what_is_not_finite(name: str, bad: float) -> None:
    model = small(name)
    x = example(model, 1, 11)
    assert tg.doctor(model, x).first is None
    x[0, 6, 3] = bad
    found = tg.doctor(model, x)
    assert found.input == 6
    assert not found.parameters
    assert found.first is not None
    readers = [
        n for n, node in model.compilation.nodes.items() if any(r.node == "x" for rs in node.inputs.values() for r in rs)
    ]
    assert found.first.node in readers
    assert found.first.token is not None
    assert found.first.token <= 6 <= (found.first.until or found.first.token)
    assert any("token 6" in line for line in found.problems)


def test_ids_are_checked_before_anything_is_read() -> None:
    model = small("mac")
    _, state = model(example(model, 1, 5))
    for bad in (-1, 13, 2**31, -(2**63), 2**63 - 1):
        with pytest.raises(tg.InputError, match="ids must be in"):
            model(torch.tensor([[0, bad]]), state)
        with pytest.raises(tg.InputError, match="ids must be in"):
            tg.doctor(model, torch.tensor([[0, bad]]))


def test_a_model_without_memory_for_its_numbers_runs_on_none() -> None:
    """Everything on torch's device ``meta``: shapes alone, nothing is read."""
    with torch.device("meta"):
        model = tg.load("mac", dim=16, heads=2, hidden=4, chunk=4, segment=8)
    y, state = model(torch.zeros(2, 9, dtype=torch.int64, device="meta"))
    assert (y.device.type, list(y.shape)) == ("meta", [2, 9, 256])
    assert state.position.tolist() == [9, 9]
    with pytest.raises(tg.InputError, match="on cpu, the model on meta"):
        model(torch.zeros(2, 9, dtype=torch.int64))


@pytest.mark.parametrize("name", ["blocks/mac", "blocks/mag", "blocks/transformer"])
@pytest.mark.parametrize("grad", [True, False])
def test_single_tokens_and_the_looks_at_a_state_run_on_meta_too(name: str, grad: bool) -> None:
    model, x = small(name).to("meta"), torch.zeros(2, 1, 16, device="meta", dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        _, state = model(x.expand(2, 5, 16))
        for _ in range(2):
            y, state = model(x, state)
    assert (y.device.type, list(y.shape), state.position.tolist()) == ("meta", [2, 1, 16], [7, 7])
    assert all(t.device.type == "meta" for tensors in state.nodes.values() for t in tensors.values())
    with pytest.raises(tg.InputError, match=r"float32, the model torch\.float64"):
        model(x.float())


def test_a_call_does_not_settle_what_single_tokens_put_off() -> None:
    """The check of a state's types looks at what is there; settling it writes all weights of all memories."""
    model = small("lmm")
    with torch.no_grad():
        _, state = model(example(model, 1, 3))
        _, state = model(example(model, 1, 1), state)
        assert isinstance(state.nodes, Stepping)
        model(example(model, 1, 1), state)
        assert not state.nodes._settled


@pytest.mark.parametrize("name", ["blocks/lmm", "blocks/mac"])
@pytest.mark.parametrize("tokens", [1, 12])
def test_no_rows_are_read_like_any_number_of_them(name: str, tokens: int) -> None:
    model = small(name)
    y, state = model(example(model, 0, tokens))
    assert y.shape[:2] == (0, tokens)
    assert model(example(model, 0, 3), state)[0].shape[:2] == (0, 3)
