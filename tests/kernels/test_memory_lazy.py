"""Decoding with a ring of pairs equals the token-by-token truth, wherever the rows stand and whenever weights are written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_memory_cases import STATE, Case, assert_close, make
from titans_graph.kernels.memory_lazy import begin, current, lazy_step, ready, slots_of
from titans_graph.kernels.memory_reference import memory_reference

FORMS = [
    ("linear", "l2", "after", False),
    ({"mlp": {"depth": 3, "hidden": 4, "residual": True}}, "l2", "before", True),
    ({"mlp": {"hidden": 4, "norm": True, "output_norm": True, "bias": True}}, {"huber": {"delta": 0.5}}, "after", True),
    ({"mlp": {"hidden": 3, "activation": "relu2"}}, "dot", "chunk", False),
    ({"swiglu": {"hidden": 4}}, {"lp": {"p": 3}}, "after", True),
    ({"lowrank": 2}, "l2", "before", False),
    ("test_tied", "l2", "after", True),
]


# Called with unpacked lists, which no checker follows.
run_step: Any = lazy_step
run_reference: Any = memory_reference


def decode(case: Case, position: Tensor) -> list[Tensor]:
    """All tokens of a case one by one, rows standing at ``position`` ``[B, T]``: ``[y, anchor.., weights.., momenta..]``."""
    anchor, weights, momenta, initial, _ = (case.state[n] for n in STATE)
    state, taken, outputs = begin(case.network, case.chunk, case.bounded, anchor, weights, momenta), 0, []
    for t in range(position.shape[1]):
        state, taken = ready(case.network, case.chunk, state, taken, position[:, t].tolist(), initial)
        assert taken < slots_of(case.chunk)
        tokens = [x[:, :, t : t + 1] for x in case.tokens.values()]
        y, state = run_step(case.network, case.objective, case.read, case.bounded, state, *tokens)
        taken += 1
        outputs.append(y)
    return [torch.cat(outputs, 2), *state.anchor, *(x for values in current(case.network, state) for x in values)]


def truth(case: Case, position: Tensor) -> list[Tensor]:
    """The same by the reference, which restarts rows with the initial momenta of the case: zeros here."""
    form = case.network, case.objective, case.read, case.chunk, case.bounded
    anchor, weights, momenta, initial, zeros = (case.state[n] for n in STATE)
    valid = torch.ones_like(position, dtype=torch.bool)
    state = anchor, weights, momenta, initial, [torch.zeros_like(x) for x in zeros]
    y, *ends = run_reference(*form, *state, *case.tokens.values(), valid, position)
    return [y, *(x for end in ends for x in end)]


def standing(batch: int, tokens: int, start: list[int]) -> Tensor:
    """Positions of rows that stand at ``start``; the last row begins a new document after seven tokens."""
    position = torch.tensor(start)[:, None] + torch.arange(tokens)
    position[-1, 7:] = torch.arange(tokens - 7)
    return position[:batch]


@pytest.mark.parametrize(("network", "objective", "read", "bounded"), FORMS)
@pytest.mark.parametrize("chunk", [1, 5, 40])
def test_decoding_is_the_recurrence(network: Any, objective: Any, read: str, bounded: bool, chunk: int) -> None:
    case = make(network, objective, read, chunk=chunk, slots=36, bounded=bounded)
    position = standing(2, 36, [3, 0])
    with torch.no_grad():
        assert_close(decode(case, position), truth(case, position), 1e-9)


@pytest.mark.parametrize("gate", ["step", "log_momentum", "log_keep"])
def test_gates_that_are_zero(gate: str) -> None:
    case = make({"mlp": {"hidden": 4}}, chunk=8, slots=20)
    with torch.no_grad():
        case.tokens[gate][:, :, ::3] = 0.0 if gate == "step" else -torch.inf
        position = standing(2, 20, [0, 2])
        assert_close(decode(case, position), truth(case, position), 1e-9)


def test_a_step_makes_a_ring_and_nothing_else_anew() -> None:
    case = make({"mlp": {"hidden": 4}}, chunk=8)
    with torch.no_grad():
        state = begin(case.network, 8, False, *(case.state[n] for n in STATE[:3]))
        before = [x.clone() for x in state.deltas]
        tokens = [x[:, :, :1] for x in case.tokens.values()]
        _, after = run_step(case.network, "l2", "after", False, state, *tokens)
    assert all(a is b for a, b in zip(after.weights, state.weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, state.deltas, strict=True))
    assert not torch.equal(after.deltas[0], state.deltas[0])


def test_rows_begin_anew_whatever_the_default_device_is() -> None:
    """Which rows do is known on the host; on a GPU there would be something to wait for."""
    case = make("linear", chunk=4, slots=4)
    anchor, weights, momenta, initial, _ = (case.state[n] for n in STATE)
    state = begin(case.network, case.chunk, case.bounded, anchor, weights, momenta)
    places = [0, *range(5, 4 + len(anchor[0]))]
    with torch.device("meta"):
        found, _ = ready(case.network, case.chunk, state, 0, places, initial)
    assert torch.equal(found.weights[0][0], initial[0][0])
    assert torch.equal(found.weights[0][1:], weights[0][1:])
