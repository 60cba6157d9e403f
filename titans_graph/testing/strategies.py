"""Strategies that draw valid graphs, memory networks, inputs and ways to cut them (needs hypothesis).

    from hypothesis import given
    from titans_graph.testing import strategies as tgs

    @given(tgs.graphs(), st.data())
    def test_mine(graph, data):
        model = tg.build(graph)
        ...

A failing example is noted as a spec that can be pasted into a file. Sizes are small, so that float64 on a CPU is quick.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import note
from hypothesis import strategies as st
from torch import Tensor

from titans_graph.ir import Block, Graph, Node, Ref
from titans_graph.shapes import stream
from titans_graph.spec import to_yaml

__all__ = ["graphs", "memory_networks", "network_graphs", "splits", "streams", "token_batches"]

HIDDEN = st.integers(1, 4)
PLAIN = ("silu", "gelu", "relu2", "tanh", "sigmoid", "norm.rms", "norm.layer", "scale")
SHORT: list[Any] = [
    "linear",
    {"mlp": {"depth": 1}},
    {"mlp": {"depth": 2, "hidden": 3}},
    {"swiglu": {"hidden": 3}},
    {"lowrank": {"rank": 2}},
]


def memory_networks(dim: int = 3) -> st.SearchStrategy[Any]:
    """Descriptions of memory networks for keys of size ``dim``: shorthands and graphs."""
    return st.sampled_from(SHORT) | network_graphs(dim)


@st.composite
def network_graphs(draw: st.DrawFn, dim: int = 3) -> dict[str, Any]:
    """A memory network declared as a graph of up to a dozen nodes, for keys of size ``dim``.

    Every node is read, sizes agree, weights may be used twice; the last node has size ``dim``.
    """
    nodes: dict[str, Any] = {}
    sizes, unread = {"x": dim}, set[str]()
    shared: list[tuple[str, int, int]] = []

    def add(name: str, use: str, inputs: list[str], width: int, **options: Any) -> str:
        nodes[name] = {"use": use, "in": inputs, **options}
        sizes[name] = width
        unread.difference_update(inputs)
        unread.add(name)
        return name

    uses = st.sampled_from(["fast.linear", "fast.linear", "fast.bias", "fast.gain", "tied", "add", "product", *PLAIN])
    for i in range(draw(st.integers(1, 6))):
        use, name, source = draw(uses), f"n{i}", draw(st.sampled_from(sorted(sizes)))
        ties = [(w, b) for w, a, b in shared if a == sizes[source]]
        if use == "tied" and ties:
            weight, size = draw(st.sampled_from(ties))
            add(name, "fast.linear", [source], size, weight=weight, size=size)
        elif use in ("fast.linear", "tied"):
            size = draw(HIDDEN)
            shared.append((add(name, "fast.linear", [source], size, size=size), sizes[source], size))
        elif use in ("add", "product"):
            alike = sorted(n for n, s in sizes.items() if s == sizes[source])
            add(name, use, [source, draw(st.sampled_from(alike))], sizes[source])
        else:
            extra = {"eps": 0.01} if use.startswith("norm") else {"by": 0.5} if use == "scale" else {}
            add(name, use, [source], sizes[source], **extra)
    ends = [add(f"end{i}", "fast.linear", [name], dim) for i, name in enumerate(sorted(unread))]
    if len(ends) > 1:
        add("y", "add", ends, dim)
    return {"nodes": nodes}


class _Draft:
    """A block under construction: streams of one feature size, and which of them nobody reads yet."""

    def __init__(self, draw: st.DrawFn, dim: int, segment: int | None) -> None:
        self.draw, self.dim, self.segment = draw, dim, segment
        self.nodes: list[Node] = []
        self.streams = [Ref("x")]
        self.unread = {Ref("x")}

    def add(self, use: str, parameters: dict[str, Any] | None = None, repeat: int = 1, **inputs: Any) -> Ref:
        """A node; an input is a reference or a list of them."""
        name = f"{use.replace('.', '_')}_{len(self.nodes)}"
        tuples = {port: (refs,) if isinstance(refs, Ref) else tuple(refs) for port, refs in inputs.items()}
        self.nodes.append(Node(name, use, parameters or {}, tuples, repeat))
        self.unread.difference_update(*tuples.values())
        return Ref(name)

    def stream(self, ref: Ref) -> None:
        """Offer a node's output to later nodes."""
        self.streams.append(ref)
        self.unread.add(ref)

    def pick(self) -> Ref:
        """Some stream, rather a late or unread one."""
        return self.draw(st.sampled_from([*sorted(self.unread, key=lambda r: r.node), *self.streams[-3:]]))

    def heads(self) -> dict[str, Any]:
        """Heads that divide the feature size, and rotary positions only where they fit."""
        heads = self.draw(st.sampled_from([h for h in (1, 2, 3) if self.dim % h == 0]))
        found: dict[str, Any] = {"heads": heads}
        if (self.dim // heads) % 2 or self.draw(st.booleans()):
            found["rotary"] = None
        if self.draw(st.booleans()):
            found |= {"kv_heads": 1, "qk_norm": True}
        return found

    def attention(self, source: Ref, keep: str | None = None) -> Ref:
        """Attention of some reach."""
        kinds = ["attention.full", "attention.window", "attention.segment"]
        use, p = self.draw(st.sampled_from(kinds)), self.heads()
        if use == "attention.window":
            p["window"] = self.draw(st.integers(1, 6))
        if use == "attention.segment" and self.segment is None:
            p["segment"] = self.draw(st.integers(1, 6))
        return self.add(use, p if keep is None else {**p, "keep": keep}, x=source)

    def memory(self, **inputs: Ref) -> Ref:
        """A neural memory with every switch drawn."""
        draw, heads = self.draw, self.draw(st.sampled_from([h for h in (1, 2, 3) if self.dim % h == 0]))
        chunks = [c for c in (1, 2, 3, 4, 5, 8) if self.segment is None or self.segment % c == 0]
        p: dict[str, Any] = {
            "heads": heads,
            "chunk": draw(st.sampled_from(chunks)),
            "network": draw(memory_networks(self.dim // heads)),
            "objective": draw(st.sampled_from(["l2", {"huber": {"delta": 0.5}}])),
            "read": draw(st.sampled_from(["after", "before", "chunk"])),
            "conv": draw(st.sampled_from([0, 2, 4])),
        }
        p |= {key: draw(st.booleans()) for key in ("momentum", "forget", "output_gate")}
        if draw(st.booleans()):
            p |= {"cap": "none", "max_step": 0.01}
        return self.add("memory.neural", p, 1, **inputs)


def _pointwise(d: _Draft) -> None:
    draw = d.draw
    choices: dict[str, Any] = {
        "norm.rms": {},
        "linear": {"bias": draw(st.booleans())},
        "mlp.swiglu": {"hidden": draw(HIDDEN)},
        "conv.causal": {"kernel": draw(st.integers(2, 4)), "activation": draw(st.sampled_from(["none", "silu"]))},
    }
    use = draw(st.sampled_from(sorted(choices)))
    d.stream(d.add(use, choices[use], x=d.pick()))


def _pair(d: _Draft) -> None:
    use = d.draw(st.sampled_from(["add", "gate.product", "gate.residual", "gate.sigmoid"]))
    d.stream(d.add(use, x=[d.pick(), d.pick()]))


def _attention(d: _Draft) -> None:
    if d.draw(st.booleans()):
        d.stream(d.attention(d.pick()))
        return
    own = d.add("norm.rms", x=d.pick())
    pieces = [d.add("tokens.persistent", {"count": d.draw(st.integers(0, 3)), "dim": d.dim})]
    if d.draw(st.booleans()):
        pieces.append(d.add("linear", x=d.pick()))
    d.stream(d.attention(d.add("sequence.concat", x=[*pieces, own]), keep=own.node))


def _slice(d: _Draft) -> None:
    own = d.add("norm.rms", x=d.pick())
    joined = d.add("sequence.concat", x=[d.add("linear", x=d.pick()), own])
    d.stream(d.add("sequence.slice", {"keep": own.node}, x=joined))


def _memory(d: _Draft) -> None:
    asks = {"ask": d.pick()} if d.draw(st.booleans()) else {}
    d.stream(d.memory(write=d.pick(), **asks))


def _loop(d: _Draft) -> None:
    """Memory as context: the memory opens the segment, and learns what attention made of it."""
    if d.segment is None:
        _memory(d)
        return
    own = d.add("norm.rms", x=d.pick())
    at = len(d.nodes)
    memory = d.memory(opening=own)
    context = d.add("sequence.concat", x=[Ref(memory.node, "recalled"), own])
    attended = d.attention(context, keep=own.node)
    node = d.nodes[at]
    d.nodes[at] = Node(node.name, node.use, node.parameters, {**node.inputs, "write": (attended,), "ask": (attended,)})
    d.stream(memory)
    d.stream(attended)


RECIPES = (_pointwise, _pair, _attention, _slice, _memory, _loop)


@st.composite
def _blocks(draw: st.DrawFn, name: str, dim: int, inner: list[Block], steps: int) -> Block:
    segment = draw(st.sampled_from([None, 4, 6, 8]))
    d = _Draft(draw, dim, segment)
    for _ in range(draw(st.integers(1, steps))):
        kind: Any = draw(st.sampled_from([*RECIPES, *inner * 3]))
        if isinstance(kind, Block):
            d.stream(d.add(kind.name, repeat=draw(st.integers(1, 3)), x=d.pick()))
        else:
            kind(d)
    ends = sorted(d.unread, key=lambda r: r.node)
    out = d.add("add", x=ends) if len(ends) > 1 else ends[0]
    return Block(name, {"x": stream(dim, "x")}, tuple(d.nodes), {out.node: out}, segment)


@st.composite
def graphs(draw: st.DrawFn, max_nodes: int = 4) -> Graph:
    """A valid graph on a stream ``[B, T, dim]``: nested and repeated blocks, memories, attention, feedback through state.

    ``max_nodes``: how many steps a block has, each of one to four nodes. The spec is noted, so that a failing example
    prints as a file.
    """
    dim = draw(st.sampled_from([4, 6, 3, 2]))
    inner = [draw(_blocks(f"part{i}", dim, [], 2)) for i in range(draw(st.integers(0, 1)))]
    main = draw(_blocks("main", dim, inner, max_nodes))
    used = {n.use for n in main.nodes}
    graph = Graph("drawn", main, {b.name: b for b in inner if b.name in used})
    note(f"--- spec ---\n{to_yaml(graph)}")
    return graph


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
