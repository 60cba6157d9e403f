"""The C++ function of a recorded program: all of its steps for one row after the other, in a small work space.

A row's values (1 MB for the backward of a chunk of 64 tokens at 64 -> 256 -> 64) stay in the processor's second cache from
step to step, where whole operations on all rows would send each value to the third and back; and a step costs the call of a
function, not the dispatch and the allocations of an operation.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from titans_graph.kernels.native_program import HEAD, Call, Pack, PackedSum, Program, RunningSum, Step, Sum, Unsupported, Value

C_TYPES = {torch.float32: "float", torch.float64: "double", torch.bool: "bool", torch.int64: "int64_t", torch.bfloat16: "char"}
"""Types of values; packed pieces are read by the tile."""

LINE = 64
"""Bytes of a cache line: where every value begins."""

PREFIX = "#include <torch/csrc/inductor/cpp_prefix.h>"


class Source(NamedTuple):
    """``text`` of a C++ file, ``space``: bytes of work space a thread, ``results``: shapes of a row and names of types."""

    text: str
    space: int
    results: list[tuple[list[int], str]]


@cache
def header(name: str) -> str:
    """The C++ text of native_``name``.h."""
    return Path(__file__).with_name(f"native_{name}.h").read_text().replace("#pragma once\n", "")


def source_of(program: Program) -> Source:
    """The C++ function of a program recorded for one row.

    ``body(table, calls, row, thread, space)`` is that of a ``Part`` (native_calls.h): ``calls`` calls for one row, in a work
    space of the thread. ``run`` is ``run_parts``, which takes the parts of other files as well; ``once`` is one call.
    """
    writer = _Writer(program)
    loop = "\n".join(f"    {line}" for step in program.steps for line in writer.step(step))
    copies = "\n".join(f"    {line}" for line in writer.copies())
    tiled = any(isinstance(step, PackedSum) for step in program.steps)
    width = program.arguments + len(program.results)
    text = f"""{PREFIX}
