"""Components without torch, so that the tests of the language depend on no real one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from titans_graph import registry
from titans_graph.registry import Component, Port, SiteError, parameter


@dataclass(frozen=True)
class NoParameters:
    pass


@dataclass(frozen=True)
class NormParameters:
    eps: float = parameter(1e-6, doc="added to the mean square", minimum=0.0)


@dataclass(frozen=True)
class EmbeddingParameters:
    vocab: int = parameter(doc="number of tokens", minimum=1)
    dim: int = parameter(doc="features", minimum=1)


@dataclass(frozen=True)
class MemoryParameters:
    chunk: int = parameter(64, doc="tokens per chunk", minimum=1)
    heads: int = parameter(1, doc="number of heads", minimum=1)
    network: Mapping[str, Any] | None = parameter(None, doc="the memory's network")
    objective: str = parameter("l2", doc="what is minimised", choices=("l2", "dot"))

    def __post_init__(self) -> None:
        if self.chunk % self.heads:
            raise SiteError("chunk is no multiple of heads", key="heads")


@dataclass(frozen=True)
class AttentionParameters:
    heads: int = parameter(4, doc="number of heads", minimum=1)
    keep: str = parameter("", doc="the piece whose queries are computed")


@dataclass(frozen=True)
class AnyParameters:
    value: Any = parameter(None, doc="anything")  # noqa: RUF009
    other: Any = parameter(None, doc="anything")  # noqa: RUF009


class Norm(Component):
    Parameters = NormParameters
    inputs = (Port("x", "features"),)


class Embedding(Component):
    Parameters = EmbeddingParameters
    inputs = (Port("x", "tokens", accepts="ids"),)
    outputs = (Port("out", "features"), Port("table", "the table"))


class TiedHead(Component):
    Parameters = NoParameters
    inputs = (Port("x", "features"), Port("table", "the embedding's table", accepts="fixed"))


class Add(Component):
    Parameters = NoParameters
    inputs = (Port("x", "summands", many=True),)


class Memory(Component):
    Parameters = MemoryParameters
    inputs = (
        Port("write", "keys and values"),
        Port("ask", "queries", required=False),
        Port("opening", "queries at the start of the segment", required=False),
    )
    outputs = (Port("recall", "answers to ask"), Port("recalled", "answers to opening"))


class Attention(Component):
    Parameters = AttentionParameters
    inputs = (Port("x", "the sequence to attend over", accepts="sequence"),)


class Tokens(Component):
    Parameters = NoParameters
    inputs = ()


class Anything(Component):
    Parameters = AnyParameters
    inputs = (Port("x", "values", many=True, required=False), Port("y", "more", many=True, required=False))
    outputs = (Port("out", "a result"), Port("rest", "another"))


TABLE = {
    "norm.fake": "Norm",
    "embedding.fake": "Embedding",
    "head.fake": "TiedHead",
    "add.fake": "Add",
    "memory.fake": "Memory",
    "attention.fake": "Attention",
    "tokens.fake": "Tokens",
    "any.fake": "Anything",
}
TARGETS = {name: f"tests.ir.fakes:{attribute}" for name, attribute in TABLE.items()}


@contextmanager
def installed() -> Iterator[None]:
    """While entered, these components are the only ones there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "TABLE", dict(TARGETS))
        patch.setattr(registry, "_plugins", dict)
        registry.lookup.cache_clear()
        yield
    registry.lookup.cache_clear()
