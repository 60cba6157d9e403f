"""``tg.neural_memory`` cut at any place, its state detached, reordered, converted and copied in between, in any order.

What a call must give is found by reading all of a row's tokens at once from its initial weights, alone. The state counts one
phase for all rows, so that rows share the number of tokens read, but neither tokens nor initial weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from hypothesis import currently_in_test_context, reject
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor

import titans_graph as tg
from tests.properties.test_machine import HELD, TOLERANCE, WORDS, error, shorter
from titans_graph.testing import strategies as tgs

DIM, HEADS, LONGEST, LARGEST = 3, 2, 40, 100.0

Row = tuple[int, tuple[int, ...]]
"""Which initial weights a row started from, and the words it has read."""
Result = tuple[Tensor, tg.MemoryState]


def table(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Memory(RuleBasedStateMachine):
    """Every rule picks one of the held states, and holds the one it makes."""

    @initialize(
        network=tgs.memory_networks(DIM),
        objective=st.sampled_from(["l2", "dot", {"huber": {"delta": 0.5}}]),
        read=st.sampled_from(["after", "before", "chunk"]),
        chunk=st.sampled_from([1, 2, 3, 5, 8]),
        batch=st.integers(1, 3),
        gates=st.booleans(),
    )
    def start(self, network: Any, objective: Any, read: str, chunk: int, batch: int, gates: bool) -> None:
        self.network = network
        self.options = {"chunk": chunk, "objective": objective, "read": read}
        self.words = [0.7 * table(WORDS, HEADS, DIM, seed=i) for i in range(3)]
        self.step = 0.005 * table(WORDS, HEADS, seed=3).sigmoid()
        self.gates = [F.logsigmoid(table(WORDS, HEADS, seed=4 + i)) for i in range(2)] if gates else []
        shapes = tg.fast_weights(network, DIM)
        self.weights = [{n: 0.5 * table(1, HEADS, *s, seed=9 + row) for n, s in shapes.items()} for row in range(batch)]
        rows: list[Row] = [(row, ()) for row in range(batch)]
        self.held = [(tg.MemoryState.initial(self.begin(rows)), rows)]

    def begin(self, rows: list[Row]) -> dict[str, Tensor]:
        return {n: torch.cat([self.weights[start][n] for start, _ in rows]) for n in self.weights[0]}

    def run(self, words: Tensor, weights: Any, state: tg.MemoryState | None, kernel: str) -> Result:
        """The memory over words ``[B, T]``."""
        q, k, v = (w[words].transpose(1, 2) for w in self.words)
        names = ("log_momentum", "log_keep")
        given = {n: g[words].transpose(1, 2) for n, g in zip(names, self.gates, strict=False)}
        step = self.step[words].transpose(1, 2)
        memorise: Any = tg.neural_memory
        result: Result = memorise(
            self.network, weights, q, k, v, step=step, state=state, kernel=kernel, **given, **self.options
        )
        return result

    def hold(self, data: st.DataObject, state: tg.MemoryState, rows: list[Row]) -> None:
        if len(self.held) == HELD:
            del self.held[data.draw(st.integers(0, HELD - 1), "dropped state")]
        self.held.append((state, rows))
        assert state.phase == len(rows[0][1]) % self.options["chunk"]
        assert all(t.shape[0] == len(rows) for t in pytree.tree_leaves(state))

    def call(self, state: tg.MemoryState, rows: list[Row], words: Tensor, kernel: str) -> tuple[tg.MemoryState, list[Row]]:
        """Read on, and compare each row with its replay."""
        y, after = self.run(words, None, state, kernel)
        read: list[Row] = [(start, (*old, *new.tolist())) for (start, old), new in zip(rows, words, strict=True)]
        for i, row in enumerate(read):
            want, end = self.run(torch.tensor([row[1]], dtype=torch.int64), self.begin([row]), None, "chunk")
            # The function bounds no step: a memory that diverges makes any rounding as large as one likes.
            known = all(float(t.abs().amax()) < LARGEST for t in (want, *pytree.tree_leaves(end)) if t.numel())
            assert known or currently_in_test_context()
            if not known:
                reject()
            assert error(y[i], want[0, :, len(rows[i][1]) :]) <= TOLERANCE
            for part in ("weights", "momenta"):
                for name, value in getattr(end, part).items():
                    assert error(getattr(after, part)[name][i], value[0]) <= TOLERANCE
        return after, read

    def pick(self, data: st.DataObject) -> tuple[tg.MemoryState, list[Row]]:
        return self.held[data.draw(st.integers(0, len(self.held) - 1), "which state")]

    @rule(data=st.data(), count=st.integers(0, 9), seed=st.integers(0, 99), kernel=st.sampled_from(["chunk", "reference"]))
    def read(self, data: st.DataObject, count: int, seed: int, kernel: str) -> None:
        state, rows = self.pick(data)
        count = min(count, LONGEST - len(rows[0][1]))
        words = torch.randint(0, WORDS, (len(rows), count), generator=torch.Generator().manual_seed(seed))
        self.hold(data, *self.call(state, rows, words, kernel))

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        state, rows = self.pick(data)
        chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4), "rows")
        self.hold(data, state.reorder(torch.tensor(chosen)), [rows[i] for i in chosen])

    @rule(data=st.data(), how=st.sampled_from(["detach", "to", "tree"]))
    def copy(self, data: st.DataObject, how: str) -> None:
        state, rows = self.pick(data)
        copies: dict[str, Callable[[tg.MemoryState], tg.MemoryState]] = {
            "detach": tg.MemoryState.detach,
            "to": lambda s: s.to("cpu", torch.float64),
            "tree": lambda s: pytree.tree_map(torch.clone, s),
        }
        self.hold(data, copies[how](state), rows)

    def teardown(self) -> None:
        """Every state still held goes on with the outputs of its replay."""
        for state, rows in getattr(self, "held", ()):
            self.call(state, rows, torch.arange(2 * len(rows)).reshape(len(rows), 2), "chunk")


def test_any_order_of_operations_on_a_memory() -> None:
    run_state_machine_as_test(Memory, settings=shorter(10, 5))
