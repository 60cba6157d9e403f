"""The state as a value, in any order of operations: feed, save, fork, reset, reorder, join, detach (hypothesis' state machine).

The model of a state is the naive one: for every row the tokens it has read, document by document. What a call must give is
found by reading all of a row's tokens anew from a fresh state, alone, through the whole-sequence program. Several states are
held at once, so that an operation which writes into the state it is given shows later.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor

import titans_graph as tg
from tests.models import BLOCKS, MODELS, SMALL, small
from titans_graph.ir import Graph
from titans_graph.runtime.runner import Eager
from titans_graph.testing import strategies as tgs
from titans_graph.testing.strategies.inputs import named_outputs, vocabulary

TOLERANCE = 1e-9
WORDS = SMALL["vocab"]
HELD = 4
LONGEST = 40
"""Tokens after which a row reads no more: replays would take long."""

Documents = tuple[tuple[int, ...], ...]


class Row:
    """What a row has read: its documents, the last one open, and the last one's id."""

    def __init__(self, documents: Documents = (), number: int = -1) -> None:
        self.documents, self.number = documents, number

    def read(self, token: int, number: int | None) -> Row:
        """The row after one more token; ``number``: its document's id, None where the call names no documents."""
        begins = not self.documents or number not in (None, self.number)
        open_ = () if begins else self.documents[-1]
        closed = self.documents if begins else self.documents[:-1]
        return Row((*closed, (*open_, token)), self.number if number is None else number)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.documents))

    @property
    def position(self) -> int:
        return len(self.documents[-1]) if self.documents else 0


class _Whole(Eager):
    """Never takes the token program: what replays run through."""

    def single_tokens(self) -> bool:
        return False


class Replay:
    """A model that remembers nothing but tokens."""

    def __init__(self, model: tg.Model) -> None:
        self.model = copy.copy(model)
        self.model._runner = _Whole(model.compilation.lowered)
        self.known: dict[Documents, Tensor] = {}
        (kind,) = model.compilation.inputs.values()
        generator = torch.Generator().manual_seed(7)
        self.table = None if kind.dim is None else torch.randn(WORDS, kind.dim, generator=generator, dtype=torch.float64)
        self.vocabulary = vocabulary(model.graph)

    def input(self, tokens: Tensor) -> Tensor:
        """Words ``[B, T]`` as the model's input: ids, or a feature vector for each."""
        return tokens % self.vocabulary if self.table is None else self.table[tokens]

    def read(self, model: tg.Model, tokens: Tensor, state: tg.State | None, document: Tensor | None) -> tuple[Tensor, tg.State]:
        """One call: all outputs side by side ``[B, T, ...]``, and the new state."""
        y, after = model(self.input(tokens), state, document=document)
        return torch.cat(list(named_outputs(model, y).values()), -1), after

    def outputs(self, documents: Documents) -> Tensor:
        """What the model gives for all tokens of these documents, read at once from a fresh state: ``[T, ...]``."""
        if documents not in self.known:
            tokens = torch.tensor([[t for d in documents for t in d]])
            numbers = torch.tensor([[i for i, d in enumerate(documents) for _ in d]])
            with torch.no_grad():
                y, _ = self.read(self.model, tokens, None, numbers)
            self.known[documents] = y[0]
        return self.known[documents]


