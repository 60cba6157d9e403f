"""What every version of the product must keep, as functions of the name of a fixed graph; cheap ones first.

The same laws are drawn over at random elsewhere. Here they are run against deliberate defects (test_defects.py), so
each is small, deterministic, and builds what it needs anew.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import titans_graph as tg
from tests.models import SMALL
from tests.properties import fixed, laws
from tests.properties.test_machine import Replay, Row
from tests.properties.test_memory_machine import Memory
from tests.properties.test_stability import stays_bounded
from tests.runtime import paper
from tests.training import data as training
from tests.training.test_loop import Stopping, losses, weights
from titans_graph.errors import AlgebraicLoop, CausalityLeak, StateError
from titans_graph.ir import Block, Graph
from titans_graph.training.evaluate import bits_per_byte

TOLERANCE = 1e-9


class Probe(NamedTuple):
    """A check, and the names of the graphs it is about."""

    check: Callable[[str], None]
    graphs: tuple[str, ...]


PROBES: dict[str, Probe] = {}
"""By the law's name, in the order in which they are tried."""


def probe(*graphs: str) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    """Add a law under its function's name, in words; about all fixed graphs unless some are named."""

    def add(check: Callable[[str], None]) -> Callable[[str], None]:
        PROBES[check.__name__.replace("_", " ")] = Probe(check, graphs or fixed.NAMES)
        return check

    return add


LEAK = """
titans_graph: 1
input: {x: [B, T, 4]}
nodes:
  a: {use: attention.segment, in: x, segment: 4, heads: 1, causal: false}
  y: {use: linear, in: a}
output: y
"""
CIRCLE = """
titans_graph: 1
input: {x: [B, T, 4]}
nodes:
  a: {use: add, in: [x, b]}
  b: {use: linear, in: a}
output: b
"""


@probe("parts")
def what_cannot_run_is_refused(name: str) -> None:
    """A graph that reads later tokens, a loop without delay, and the state of another spec."""
    for text, kind in ((LEAK, CausalityLeak), (CIRCLE, AlgebraicLoop)):
        assert [type(d) for d in tg.check(fixed.graph_of(text))] == [kind]
    text = fixed.DECLARED[name]
    one, other = (tg.build(fixed.graph_of(text.replace("kernel: 3", f"kernel: {n}"))) for n in (3, 4))
    try:
        other(torch.zeros(1, 2, 8), one.initial_state(1))
    except StateError:
        return
    raise AssertionError("the state of another spec was taken")


@probe()
def forms_read_back(name: str) -> None:
    laws.check_reads_back(fixed.graph(name))


@probe()
def passes_are_idempotent(name: str) -> None:
    laws.check_idempotent(fixed.graph(name))


@probe()
def types_describe_what_flows(name: str) -> None:
    laws.check_shapes(fixed.graph(name), fixed.reading(name))


@probe()
def every_node_has_its_own_parameters(name: str) -> None:
    """Copies of a repeated node or block share nothing, and nothing is left out."""
    model: tg.Model = tg.build(fixed.graph(name))
    c = model.compilation
    alone: list[Any] = [node.component(c.sites[n]) for n, node in c.nodes.items()]  # type: ignore[call-arg]
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for one in alone for p in one.parameters())
    places = [p.data_ptr() for p in model.parameters() if p.numel()]
    assert len(places) == len(set(places))


@probe()
def any_split_gives_the_same(name: str) -> None:
    laws.check_streaming(fixed.graph(name), fixed.stream(name))


@probe()
def later_tokens_change_nothing(name: str) -> None:
    for cut in (1, 6, 11):
        laws.check_no_leak(fixed.graph(name), fixed.stream(name), cut)


@probe()
def rows_do_not_touch(name: str) -> None:
    laws.check_rows_apart(fixed.graph(name), fixed.reading(name))