#include <algorithm>
#include <cstring>
{header("calls")}
{header("products")}
{header("pieces") if tiled else ""}
{writer.kernels()}
extern "C" void body(const titans_graph::Place* table, int64_t calls, int64_t row, int64_t thread, char* space) {{
  using namespace titans_graph;
  {"begin_tiles();" if tiled else ""}
  for (int64_t c = 0; c < calls; c++, table += {width}) {{
    char* at[{width}];
    for (int64_t i = 0; i < {width}; i++) at[i] = table[i].start + row * table[i].row + thread * table[i].thread;
{loop}
{copies}
  }}
  {"end_tiles();" if tiled else ""}
}}
extern "C" void run(const titans_graph::Part* parts, int64_t count, int64_t rows, int64_t threads, char* spaces,
                    int64_t bytes) {{
  titans_graph::run_parts(parts, count, rows, threads, spaces, bytes);
}}
extern "C" void once(const titans_graph::Place* table, int64_t rows, int64_t threads, char* spaces, int64_t bytes) {{
  titans_graph::run_once(body, table, rows, threads, spaces, bytes);
}}
"""
    results = [(list(v.size[1:]), C_TYPES[v.dtype]) for v in program.results]
    return Source(text, writer.top + writer.scratch, results)


class _Writer:
    def __init__(self, program: Program) -> None:
        self.program = program
        # Where a result has a storage of its own it is written in place; a result that is part of another is copied.
        self.placed: dict[int, int] = {}
        for number, v in enumerate(program.results):
            whole = v.offset == 0 and prod(v.size) == program.slots[v.slot][0] and v.slot >= program.arguments
            if not v.dense or v.size[0] != 1:
                raise Unsupported("a result with gaps")
            if whole and v.slot not in self.placed:
                self.placed[v.slot] = number
        self.at, self.top = self._plan()
        self.scratch = max((self._transposed(step) for step in program.steps if isinstance(step, Sum)), default=0)

    def _plan(self) -> tuple[dict[int, int], int]:
        """Where in the work space every storage lies, from its first step to its last, and how long the space is."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for time, step in enumerate(self.program.steps):
            for v in step.values:
                first.setdefault(v.slot, time)
                last[v.slot] = time
        last.update({v.slot: len(self.program.steps) for v in self.program.results})
        at: dict[int, int] = {}
        for slot in sorted(first, key=lambda s: (first[s], s)):
            if slot >= self.program.arguments and slot not in self.placed:
                alive = sorted((at[s], self._bytes(s)) for s in at if last[s] >= first[slot])
                at[slot] = _gap(alive, self._bytes(slot))
        return at, max((at[s] + self._bytes(s) for s in at), default=0)

    def _bytes(self, slot: int) -> int:
        """Whole cache lines and one more, so that storages of the same round size do not share the sets of a cache."""
        count, dtype = self.program.slots[slot]
        return _lines(count * dtype.itemsize) + LINE

    def _transposed(self, step: Sum) -> int:
        """Bytes that a sum needs for what it transposes."""
        return sum(_lines(prod(v.size[1:]) * v.dtype.itemsize) for v in step.right if _by_columns(v))

    def kernels(self) -> str:
        """Inductor's kernels as functions with numbers."""
        texts = []
        for number, text in enumerate(self.program.kernels):
            if text.count(HEAD) != 1:
                raise Unsupported("a kernel that begins in another way")
            texts.append(text.replace(PREFIX, "").replace(HEAD, f"static void kernel_{number}("))
        return "\n".join(texts)

    def pointer(self, v: Value) -> str:
        """The address of a value's first entry."""
        kind = C_TYPES[v.dtype]
        if v.slot < self.program.arguments:
            return f"reinterpret_cast<const {kind}*>(at[{v.slot}]) + {v.offset}"
        if v.slot in self.placed:
            return f"{self.result(self.placed[v.slot])} + {v.offset}"
        return f"reinterpret_cast<{kind}*>(space + {self.at[v.slot]}) + {v.offset}"

    def result(self, number: int) -> str:
        """The address of a result."""
        return f"reinterpret_cast<{C_TYPES[self.program.results[number].dtype]}*>(at[{self.program.arguments + number}])"

    def matrix(self, v: Value) -> str:
        """The address of matrix ``g`` of a value ``[G, ..., M, K]``."""
        return f"{self.pointer(v)} + g * {v.stride[0]}"

    def step(self, step: Step) -> Iterator[str]:
        """The statements of one step."""
        match step:
            case Call(kernel, values):
                yield f"kernel_{kernel}({', '.join(map(self.pointer, values))});"
            case Sum(_, _, signs, out):
                kind = C_TYPES[out.dtype]
                one = out.size[1] == 1 and all(a.stride[2] == 1 or a.size[2] == 1 for a in step.left)
                order = sorted(range(len(signs)), key=lambda i: (one and _by_columns(step.right[i]), signs[i]))
                terms = ", ".join(self._term(step, i) for i in order)
                yield f"for (int64_t g = 0; g < {out.size[0]}; g++) {{ Product<{kind}> terms[] = {{{terms}}};"
                if one:
                    yield f"  row_of_products<{kind}>(terms, {len(signs)}, {self.matrix(out)}, {out.size[2]}); }}"
                    return
                yield f"  auto* scratch = reinterpret_cast<{kind}*>(space + {self.top});"
                place = f"{self.matrix(out)}, {out.size[1]}, {out.size[2]}"
                yield f"  sum_of_products<{kind}>(terms, {len(signs)}, {place}, scratch); }}"
            case RunningSum(x, out):
                if x.stride[-1] != 1 or prod(x.size[1:-2]) != 1:
                    raise Unsupported("a cumulative sum of that layout")
                yield f"for (int64_t g = 0; g < {x.size[0] if len(x.size) > 2 else 1}; g++)"
                sides = [self.matrix(v) for v in (x, out)]
                yield f"  running_sum({sides[0]}, {x.stride[-2]}, {sides[1]}, {x.size[-2]}, {x.size[-1]});"
            case Pack(x, out, left, minus, along, stride, outer, inner):
                kind = ", ".join("true" if flag else "false" for flag in (left, along, minus))
                yield f"pack<{kind}>({self.pointer(x)}, {stride}, {self.pointer(out)}, {outer}, {inner});"
            case PackedSum(left, right, deep, out):
                packs = zip(left, right, deep, strict=True)
                terms = ", ".join(f"{{{self.pointer(a)}, {self.pointer(b)}, {d}}}" for a, b, d in packs)
                yield f"{{ const Pieces terms[] = {{{terms}}};"
                yield f"  sum_of_pieces(terms, {len(deep)}, {self.pointer(out)}, {out.size[1]}, {out.size[2]}); }}"

    def _term(self, step: Sum, i: int) -> str:
        a, b = step.left[i], step.right[i]
        if a.dtype != step.out.dtype or b.dtype != step.out.dtype:
            raise Unsupported("a product of several types")
        rows, columns = (1, b.stride[2]) if _by_columns(b) else (b.stride[1], 1)
        minus = "true" if step.signs[i] < 0 else "false"
        left = f"{self.matrix(a)}, {a.stride[1]}, {a.stride[2]}"
        return f"{{{left}, {self.matrix(b)}, {rows}, {columns}, {a.size[2]}, {minus}}}"

    def copies(self) -> Iterator[str]:
        """The statements that copy the results which are not written in place."""
        for number, v in enumerate(self.program.results):
            if self.placed.get(v.slot) != number:
                yield f"std::memcpy({self.result(number)}, {self.pointer(v)}, {prod(v.size) * v.dtype.itemsize});"


def _by_columns(b: Value) -> bool:
    """Whether the right side of a product lies column by column, and is transposed first."""
    if b.size[2] == 1 or b.stride[2] == 1:
        return False
    if b.size[1] != 1 and b.stride[1] != 1:
        raise Unsupported("a product with gaps in rows and columns")
    return True


def _gap(alive: list[tuple[int, int]], size: int) -> int:
    """The smallest free place for ``size`` bytes beside those that are ``alive``: (place, bytes), by place."""
    end, best = 0, None
    for place, taken in alive:
        if place - end >= size and (best is None or place - end < best[0]):
            best = place - end, end
        end = max(end, place + taken)
    return end if best is None else best[1]


def _lines(size: int) -> int:
    return -(-size // LINE) * LINE
