"""Graphs that may leak: how they are drawn, whether they do, and why one is refused that does not.

The checker judges by declarations, port by port, and refuses a leak wherever it may reach an output. Some refused graphs
do not leak; every reason for that is in :data:`REASONS`, and a refusal with no reason among them is a fault.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from tests.properties.naive import Evaluation
from titans_graph.ir import Graph, Ref
from titans_graph.lowering.lowered import build_modules
from titans_graph.passes import Compilation
from titans_graph.passes.pipeline import check
from titans_graph.shapes import Dependence
from titans_graph.testing.strategies import Draft, recipe_of

REASONS = {
    "one token": "the leaking segment holds a single token, so that there are no later ones in it",
    "piece not read": "the leak is in a piece of a sequence that a later slice leaves out",
    "delay": "the leak passes a state that is read late enough; it is refused because it could not be streamed",
    "no effect": "a memory with a step of 0 that does not forget learns nothing of it",
}


def _plain(d: Draft, leak: Ref, own: Ref) -> Ref:
    return leak


def _joined(d: Draft, leak: Ref, own: Ref) -> Ref:
    return d.add(d.choose("add", "gate.sigmoid"), x=[own, leak])


def _dropped(d: Draft, leak: Ref, own: Ref) -> Ref:
    joined = d.add("sequence.concat", x=[leak, own])
    if d.flag():
        joined = d.add("norm.rms", x=joined)
    return d.add("sequence.slice", {"keep": d.choose(own, leak).text()}, x=joined)


def _memory(d: Draft, **changes: Any) -> dict[str, Any]:
    return {"heads": 1, "chunk": d.choose(2, 4), "network": "linear", "conv": d.choose(0, 2), **changes}


def _recalled(d: Draft, leak: Ref, own: Ref) -> Ref:
    memory = d.add("memory.neural", _memory(d), opening=own, write=leak)
    return Ref(memory.node, "recalled")


def _late(d: Draft, leak: Ref, own: Ref) -> Ref:
    return d.add("memory.neural", _memory(d, read=d.choose("chunk", "before")), ask=own, write=leak)


def _idle(d: Draft, leak: Ref, own: Ref) -> Ref:
    return d.add("memory.neural", _memory(d, max_step=d.choose(0.0, 0.5), forget=d.flag()), ask=own, write=leak)


WRAPS: tuple[Callable[[Draft, Ref, Ref], Ref], ...] = (_plain, _joined, _dropped, _recalled, _late, _idle)
_AROUND = ("norm.rms", "linear", "conv.causal", "attention.window", "gate.sigmoid", "add")


@st.composite
def candidates(draw: st.DrawFn) -> Graph:
    """Graphs with an attention over whole segments, later tokens too, whose result reaches an output in some way or not."""
    d = Draft(draw, 4, 4)
    own = d.add("norm.rms", x=Ref("x"))
    for _ in range(d.number(0, 1)):
        recipe_of(d.choose(*_AROUND)).build(d)
    p = {"heads": 1, "rotary": None, "segment": d.choose(4, 2, 1), "causal": False}
    leak = d.add("attention.segment", p, x=d.pick())
    for _ in range(d.number(1, 2)):
        leak = d.choose(*WRAPS)(d, leak, own)
    d.offer(leak)
    for _ in range(d.number(0, 1)):
        recipe_of(d.choose(*_AROUND)).build(d)
    return Graph("candidate", d.block("main", d.flag()))


def judged(graph: Graph) -> Compilation:
    """What the checks find out, mistakes and all."""
    return check(graph)


def leaks(graph: Graph, c: Compilation, tokens: int = 9) -> bool:
    """Whether some later token changes an earlier output, by evaluating the graph as it is declared.

    Bit by bit: the evaluation does the same to every token whatever follows it, and a leak may be small (a norm hides all
    but a millionth of how much a linear memory forgot).
    """
    torch.manual_seed(0)
    body: nn.Module = build_modules(c).double()
    with torch.no_grad():
        for p in body.parameters():
            p.add_(0.3 * torch.randn_like(p))
        x, other = torch.randn(2, tokens, 4, dtype=torch.float64)
        want = Evaluation(graph, body, x).outputs()
        for cut in range(1, tokens):
            got = Evaluation(graph, body, torch.cat([x[:cut], other[cut:]])).outputs()
            if not all(torch.equal(got[n][:cut], y[:cut]) for n, y in want.items()):
                return True
    return False


def reason(c: Compilation) -> tuple[str, ...] | None:
    """The fewest reasons that together explain why no leak reaches an output; None where they do not."""
    sources = [n for n, site in c.sites.items() if any(d.leaks for d in c.nodes[n].component.dependences(site))]
    for count in range(1, len(REASONS) + 1):
        for some in itertools.combinations(REASONS, count):
            if not any(_reaches(c, source, some) for source in sources):
                return some
    return None


def _reaches(c: Compilation, source: str, reasons: Collection[str]) -> bool:
    """Whether a leak reaches an output although what the reasons explain is left out."""
    if "one token" in reasons and c.sites[source].parameters.segment == 1:
        return False
    tainted = {Ref(source, "out"): {0}}
    while True:
        before = {ref: set(pieces) for ref, pieces in tainted.items()}
        for name in c.sites:
            for target, pieces in _passed(c, name, before, reasons):
                tainted.setdefault(target, set()).update(pieces)
        if tainted == before:
            return any(tainted.get(ref) for ref in c.outputs.values())


def _passed(
    c: Compilation, name: str, tainted: dict[Ref, set[int]], reasons: Collection[str]
) -> Iterator[tuple[Ref, set[int]]]:
    """Which pieces of a node's outputs a leak gets to."""
    node, site = c.nodes[name], c.sites[name]
    for d in node.component.dependences(site):
        found: set[int] = set()
        offset = 0
        for ref in node.inputs[d.source]:
            found |= {offset + piece for piece in tainted.get(ref, ())}
            offset += len(c.types[ref].pieces)
        if not found or _explained(node.use, site.parameters, d, reasons):
            continue
        target = Ref(name, d.target)
        every = set(range(len(c.types[target].pieces)))
        if "piece not read" not in reasons:
            yield target, every
        elif node.use == "sequence.slice":
            (value,) = site.inputs["x"]
            kept = [piece.name for piece in value.pieces].index(site.parameters.keep)
            yield target, {0} if kept in found else set()
        else:
            yield target, found if len(every) > 1 else every


def _explained(use: str, parameters: Any, d: Dependence, reasons: Collection[str]) -> bool:
    """Whether one of the reasons says that nothing, or nothing in time, passes here."""
    if "delay" in reasons and (d.delayed or (d.kind == "causal" and d.reach > 0)):
        return True
    silent = use == "memory.neural" and d.source == "write" and parameters.max_step == 0 and not parameters.forget
    return "no effect" in reasons and silent