@probe()
def documents_do_not_touch(name: str) -> None:
    graph, reading = fixed.graph(name), fixed.reading(name)
    for parts in ((5, 9, 1, 6), (8, 4, 1, 8), (4, 9, 5, 3)):
        laws.check_documents_apart(graph, replace(reading, parts=parts))
    tokens = reading.x.shape[1]
    laws.check_documents_apart(graph, replace(reading, parts=(1,) * tokens, resets=((),) * tokens))


@probe()
def states_stand_for_what_was_read(name: str) -> None:
    """After saving, loading, forking, resetting, reordering, joining and detaching, rows go on as replays of their tokens."""
    Script(laws.built(fixed.graph(name))).run()


class Script:
    """A fixed run of operations on states, each result checked against a replay of the tokens of its rows."""

    def __init__(self, model: tg.Model) -> None:
        self.model, self.replay = model, Replay(model)
        self.state, self.rows = model.initial_state(3), [Row()] * 3

    def feed(self, count: int, numbers: list[int] | None = None) -> None:
        """Read ``count`` tokens a row, all of a row in the document of the given number."""
        assert self.state.position.tolist() == [row.position for row in self.rows]
        assert self.state.document.tolist() == [row.number for row in self.rows]
        batch = len(self.rows)
        tokens = torch.arange(batch * count).reshape(batch, count) * 5 % SMALL["vocab"]
        ids = None if numbers is None else torch.tensor(numbers)[:, None].expand(batch, count)
        y, self.state = self.replay.read(self.model, tokens, self.state, ids)
        for i, words in enumerate(tokens.tolist()):
            for word in words:
                self.rows[i] = self.rows[i].read(word, None if numbers is None else numbers[i])
            assert laws.error(y[i], self.replay.outputs(self.rows[i].documents)[-count:]) <= TOLERANCE

    def run(self) -> None:
        """Feed, and everything else in between."""
        self.feed(5)
        self.state = self.state.reset([1])
        self.rows[1] = Row()
        self.feed(6)
        before, rows = self.state, list(self.rows)
        fork = self.state.fork()
        self.feed(1)
        self.state, self.rows = fork.reorder([2, 1, 2, 0]), [rows[i] for i in (2, 1, 2, 0)]
        self.feed(1)
        self.state, self.rows = before.detach(), list(rows)
        assert not any(t.requires_grad for ts in self.state.nodes.values() for t in ts.values())
        self.feed(4, [0, 0, 1])
        with tempfile.TemporaryDirectory() as folder:
            self.state.save(Path(folder) / "state")
            self.state = tg.State.load(self.model, Path(folder) / "state")
        self.feed(1, [0, 1, 1])
        self.state, self.rows = self.state.join(before), [*self.rows, *rows]
        self.feed(3)


@probe()
def optional_passes_change_nothing(name: str) -> None:
    laws.check_passes(fixed.graph(name), fixed.reading(name))


@probe()
def files_hold_everything(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        laws.check_saved(fixed.graph(name), fixed.stream(name), Path(folder))


@probe()
def gradients_do_not_depend_on_the_split(name: str) -> None:
    laws.check_split_gradients(fixed.graph(name), fixed.reading(name))


STRIDE = 1e-6
"""Of central differences."""


@probe(*fixed.SMOOTH)
def gradients_are_slopes(name: str) -> None:
    """The gradient along a direction is the slope of the loss there, by central differences."""
    model, reading = laws.built(fixed.graph(name)), fixed.reading(name)
    gradients = laws.gradients(model, reading.read(model)[0], reading.x)
    generator = torch.Generator().manual_seed(3)
    way = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]

    def loss_at(distance: float) -> Tensor:
        with torch.no_grad():
            for p, d in zip(model.parameters(), way, strict=True):
                p.add_(d, alpha=distance)
            return laws.loss(reading.read(model)[0])

    slope = (loss_at(STRIDE) - loss_at(-2 * STRIDE)) / (2 * STRIDE)
    along = sum(float((g * d).sum()) for g, d in zip(gradients, way, strict=True))
    assert abs(float(slope) - along) <= 1e-6 * max(1.0, abs(along))


@probe()
def programs_are_the_naive_evaluation(name: str) -> None:
    laws.check_naive(fixed.graph(name), fixed.reading(name))


