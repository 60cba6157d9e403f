"""Good inputs, from which bad ones are made: every shipped spec, and small ones that use all of the language."""

from __future__ import annotations

import functools
import json
from typing import Any

import titans_graph as tg
from titans_graph.spec import find, shipped

WIDE = """\
titans_graph: 1
name: wide
parameters: {dim: 8, heads: 2, network: {mlp: {depth: 2, hidden: $dim // 2}}, extra: null}
input: {x: [B, T, $dim]}
segment: 8
nodes:
  a: {use: inner, in: x, repeat: 2, width: $dim * 2}
  b: {use: conv.causal, in: a, kernel: 3}
  c: {use: attention.full, in: b, heads: $heads}
  d: {use: attention.window, in: c, heads: $heads, window: 3}
  e: {use: memory.neural, write: d, heads: $heads, chunk: 4, network: $network, objective: {huber: {delta: 0.5}}}
  f: {use: gate.sigmoid, in: [d, e]}
  y: {use: gate.residual, in: [x, f]}
output: {y: y, other: f}
blocks:
  inner:
    parameters: {width: 4}
    input: {x: [B, T, dim]}
    nodes:
      h: {use: linear, in: x, dim: $width}
      back: {use: linear, in: h, dim: $dim}
      m: {use: mlp.swiglu, in: back, hidden: $width}
    output: m
"""
MERGED = """\
titans_graph: 1
input: {x: [B, T, 4]}
nodes:
  a: &n {use: norm.rms, in: x}
  b: {<<: *n, in: a, eps: 1e-3}
  c: {<<: [*n, {eps: 0.5}], in: b}
  s: {use: sequence.concat, in: [p, c]}
  p: {use: tokens.persistent, count: 2, dim: 4}
  t: {use: attention.segment, in: s, keep: c, segment: 4, heads: 1}
output: t
"""
LOOP = """\
titans_graph: 1
input: {tokens: [B, T]}
segment: 4
nodes:
  e: {use: embedding, in: tokens, vocab: 11, dim: 6}
  m: {use: memory.neural, opening: e, write: y, ask: y, chunk: 2, heads: 1, network: {lowrank: 2}}
  y: {use: add, in: [e, m.recalled]}
  z: {use: head.linear, in: [m.recall], vocab: 11}
output: z
"""
NETWORKS: tuple[Any, ...] = (
    "linear",
    "mlp",
    {"mlp": 3},
    {"mlp": {"depth": 2, "hidden": 5, "activation": "gelu", "residual": True, "norm": True, "output_norm": True, "bias": True}},
    {"swiglu": {"hidden": "3*dim/2"}},
    {"lowrank": {"rank": "dim/4"}},
    {"nodes": {"down": {"use": "fast.linear", "in": "x", "size": 8}, "act": {"use": "tanh"}, "y": {"use": "fast.linear"}}},
    {
        "nodes": {
            "n": {"use": "norm.rms", "in": "x", "eps": 0.01},
            "g": {"use": "fast.gain", "in": "n"},
            "b": {"use": "fast.bias", "in": ["g"]},
            "h": {"use": "fast.linear", "in": "b", "size": "2*dim"},
            "s": {"use": "scale", "in": "h", "by": -0.5},
            "t": {"use": "fast.linear", "in": "s", "weight": "back"},
            "u": {"use": "fast.linear", "in": "h", "weight": "back"},
            "p": {"use": "product", "in": ["t", "u"]},
            "y": {"use": "residual", "in": ["x", "p"]},
        },
        "output": "y",
    },
)
OBJECTIVES: tuple[Any, ...] = ("l2", "dot", {"huber": {"delta": 1.0}}, {"lp": {"p": 3}}, {"l2": {}})


def _dumped(values: tuple[Any, ...]) -> tuple[bytes, ...]:
    return tuple(json.dumps(value).encode() for value in values)


@functools.cache
def specs() -> tuple[bytes, ...]:
    """Spec files."""
    small = tuple(s.encode() for s in (WIDE, MERGED, LOOP))
    return small * 4 + tuple(find(name).read_bytes() for name in shipped())


@functools.cache
def graph_texts() -> tuple[bytes, ...]:
    """Graphs as text."""
    return tuple(tg.graph(name).text().encode() for name in shipped())


def networks() -> tuple[bytes, ...]:
    """Descriptions of memory networks, as JSON."""
    return _dumped(NETWORKS)


def objectives() -> tuple[bytes, ...]:
    """Descriptions of objectives, as JSON."""
    return _dumped(OBJECTIVES)
