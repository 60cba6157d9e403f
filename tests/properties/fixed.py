"""Fixed small models that the deliberate defects are looked for in: between them they use every component.

Models are built anew from these graphs for every check, never kept, because a defect may stand in what builds them.
"""

from __future__ import annotations

from dataclasses import replace

import torch

import titans_graph as tg
from tests.models import SMALL, parameters
from titans_graph.spec import read_text
from titans_graph.testing.strategies import Reading

PARTS = """
titans_graph: 1
name: parts
input: {x: [B, T, 8]}
segment: 8
nodes:
  normed: {use: norm.rms, in: x}
  near: {use: conv.causal, in: normed, kernel: 3, activation: silu, bias: true}
  memory:
    {use: memory.neural, write: near, ask: normed, read: before, heads: 2, chunk: 4, network: linear, conv: 0,
     objective: {huber: {delta: 0.5}}}
  far: {use: attention.full, in: normed, heads: 2, kv_heads: 1, qk_norm: true}
  inside: {use: attention.segment, in: normed, heads: 2}
  gated: {use: gate.sigmoid, in: [memory.recall, far]}
  stack: {use: layer, in: gated, repeat: 2}
  joined: {use: sequence.concat, in: [stack, near]}
  picked: {use: sequence.slice, in: joined, keep: near}
  mixed: {use: gate.residual, in: [stack, picked]}
  y: {use: add, in: [x, mixed, far, inside]}
output: y
blocks:
  layer:
    input: {x: [B, T, 8]}
    nodes:
      between: {use: norm.rms, in: x}
      hidden: {use: mlp.swiglu, in: between, hidden: 5}
      straight: {use: linear, in: between, bias: true, repeat: 2}
      y: {use: add, in: [x, hidden, straight]}
    output: y
"""
"""What the shipped blocks have not: a memory read before its write, full attention, nested and repeated blocks, slices."""

WIRED = """
titans_graph: 1
name: wired
input: {x: [B, T, 6]}
nodes:
  one: {use: straight, in: x}
  two: {use: crossed, in: one}
output: two
blocks:
  straight:
    input: {x: [B, T, 6]}
    nodes:
      a: {use: linear, in: x}
      b: {use: memory.neural, write: a, ask: x, read: chunk, heads: 2, chunk: 5, cap: none, max_step: 0.05,
          network: {mlp: {depth: 2, hidden: 3, bias: true, residual: true}}}
      y: {use: gate.residual, in: [a, b]}
    output: y
  crossed:
    input: {x: [B, T, 6]}
    nodes:
      a: {use: linear, in: x}
      b: {use: memory.neural, write: a, ask: x, read: chunk, heads: 2, chunk: 5, cap: none, max_step: 0.05,
          network: {mlp: {depth: 2, hidden: 3, bias: true, residual: true}}}
      y: {use: gate.residual, in: [b, a]}
    output: y
"""
"""Two blocks that differ in their wiring alone; a memory read at its chunk's first weights, without a cap."""

FREE = """
titans_graph: 1
name: free
input: {x: [B, T, 8]}
segment: 8
nodes:
  normed: {use: norm.rms, in: x}
  memory: {use: memory.neural, opening: normed, write: attended, ask: attended, heads: 2, chunk: 4, cap: none, max_step: 0.05,
           network: {mlp: {depth: 2, hidden: 3}}}
  prefix: {use: tokens.persistent, count: 2}
  context: {use: sequence.concat, in: [prefix, memory.recalled, normed]}
  attended: {use: attention.segment, in: context, keep: normed, heads: 2}
  near: {use: attention.window, in: attended, heads: 2, window: 5}
  mixed: {use: gate.product, in: [near, memory.recall]}
  y: {use: add, in: [x, mixed]}
output: y
"""
"""Memory as context without a cap, whose bound gradients do not pass: every gradient here is a slope."""

SHIPPED = ("blocks/lmm", "blocks/mag", "blocks/mac", "blocks/twin")
DECLARED = {"parts": PARTS, "wired": WIRED, "free": FREE}
SMOOTH = ("wired", "free", "transformer")
NAMES = ("transformer", *DECLARED, *SHIPPED)
LENGTH = 21
"""Tokens of an example: more than two segments, and part of a third."""


def graph(name: str) -> tg.Graph:
    """A graph, shipped or declared here."""
    if name not in DECLARED:
        return tg.graph(name, **{k: v for k, v in SMALL.items() if k in parameters(name)})
    return graph_of(DECLARED[name])


def graph_of(text: str) -> tg.Graph:
    """The graph of a spec without mistakes of form."""
    found = read_text(text)
    assert found.graph is not None, found.diagnostics
    return found.graph


def reading(name: str) -> Reading:
    """Two rows of a graph's input: seams in both, one at a segment's start, others inside chunks, one after a single token;
    four calls, one of them a single token, and one row that starts afresh between them."""
    generator = torch.Generator().manual_seed(0)
    (kind,) = graph(name).main.inputs.values()
    if kind.dim is None:
        x = torch.randint(0, SMALL["vocab"], (2, LENGTH), generator=generator)
    else:
        x = torch.randn(2, LENGTH, kind.dim, generator=generator, dtype=torch.float64)
    document = torch.zeros(2, LENGTH, dtype=torch.int64)
    for row, starts in enumerate(((8, 13), (3, 4, 18))):
        for start in starts:
            document[row, start:] += 1
    return Reading(x, document, (5, 9, 1, 6), ((), (), (), (1,)))


def stream(name: str) -> Reading:
    """The same tokens as one document a row, without resets."""
    found = reading(name)
    return replace(found, document=None, resets=((),) * len(found.parts))