LOOPS = {"blocks/mac": paper.mac, "blocks/mag": paper.mag, "blocks/mal": paper.mal}


@probe(*LOOPS)
def equations_of_the_paper_hold(name: str) -> None:
    """MAC, MAG and MAL are plain loops over tokens written from the paper (tests/runtime/paper.py)."""
    model, x = laws.built(fixed.graph(name)), fixed.reading(name).x[:1]
    assert laws.error(model(x)[0][0], LOOPS[name](model.body, x[0], SMALL)) <= TOLERANCE


def by_recurrence(graph: Graph) -> Graph:
    """The graph with every memory computed token by token."""

    def changed(block: Block) -> Block:
        nodes = (
            replace(n, parameters={**n.parameters, "kernel": "reference"}) if "memory" in n.use else n for n in block.nodes
        )
        return replace(block, nodes=tuple(nodes))

    return replace(graph, main=changed(graph.main), blocks={name: changed(b) for name, b in graph.blocks.items()})


@probe("parts", "wired", "free", "blocks/lmm")
def a_memory_is_its_recurrence(name: str) -> None:
    """The chunk-parallel memory is the recurrence token by token, in outputs and gradients."""
    graph, reading = fixed.graph(name), fixed.reading(name)
    found = []
    for one in (laws.built(graph), laws.built(by_recurrence(graph))):
        outputs, _ = reading.read(one)
        found.append((outputs, laws.gradients(one, outputs, reading.x)))
    laws.same(found[0][0], found[1][0])
    laws.alike(found[0][1], found[1][1])


@probe("a memory")
def a_memory_function_goes_on_exactly(name: str) -> None:
    """``tg.neural_memory`` in parts, with rows reordered in between, gives what it gives at once."""
    machine = Memory()
    machine.start({"mlp": {"depth": 2, "hidden": 4}}, "l2", "after", 4, 3, True)
    state, rows = machine.held[0]
    for count in (5, 1, 6, 4):
        words = torch.arange(len(rows) * count).reshape(len(rows), count) * 7 % SMALL["vocab"]
        state, rows = machine.call(state, rows, words, "chunk")
        state, rows = state.detach().reorder(torch.tensor([2, 0, 2])), [rows[i] for i in (2, 0, 2)]


@probe("a memory")
def a_capped_memory_stays_bounded(name: str) -> None:
    """A linear memory that forgets nothing stays bounded at the cap, whatever its keys and its momentum."""
    stays_bounded("l2", 16, 0.9, 512)


@probe("a stand-in")
def training_goes_on_exactly(name: str) -> None:
    """A run that is stopped and started again has the losses and weights of one that was not."""
    with tempfile.TemporaryDirectory() as folder:
        whole, stopped = Path(folder) / "whole", Path(folder) / "stopped"
        training.run(whole)
        training.run(stopped, net=Stopping(3))
        training.run(stopped)
        assert losses(whole) == losses(stopped)
        want = weights(whole, 6)
        assert all(torch.equal(w, want[n]) for n, w in weights(stopped, 6).items())


@probe("transformer")
def an_evaluation_does_not_depend_on_its_pieces(name: str) -> None:
    """Bits per byte of one long stream are the same whatever pieces it is read in."""
    model = laws.built(tg.graph(name, vocab=256, dim=16, layers=1, heads=2))
    text = torch.arange(60, dtype=torch.uint8) * 7 % 50
    want = bits_per_byte(model, text, piece=59)
    for piece in (1, 7, 30):
        assert abs(bits_per_byte(model, text, piece=piece) - want) <= 1e-5


def says(name: str) -> str:
    """The first line of a law's docstring, which may stand with the check that it calls."""
    check: Callable[..., None] = PROBES[name].check
    if not check.__doc__:
        (called,) = {n for n in check.__code__.co_names if n.startswith("check_")}
        check = getattr(laws, called)
    return (check.__doc__ or "").split("\n")[0].replace("``", "`")


__all__ = ["PROBES", "Probe", "says"]