class Held:
    """A state beside the rows it must stand for; ``history``: whether gradients may reach what was read before."""

    def __init__(self, state: tg.State, rows: list[Row], history: bool = False) -> None:
        self.state, self.rows, self.history = state, rows, history


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest value where that is above 1."""
    assert got.shape == want.shape
    return float((got - want).abs().max()) / max(1.0, float(want.abs().max())) if want.numel() else 0.0


class Machine(RuleBasedStateMachine):
    """The rules; subclasses say which models. Every rule picks one of the held states and holds the one it makes."""

    def begin(self, model: tg.Model, batch: int, gradients: bool) -> None:
        """Start with a fresh state of some rows; ``gradients``: whether calls record them."""
        self.model, self.replay, self.gradients = model, Replay(model), gradients
        self.held = [Held(model.initial_state(batch), [Row()] * batch)]

    def pick(self, data: st.DataObject) -> Held:
        return self.held[data.draw(st.integers(0, len(self.held) - 1), "which state")]

    def hold(self, data: st.DataObject, state: tg.State, rows: list[Row], history: bool) -> None:
        """Hold one more state, in place of another once there are several; it says truly where its rows stand."""
        if len(self.held) == HELD:
            del self.held[data.draw(st.integers(0, HELD - 1), "dropped state")]
        self.held.append(Held(state, rows, history))
        assert state.position.tolist() == [r.position for r in rows]
        assert state.document.tolist() == [r.number for r in rows]
        tensors = [t for ts in state.nodes.values() for t in ts.values()]
        assert all(t.shape[0] == len(rows) for t in tensors)
        assert history or not any(t.requires_grad for t in tensors)

    def call(self, held: Held, tokens: Tensor, numbers: Tensor | None) -> tuple[tg.State, list[Row]]:
        """Feed tokens ``[B, T]`` and compare every row's outputs with its replay."""
        count = tokens.shape[1]
        with torch.set_grad_enabled(self.gradients):
            y, state = self.replay.read(self.model, tokens, held.state, numbers)
        assert y.shape[:2] == tokens.shape
        rows = []
        for i, row in enumerate(held.rows):
            for t in range(count):
                row = row.read(int(tokens[i, t]), None if numbers is None else int(numbers[i, t]))
            want = self.replay.outputs(row.documents)[row.tokens - count :] if count else y[i].detach()
            assert error(y[i].detach(), want) <= TOLERANCE
            rows.append(row)
        return state, rows

    @rule(data=st.data(), count=st.integers(0, 9), seed=st.integers(0, 99), documents=st.booleans())
    def feed(self, data: st.DataObject, count: int, seed: int, documents: bool) -> None:
        """Read any number of tokens, with the rows' documents named or not."""
        held = self.pick(data)
        count = min([count, *(LONGEST - row.tokens for row in held.rows)])
        batch, numbers = len(held.rows), None
        if documents:
            jumps = data.draw(st.lists(st.sampled_from([0, 0, 0, 1]), min_size=batch * count, max_size=batch * count), "seams")
            stood = torch.tensor([max(row.number, 0) for row in held.rows], dtype=torch.int64)
            numbers = (torch.tensor(jumps, dtype=torch.int64).reshape(batch, count).cumsum(1) + stood[:, None]) % 3
        tokens = torch.randint(0, WORDS, (batch, count), generator=torch.Generator().manual_seed(seed))
        state, rows = self.call(held, tokens, numbers)
        self.hold(data, state, rows, held.history or (self.gradients and count > 0))

    @rule(data=st.data())
    def save_and_load(self, data: st.DataObject) -> None:
        """A file holds the state, without its history."""
        held = self.pick(data)
        with tempfile.TemporaryDirectory() as folder:
            held.state.save(Path(folder) / "state")
            self.hold(data, tg.State.load(self.model, Path(folder) / "state"), held.rows, False)

    @rule(data=st.data(), tree=st.booleans())
    def fork(self, data: st.DataObject, tree: bool) -> None:
        """An independent copy, by ``fork`` or as a tree of tensors."""
        held = self.pick(data)
        copied = pytree.tree_map(torch.clone, held.state) if tree else held.state.fork()
        self.hold(data, copied, held.rows, held.history)

    @rule(data=st.data(), mask=st.booleans())
    def reset(self, data: st.DataObject, mask: bool) -> None:
        """Some rows start afresh, named by number or by a mask."""
        held = self.pick(data)
        chosen = data.draw(st.lists(st.booleans(), min_size=len(held.rows), max_size=len(held.rows)), "rows")
        rows = torch.tensor(chosen, dtype=torch.bool) if mask else [i for i, c in enumerate(chosen) if c]
        kept = [Row() if c else row for row, c in zip(held.rows, chosen, strict=True)]
        self.hold(data, held.state.reset(rows), kept, held.history)

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        """Up to four rows, any of them more than once, perhaps none."""
        held = self.pick(data)
        size = 4 if held.rows else 0
        rows = data.draw(st.lists(st.integers(0, max(0, len(held.rows) - 1)), max_size=size), "rows")
        self.hold(data, held.state.reorder(rows), [held.rows[i] for i in rows], held.history)

    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        """The rows of two states, which may be one and the same, in one; the last rows of many are left out."""
        parts = [self.pick(data), self.pick(data)]
        rows = [row for held in parts for row in held.rows][:4]
        joined = tg.State.join(*(held.state for held in parts)).reorder(range(len(rows)))
        self.hold(data, joined, rows, any(held.history for held in parts))

    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        """The same state without history."""
        held = self.pick(data)
        self.hold(data, held.state.detach(), held.rows, False)

    def teardown(self) -> None:
        """Every state still held, whatever was made from it since, goes on with the outputs of its replay."""
        for held in getattr(self, "held", ()):
            for count in (1, 3):
                self.call(held, torch.arange(len(held.rows) * count).reshape(len(held.rows), count) % WORDS, None)


@functools.cache
def shipped(name: str) -> tg.Model:
    return small(name)


class Shipped(Machine):
    """A shipped spec at a small size."""

    name = "mac"

    @initialize(batch=st.integers(1, 3), gradients=st.booleans())
    def start(self, batch: int, gradients: bool) -> None:
        self.begin(shipped(self.name), batch, gradients)


class Drawn(Machine):
    """A drawn graph."""

    @initialize(graph=tgs.graphs(), batch=st.integers(1, 3), gradients=st.booleans())
    def start(self, graph: Graph, batch: int, gradients: bool) -> None:
        model: tg.Model = tg.build(graph)
        model.double()
        self.begin(model, batch, gradients)


def shorter(least: int, parts: int) -> settings:
    """One of several machines that share the examples of a profile; each is done in a few minutes on a busy processor."""
    return settings(max_examples=max(least, settings().max_examples // parts), stateful_step_count=12)


# The language models add an embedding and a head to some layers of the block, and take three times as long.
@pytest.mark.parametrize("name", [*BLOCKS, *(pytest.param(name, marks=pytest.mark.nightly) for name in MODELS)])
def test_any_order_of_operations_on_a_shipped_model(name: str) -> None:
    machine = type(Shipped.__name__, (Shipped,), {"name": name})
    run_state_machine_as_test(machine, settings=shorter(4, 20))


def test_any_order_of_operations_on_a_drawn_graph() -> None:
    run_state_machine_as_test(Drawn, settings=shorter(10, 5))
