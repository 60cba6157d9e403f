"""Inputs of models, and ways to read them: cut into calls, packed with documents, rows that start afresh."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from titans_graph.ir import Graph

if TYPE_CHECKING:
    from titans_graph.runtime import Model, State


def splits(total: int, max_parts: int = 6) -> st.SearchStrategy[list[int]]:
    """Ways to cut ``total`` tokens into up to ``max_parts`` calls: their lengths, 0 among them."""

    def parts(marks: list[int]) -> list[int]:
        return [b - a for a, b in itertools.pairwise([0, *sorted(marks), total])]

    return st.lists(st.integers(0, total), max_size=max_parts - 1).map(parts)


def token_batches(vocab: int, max_batch: int = 3, max_tokens: int = 40) -> st.SearchStrategy[Tensor]:
    """Token ids ``[B, T]`` int64 of at least one row and one token."""

    def ids(drawn: tuple[int, int, int]) -> Tensor:
        batch, tokens, seed = drawn
        return torch.randint(0, vocab, (batch, tokens), generator=torch.Generator().manual_seed(seed))

    return st.tuples(st.integers(1, max_batch), st.integers(1, max_tokens), st.integers(0, 99)).map(ids)


def streams(dim: int, max_batch: int = 3, max_tokens: int = 40) -> st.SearchStrategy[Tensor]:
    """Normal features ``[B, T, dim]`` float64 of at least one row and one token."""

    def features(drawn: tuple[int, int, int]) -> Tensor:
        batch, tokens, seed = drawn
        return torch.randn(batch, tokens, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return st.tuples(st.integers(1, max_batch), st.integers(1, max_tokens), st.integers(0, 99)).map(features)


def documents(batch: int, tokens: int, max_documents: int = 4) -> st.SearchStrategy[Tensor]:
    """Document ids ``[batch, tokens]`` int64: each row holds up to ``max_documents``, cut at places of its own.

    An id may come back later in the row; that is another document.
    """

    def ids(rows: list[list[int]]) -> Tensor:
        counts = [[sum(mark <= t for mark in marks) for t in range(tokens)] for marks in rows]
        return torch.tensor(counts, dtype=torch.int64).reshape(batch, tokens) % 3

    marks = st.lists(st.integers(0, tokens), max_size=max_documents - 1, unique=True)
    return st.lists(marks, min_size=batch, max_size=batch).map(ids)


def vocabulary(graph: Graph) -> int:
    """How many token ids every embedding of a graph knows; 0 without embeddings."""
    nodes = [node for block in (graph.main, *graph.blocks.values()) for node in block.nodes]
    return min((int(node.parameters["vocab"]) for node in nodes if node.use == "embedding"), default=0)


class Run(NamedTuple):
    """Tokens ``start .. stop - 1`` of a row that are one document, or the part of one after the row was reset."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Reading:
    """An input and a way to read it.

    ``x`` ``[B, T]`` or ``[B, T, dim]``; ``document`` ids ``[B, T]`` or None; ``parts`` the lengths of the calls; ``resets``
    for each call the rows that are reset before it, so that rows stand at different positions.
    """

    x: Tensor
    document: Tensor | None
    parts: tuple[int, ...]
    resets: tuple[tuple[int, ...], ...]

    def runs(self) -> list[Run]:
        """What each output may depend on: every row cut where a document begins or the row is reset."""
        rows, tokens = self.x.shape[:2]
        starts = [0, *itertools.accumulate(self.parts)][:-1]
        found = []
        for row in range(rows):
            cuts = {0} | {at for at, reset in zip(starts, self.resets, strict=True) if row in reset}
            if self.document is not None:
                cuts |= {t for t in range(1, tokens) if self.document[row, t] != self.document[row, t - 1]}
            edges = [*sorted(cut for cut in cuts if cut < tokens), tokens]
            found += [Run(row, a, b) for a, b in itertools.pairwise(edges)]
        return found

    def read(self, model: Model, state: State | None = None) -> tuple[dict[str, Tensor], State]:
        """Every output of the model by name, ``[B, T, ...]``, and the state after the last call."""
        made: list[dict[str, Tensor]] = []
        at = 0
        for length, rows in zip(self.parts, self.resets, strict=True):
            if rows and state is not None:
                state = state.reset(rows)
            ids = None if self.document is None else self.document[:, at : at + length]
            y, state = model(self.x[:, at : at + length], state, document=ids)
            made.append(named_outputs(model, y))
            at += length
        assert state is not None
        return {name: torch.cat([part[name] for part in made], 1) for name in made[0]}, state

    def whole(self) -> Reading:
        """The same tokens and documents in one call, without resets."""
        return Reading(self.x, self.document, (self.x.shape[1],), ((),))


def named_outputs(model: Model, y: Any) -> dict[str, Tensor]:
    """The outputs of a call by name, however many the graph has."""
    return dict(y) if isinstance(y, dict) else dict.fromkeys(model.graph.main.outputs, y)


@st.composite
def readings(draw: st.DrawFn, graph: Graph, max_batch: int = 3, max_tokens: int = 24) -> Reading:
    """Ways to read some input of a graph: any split, packed documents or not, rows reset between calls or not."""
    (kind,) = graph.main.inputs.values()
    if kind.dim is None:
        x = draw(token_batches(vocabulary(graph), max_batch, max_tokens))
    else:
        x = draw(streams(kind.dim, max_batch, max_tokens))
    rows, tokens = x.shape[:2]
    document = draw(st.none() | documents(rows, tokens))
    parts = tuple(draw(splits(tokens)))
    chosen = st.lists(st.integers(0, rows - 1), unique=True, max_size=rows).map(tuple)
    some = st.tuples(*[chosen for _ in parts])
    resets = draw(st.just(tuple(() for _ in parts)) | some)
    return Reading(x, document, parts, resets)
