"""Models and states in pickles: copies, torch.save, and processes that are spawned."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import titans_graph as tg
from tests.models import ALL, example, small


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def tensors(state: tg.State) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(state) if isinstance(t, torch.Tensor)]


def same(a: tg.State, b: tg.State) -> bool:
    return a.fingerprint == b.fingerprint and all(torch.equal(s, t) for s, t in zip(tensors(a), tensors(b), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_a_model_and_its_state_go_on_exactly(name: str) -> None:
    model = small(name)
    x = example(model, 2, 25)
    _, state = model(x[:, :14])
    again, there = through_pickle((model, state))
    assert again.graph.text() == model.graph.text()
    assert same(there, state)
    y, end = model(x[:, 14:], state)
    z, there = again(x[:, 14:], there)
    assert torch.equal(y, z)
    assert same(there, end)


def test_a_state_after_single_tokens_goes_on_exactly() -> None:
    model = small("blocks/mac")
    x = example(model, 2, 12)
    with torch.no_grad():
        _, state = model(x[:, :9])
        _, state = model(x[:, 9:10], state)
        there = through_pickle(state)
        assert torch.allclose(model(x[:, 10:], there)[0], model(x[:, 10:], state)[0], atol=1e-9)


@pytest.mark.parametrize("through", [through_pickle, through_torch, copy.copy, copy.deepcopy])
def test_every_way_of_copying_keeps_type_switches_and_numbers(through: Any) -> None:
    model: Any = small("mac").float().eval()
    model.body.get_submodule("logits").requires_grad_(False)
    model.extra = {"note": 3}
    x = example(model, 2, 20)
    y, state = model(x)
    again = through(model)
    assert type(again) is tg.Model
    assert (again.training, again.__dict__["extra"]) == (False, {"note": 3})
    wanted = [(n, p.dtype, p.requires_grad) for n, p in model.named_parameters()]
    assert [(n, p.dtype, p.requires_grad) for n, p in again.named_parameters()] == wanted
    assert all(m.training is False for m in again.modules())
    z, _ = again(x, through(model.initial_state(2)))
    assert torch.equal(y, z)
    assert same(through(state), state)
    shared = through is copy.copy
    assert (next(again.parameters()) is next(model.parameters())) == shared


def test_passes_that_were_left_out_stay_out() -> None:
    model = tg.load("blocks/mac", dim=8, heads=2, hidden=4, segment=8, chunk=4, disable=("hoist", "share"))
    again = through_pickle(model)
    kept = [(r.name, r.after is None) for r in model.compilation.records]
    assert [(r.name, r.after is None) for r in again.compilation.records] == kept
    assert again.compilation.hoist is False


def test_nothing_random_is_drawn_for_a_model_from_a_pickle() -> None:
    content = pickle.dumps(small("mac"))
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    pickle.loads(content)
    assert torch.equal(torch.rand(2), wanted)


def test_a_compiled_model_arrives_eager_and_stays_compiled_in_a_copy() -> None:
    fast = small("blocks/mal").compile()
    again = through_pickle(fast)
    assert type(again) is tg.Model
    assert torch.equal(next(again.parameters()), next(fast.parameters()))
    assert type(copy.copy(fast)) is tg.Compiled


def test_a_model_from_a_pickle_trains_and_saves() -> None:
    model = through_pickle(small("blocks/mac"))
    y, state = model(example(model, 2, 9))
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert same(through_pickle(state), state)


def test_a_state_without_its_model_starts_rows_afresh_as_with_it() -> None:
    model = small("mac")
    x = example(model, 3, 20)
    _, state = model(x[:, :9])
    there = through_pickle(through_pickle(state)).reset([1])
    assert torch.equal(model(x[:, 9:], there)[0], model(x[:, 9:], state.reset([1]))[0])


def test_a_pickle_of_a_row_holds_no_other_rows_and_no_model() -> None:
    model = small("mac")
    _, state = model(example(model, 64, 9))
    row = state.reorder([3])
    assert len(pickle.dumps(row.map(lambda t: t[:1]))) < len(pickle.dumps(state)) / 8
    assert not through_pickle(row).position.requires_grad


def test_a_state_keeps_gradients_in_a_copy_and_not_in_a_pickle() -> None:
    model = small("blocks/lmm")
    _, state = model(example(model, 1, 9))
    assert any(t.requires_grad for t in tensors(copy.deepcopy(state)))
    assert not any(t.requires_grad for t in tensors(through_pickle(state)))


def test_states_are_equal_when_they_are_the_same_object() -> None:
    model = small("blocks/lmm")
    state = model.initial_state(1)
    assert state == state
    assert state != state.fork()
    assert len({state, state, state.fork()}) == 2


def test_the_state_of_one_memory_pickles() -> None:
    state = tg.MemoryState.initial({"w": torch.randn(1, 2, 3, 3)})
    assert torch.equal(through_pickle(state).weights["w"], state.weights["w"])


def read_on(model: tg.Model, x: torch.Tensor, state: tg.State) -> list[float]:
    with torch.no_grad():
        y: list[float] = model(x, state)[0].flatten().tolist()
    return y


def test_a_spawned_process_reads_on(tmp_path: Path) -> None:
    model = small("mac")
    x = example(model, 2, 12)
    _, state = model(x[:, :7])
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(read_on, model, x[:, 7:], state).result(timeout=300)
    assert there == read_on(model, x[:, 7:], state)
