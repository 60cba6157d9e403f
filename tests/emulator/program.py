"""PTX as text to a list of instructions, each with its place in the Triton source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


class EmulationError(Exception):
    """A kernel did what a GPU forbids, leaves undefined, or what the emulator does not know; says where."""


@dataclass(frozen=True)
class Instruction:
    """``@guard op operands``: ``op`` split at its dots; ``operands`` as written, a group in braces as a tuple.

    ``guard``: a predicate register, ``!`` before it where it is negated; "" where there is none.
    """

    op: tuple[str, ...]
    operands: tuple[str | tuple[str, ...], ...]
    guard: str
    place: str


@dataclass
class Program:
    """One kernel: its parameters in order, threads of a program, blocks of instructions in the order of the text.

    A block has a label where something jumps to it, and ends with its first jump.
    """

    name: str
    params: list[str] = field(default_factory=list)
    threads: int = 0
    blocks: dict[str, list[Instruction]] = field(default_factory=dict)

    def instructions(self) -> Iterator[Instruction]:
        """All of them, in the order of the text."""
        for block in self.blocks.values():
            yield from block


_GUARDED = re.compile(r"@(!?%?[\w$]+)\s+(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{([^}]*)\}|\[([^]]*)\]|([^\s,][^,]*)")


def parse(text: str) -> Program:
    """The kernel of a PTX module (Triton makes one a module)."""
    entry = re.search(r"\.entry\s+(\w+)\s*\(([^)]*)\)(.*?)\n\{(.*?)\n\}", text, re.DOTALL)
    if entry is None:
        raise EmulationError("no .entry in this PTX")
    program = Program(entry.group(1), re.findall(r"\.param\s[^,]*?(\w+)\s*(?:,|$)", entry.group(2)))
    threads = re.search(r"\.reqntid\s+(\d+)", entry.group(3))
    if threads is None:
        raise EmulationError(f"{program.name}: no .reqntid")
    program.threads = int(threads.group(1))
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    targets = set(re.findall(r"\bbra(?:\.uni)?\s+([$\w]+)", entry.group(4)))
    block = program.blocks.setdefault("", [])
    for statement, place in _statements(entry.group(4), files):
        if not statement.endswith(":"):
            block.append(_instruction(statement, place))
            if block[-1].op[0] == "bra":
                block = program.blocks.setdefault(f"after {len(program.blocks)}", [])
        elif statement[:-1] in targets:
            block = program.blocks.setdefault(statement[:-1], [])
    return program


def _statements(body: str, files: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Labels (with their colon) and instructions (without the semicolon) with the last place named before them."""
    place = "?"
    for line in body.splitlines():
        line = line.split("//", 1)[0].strip()
        while (label := re.match(r"([$\w]+):\s*", line)) is not None:
            yield label.group(1) + ":", place
            line = line[label.end() :]
        if located := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
            # Line 0 is what belongs to no line.
            if located.group(2) != "0":
                place = f"{files.get(located.group(1), '?').rsplit('/', 1)[-1]}:{located.group(2)}"
            continue
        for statement in map(str.strip, line.split(";")):
            if statement and statement not in "{}" and not statement.startswith("."):
                yield statement, place


def _instruction(text: str, place: str) -> Instruction:
    guard = ""
    if guarded := _GUARDED.match(text):
        guard, text = guarded.groups()
    op, rest = re.split(r"\s+|$", text, maxsplit=1)
    operands: list[str | tuple[str, ...]] = []
    for group, address, plain in _OPERAND.findall(rest):
        if group:
            operands.append(tuple(x.strip() for x in group.split(",")))
        else:
            operands.append(f"[{address.strip()}]" if address else plain.strip())
    return Instruction(tuple(op.split(".")), tuple(operands), guard, place)
