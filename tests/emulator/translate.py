"""A kernel's PTX as a Python function on arrays, one statement an instruction, all threads of a program at once.

A register is an array ``[threads]`` of unsigned integers of its width (predicates: booleans) or one number where all threads
hold the same; arithmetic reads the bits as the instruction's type says. Where threads part at a branch, each block runs for
those who are there.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulator import arithmetic
from tests.emulator.program import EmulationError, Instruction, Program

Function = Callable[..., None]

WIDTH = {"pred": 0, **{f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)}, "bf16": 16}

COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}

ONLY_SINGLE = ("add", "sub", "mul", "mad", "fma", "min", "max", "neg", "ex2", "tanh")
"""Arithmetic that is emulated of single numbers, and not of bf16."""

TOGETHER = ("bar", "barrier", "shfl", "ldmatrix", "stmatrix", "mma", "wgmma", "cp", "fence", "elect")
"""What parted threads cannot run."""

SPECIAL = {
    "%tid.x": "tid", "%ctaid.x": "u4(cta[0])", "%ctaid.y": "u4(cta[1])", "%ctaid.z": "u4(cta[2])",
    "%nctaid.x": "u4(grid[0])", "%nctaid.y": "u4(grid[1])", "%nctaid.z": "u4(grid[2])", "%ntid.x": "u4(len(tid))",
}  # fmt: skip

UNARY = {
    "neg": "-{0}", "abs": "np.abs({0})", "sqrt": "np.sqrt({0})", "rcp": "f4(1) / {0}", "rsqrt": "f4(1) / np.sqrt({0})",
    "ex2": "np.exp2({0})", "lg2": "np.log2({0})", "tanh": "np.tanh({0})", "sin": "np.sin({0})", "cos": "np.cos({0})",
    "not": "~{0}",
}  # fmt: skip

BINARY = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}",
    "max": "np.fmax({0}, {1})", "min": "np.fmin({0}, {1})",
}  # fmt: skip


def translate(program: Program) -> Function:
    """``f(core, tid, cta, grid, *parameters)``: one program of the kernel, parameters in order."""
    writer = _Writer(program)
    text = writer.function()
    space: dict[str, Any] = {"np": np, **{k: v for k, v in vars(arithmetic).items() if not k.startswith("_")}}
    file = f"<{program.name} as Python>"
    # So that a traceback shows the line.
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), space)
    made: Function = space["kernel"]
    return made


class _Writer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.registers: set[str] = set()
        self.site = 0

    def function(self) -> str:
        """The whole function: every block twice, for all threads and for those that are ``active`` after a branch."""
        labels = {label: number for number, label in enumerate(self.program.blocks)}
        together, apart = [" if active is None:"], [" else:"]
        site = 0
        for label, number in labels.items():
            for lines, guard in ((together, ""), (apart, "active")):
                self.site = site
                lines += [f"  if at == {number}:", f"   core.ran[{number}] += 1"]
                for instruction in self.program.blocks[label]:
                    lines += [f"   {line}" for line in self.statement(instruction, labels, guard, number)]
                    self.site += 1
                lines.append(f"   at, active = core.go(active, {number + 1})" if guard else f"   at = {number + 1}")
                lines += ["   continue"] * bool(guard)
            site = self.site
        empty = {"p": "False", "rs": "u2(0)", "rd": "u8(0)"}
        kinds = {r: re.sub(r"\d+$", "", r[2:]) for r in sorted(self.registers)}
        start = [f" {r} = {empty.get(kind, 'u4(0)')}" for r, kind in kinds.items()]
        head = f"def kernel(core, tid, cta, grid, {', '.join(self.program.params)}):"
        body = (f" {line}" for line in (*together, *apart))
        return "\n".join([head, " at, active = 0, None", *start, " while True:", *body, ""])

    def statement(self, i: Instruction, labels: dict[str, int], active: str, number: int) -> list[str]:
        """An instruction as lines; ``active``: the threads that run it ("": all); ``number``: of its block."""
        guard = self.name(i.guard.lstrip("!")) if i.guard else ""
        if i.guard.startswith("!"):
            guard = f"np.logical_not({guard})"
        if i.op[0] in ("bra", "ret"):
            return self.jump(i, labels, guard, active, number)
        if active:
            if i.op[0] in TOGETHER:
                return [f"core.refuse({self.site})"]
            guard = f"({active} & {guard})" if guard else active
        if i.op[0] in ONLY_SINGLE and i.op[-1].startswith(("bf16", "f16x2")):
            raise EmulationError(f"{i.place}: {'.'.join(i.op)} is not emulated")
        try:
            line = getattr(self, f"_{i.op[0]}", self._plain)(i, guard)
        except (KeyError, IndexError, AttributeError, ValueError) as error:
            raise EmulationError(f"{i.place}: {'.'.join(i.op)} {i.operands} is not emulated ({error!r})") from error
        return [str(line)]

    def jump(self, i: Instruction, labels: dict[str, int], guard: str, active: str, number: int) -> list[str]:
        """A branch or a return."""
        if i.op[0] == "ret":
            return [f"core.refuse({self.site})"] if active or guard else ["return"]
        target = labels[str(i.operands[-1])]
        if active:
            way = f"np.where({guard}, {target}, {number + 1})" if guard else str(target)
            return [f"at, active = core.go(active, {way})", "continue"]
        return [f"at, active = core.part({guard}, {target}, {number + 1})" if guard else f"at = {target}", "continue"]

    def name(self, register: str) -> str:
        """The Python name of a register."""
        name = f"p_{register.lstrip('%').replace('$', '_')}"
        self.registers.add(name)
        return name

    def value(self, operand: Any, kind: str) -> str:
        """An operand's value in a type, as an expression."""
        if operand in SPECIAL:
            text = SPECIAL[operand]
        elif operand == "global_smem":
            text = f"u{max(WIDTH[kind], 32) // 8}(0)"
        elif re.match(r"%[a-z]+\d+$|[a-z_]\w*$", operand):
            text = self.name(operand)
        else:
            text = self.constant(operand, WIDTH[kind])
        return self.viewed(text, kind)

    @staticmethod
    def constant(text: str, width: int) -> str:
        """A number's bits."""
        if width == 0:
            return str(int(text, 0) != 0)
        number = int(text[2:], 16) if text[:2].lower() in ("0f", "0d") else int(text.rstrip("U"), 0)
        return f"u{width // 8}({number & (1 << width) - 1})"

    @staticmethod
    def viewed(text: str, kind: str) -> str:
        """Bits as numbers of a type."""
        return f"{text}.view({kind[0].replace('s', 'i')}{WIDTH[kind] // 8})" if kind[0] in "sf" else text

    def result(self, target: Any, text: str, kind: str, guard: str) -> str:
        """An assignment of a value of a type to a register; where the guard is false the register stays."""
        if kind[0] in "sf":
            text = f"({text}).view(u{WIDTH[kind] // 8})"
        if guard:
            text = f"np.where({guard}, {text}, {self.name(target)})"
        return f"{self.name(target)} = {text}"

    def address(self, operand: Any) -> str:
        """``[register + offset]``."""
        place, _, offset = str(operand).strip("[]").partition("+")
        base = self.value(place.strip(), "b64")
        return f"{base} + np.int64({int(offset, 0)}).astype({base}.dtype)" if offset.strip(" 0") else base

    def many(self, operand: Any, kind: str) -> str:
        """A group of registers as a tuple of values."""
        group = operand if isinstance(operand, tuple) else (operand,)
        return f"({', '.join(self.value(x, kind) for x in group)},)"

    def results(self, targets: Any, call: str, guard: str) -> str:
        """A call's list of results to a group of registers."""
        group = targets if isinstance(targets, tuple) else (targets,)
        names = [self.name(x) for x in group]
        if not guard:
            return f"{', '.join(names)}, = {call}"
        return f"{', '.join(names)}, = (np.where({guard}, a, b) for a, b in zip({call}, ({', '.join(names)},)))"

    def _abs(self, i: Instruction, guard: str) -> str:
        if i.op[-1] in ("f16x2", "bf16x2"):
            return self.result(i.operands[0], f"{self.value(i.operands[1], 'b32')} & u4(0x7FFF7FFF)", "b32", guard)
        return self._plain(i, guard)

    def _plain(self, i: Instruction, guard: str) -> str:
        """What takes and gives numbers of one type."""
        kind = i.op[-1]
        values = [self.value(x, kind) for x in i.operands[1:]]
        form = UNARY[i.op[0]] if len(values) == 1 else BINARY[i.op[0]]
        if "NaN" in i.op:
            form = form.replace("np.f", "np.").replace("max", "maximum").replace("min", "minimum")
        if kind == "pred" and i.op[0] == "not":
            form = "np.logical_not({0})"
        return self.result(i.operands[0], form.format(*values), kind, guard)

    def _mul(self, i: Instruction, guard: str) -> str:
        kind = i.op[-1]
        a, b = (self.value(x, kind) for x in i.operands[1:])
        if "wide" in i.op:
            wide = kind[0] + str(2 * WIDTH[kind])
            cast = f"{wide[0].replace('s', 'i')}{WIDTH[wide] // 8}"
            return self.result(i.operands[0], f"np.asarray({a}).astype({cast}) * np.asarray({b}).astype({cast})", wide, guard)
        return self.result(i.operands[0], f"high({a}, {b})" if "hi" in i.op else f"{a} * {b}", kind, guard)

    def _mad(self, i: Instruction, guard: str) -> str:
        kind = i.op[-1]
        wide = kind[0] + str(2 * WIDTH[kind]) if "wide" in i.op else kind
        cast = f"{wide[0].replace('s', 'i')}{WIDTH[wide] // 8}"
        a, b = (self.value(x, kind) for x in i.operands[1:3])
        product = f"np.asarray({a}).astype({cast}) * np.asarray({b}).astype({cast})"
        return self.result(i.operands[0], f"{product} + {self.value(i.operands[3], wide)}", wide, guard)

    def _fma(self, i: Instruction, guard: str) -> str:
        if i.op[-1] != "f32":
            raise ValueError(i.op[-1])
        return self.result(i.operands[0], f"fma({', '.join(self.value(x, 'f32') for x in i.operands[1:])})", "f32", guard)

    def _div(self, i: Instruction, guard: str) -> str:
        kind = i.op[-1]
        a, b = (self.value(x, kind) for x in i.operands[1:])
        return self.result(i.operands[0], f"{a} / {b}" if kind == "f32" else f"divide({a}, {b})", kind, guard)

    def _rem(self, i: Instruction, guard: str) -> str:
        kind = i.op[-1]
        return self.result(i.operands[0], f"remainder({', '.join(self.value(x, kind) for x in i.operands[1:])})", kind, guard)

    def _shl(self, i: Instruction, guard: str) -> str:
        return self._shift(i, guard, "shift_left")

    def _shr(self, i: Instruction, guard: str) -> str:
        return self._shift(i, guard, "shift_right")

    def _shift(self, i: Instruction, guard: str, name: str) -> str:
        kind = i.op[-1]
        call = f"{name}({self.value(i.operands[1], kind)}, {self.value(i.operands[2], 'u32')}, {WIDTH[kind]})"
        return self.result(i.operands[0], call, kind, guard)

    def _bfe(self, i: Instruction, guard: str) -> str:
        a, begin, length = (self.value(x, "u32") for x in i.operands[1:])
        return self.result(i.operands[0], f"extract({a}, {begin}, {length}, {i.op[1] == 's32'})", "u32", guard)

    def _prmt(self, i: Instruction, guard: str) -> str:
        return self.result(i.operands[0], f"permute({', '.join(self.value(x, 'u32') for x in i.operands[1:])})", "u32", guard)

    def _selp(self, i: Instruction, guard: str) -> str:
        kind = f"b{WIDTH[i.op[1]]}"
        a, b = (self.value(x, kind) for x in i.operands[1:3])
        return self.result(i.operands[0], f"np.where({self.value(i.operands[3], 'pred')}, {a}, {b})", kind, guard)

    def _setp(self, i: Instruction, guard: str) -> str:
        _, compare, kind = i.op
        unordered = kind == "f32" and compare[-1] == "u" and len(compare) == 3
        if kind in ("f16x2", "bf16x2"):
            a, b = (f"halves({self.value(x, 'b32')}, '{kind[:-2]}', len(tid))" for x in i.operands[1:])
            return self.results(tuple(str(i.operands[0]).split("|")), f"({a} {COMPARE[compare]} {b}).T", guard)
        if kind in ("bf16", "f16", "f64"):
            raise ValueError(kind)
        a, b = (self.value(x, kind) for x in i.operands[1:])
        text = f"{a} {COMPARE[compare[:2] if unordered else compare]} {b}"
        if unordered:
            text = f"({text}) | np.isnan({a}) | np.isnan({b})"
        elif kind == "f32" and compare == "ne":
            text = f"({text}) & ~(np.isnan({a}) | np.isnan({b}))"
        return self.result(i.operands[0], text, "pred", guard)

    def _mov(self, i: Instruction, guard: str) -> str:
        target, source = i.operands
        kind = f"b{WIDTH[i.op[1]]}" if i.op[1] != "pred" else "pred"
        half = f"u{WIDTH[kind] // 16}"
        if isinstance(source, tuple):
            low, top = (self.value(x, f"b{WIDTH[kind] // 2}") for x in source)
            full = f"u{WIDTH[kind] // 8}"
            text = f"np.asarray({top}).astype({full}) << {full}({WIDTH[kind] // 2}) | np.asarray({low}).astype({full})"
            return self.result(target, text, kind, guard)
        text = self.value(source, kind)
        if isinstance(target, tuple):
            both = f"np.asarray({text})"
            halves = f"({both}.astype({half}), ({both} >> {both}.dtype.type({WIDTH[kind] // 2})).astype({half}))"
            return self.results(tuple("none" if x == "_" else x for x in target), halves, guard)
        return self.result(target, text, kind, guard)

    def _cvt(self, i: Instruction, guard: str) -> str:
        target, source = i.op[-2:]
        if set(i.op[1:-2]) - {"rn", "rni", "rzi"} or source == target:
            raise ValueError("a way to round")
        if target in ("bf16x2", "f16x2"):
            top, low = (f"to_{target[:-2]}({self.value(x, 'f32')})" for x in i.operands[1:])
            return self.result(i.operands[0], f"pair({top}, {low})", "b32", guard)
        # Of a register that is wider than the type only the type's bits count.
        bits = f"np.asarray({self.value(i.operands[1], f'b{WIDTH[source]}')}).astype(u{WIDTH[source] // 8})"
        text = self.viewed(bits, source)
        if source == "bf16" and target == "f32":
            return self.result(i.operands[0], f"{bits}.astype(u4) << u4(16)", "b32", guard)
        if target in ("bf16", "f16") and source == "f32":
            return self.result(i.operands[0], f"to_{target}({text})", "b16", guard)
        if source[0] == "f" and target[0] != "f":
            text = f"np.trunc({text})" if "rzi" in i.op else f"np.rint({text})"
        cast = f"{target[0].replace('s', 'i')}{WIDTH[target] // 8}"
        return self.result(i.operands[0], f"({text}).astype({cast})", target, guard)

    def _ld(self, i: Instruction, guard: str) -> str:
        kind = i.op[-1]
        if i.op[1] == "param":
            parameter = str(i.operands[1]).strip("[]")
            if parameter not in self.program.params:
                raise ValueError(parameter)
            register = str(i.operands[0])
            if WIDTH[kind] == 32 and register.startswith("%rd"):
                parameter = f"{parameter}.view(i4).astype(i8).view(u8)" if kind == "s32" else f"{parameter}.astype(u8)"
            return f"{self.name(register)} = {parameter}"
        if kind[0] == "s":
            raise ValueError("a load that fills up with the sign")
        group = i.operands[0] if isinstance(i.operands[0], tuple) else (i.operands[0],)
        size = WIDTH[kind] // 8
        call = f"{self.space(i)}.load({self.address(i.operands[1])}, {size}, {len(group)}, {guard or None}, {self.site})"
        return self.results(group, f"[x.astype(u2) for x in {call}]" if size == 1 else call, guard)

    def _st(self, i: Instruction, guard: str) -> str:
        kind = i.op[-1]
        values = self.many(i.operands[1], f"b{WIDTH[kind]}")
        return (
            f"{self.space(i)}.store({self.address(i.operands[0])}, {WIDTH[kind] // 8}, {values}, {guard or None}, {self.site})"
        )

    @staticmethod
    def space(i: Instruction) -> str:
        """The memory an access means."""
        return {"global": "core.tensors", "shared": "core.shared", "shared::cta": "core.shared"}[i.op[1]]

    def _cp(self, i: Instruction, guard: str) -> str:
        if i.op[2] == "commit_group":
            return "core.commit()"
        if i.op[2] == "wait_group":
            return f"core.wait({int(str(i.operands[0]))})"
        target, source, size, *taken = i.operands
        count = self.value(taken[0], "u32") if taken else self.constant(str(size), 32)
        places = f"{self.address(target)}, {self.address(source)}"
        return f"core.copy({places}, {int(str(size), 0)}, {count}, {guard or None}, {self.site})"

    def _bar(self, i: Instruction, guard: str) -> str:
        if i.op[1] == "warp":
            return "core.meet()"
        if guard or i.op[1] != "sync" or i.operands != ("0",):
            raise ValueError("a barrier of some threads")
        return "core.barrier()"

    def _barrier(self, i: Instruction, guard: str) -> str:
        return self._bar(i, guard)

    def _fence(self, i: Instruction, guard: str) -> str:
        if guard:
            raise ValueError("a fence of some threads")
        return "core.fence()" if i.op[1:3] == ("proxy", "async") else "pass"

    def _shfl(self, i: Instruction, guard: str) -> str:
        _, _, kind, _ = i.op
        target, source, lane, clamp, _ = i.operands
        if clamp not in ("31", "0x1f"):
            raise ValueError("a shuffle inside parts of a warp")
        return self.result(
            target, f"core.shuffle({self.value(source, 'b32')}, {self.value(lane, 'u32')}, '{kind}')", "b32", guard
        )

    def _ldmatrix(self, i: Instruction, guard: str) -> str:
        call = (
            f"core.load_matrix({self.address(i.operands[1])}, {self.count(i)}, {'trans' in i.op}, {guard or None}, {self.site})"
        )
        return self.results(i.operands[0], call, guard)

    def _stmatrix(self, i: Instruction, guard: str) -> str:
        values = self.many(i.operands[1], "b32")
        return f"core.store_matrix({self.address(i.operands[0])}, {values}, {'trans' in i.op}, {guard or None}, {self.site})"

    @staticmethod
    def count(i: Instruction) -> int:
        """``x4``: how many matrices."""
        return int(next(part for part in i.op if re.fullmatch(r"x\d", part))[1:])

    def _mma(self, i: Instruction, guard: str) -> str:
        if i.op[3] != "m16n8k16" or i.op[-1] != "f32" or guard:
            raise ValueError(i.op[3])
        target, *operands = i.operands
        return self.results(target, f"core.multiply({', '.join(self.many(x, 'b32') for x in operands)}, '{i.op[7]}')", "")

    def _wgmma(self, i: Instruction, guard: str) -> str:
        if i.op[1] != "mma_async":
            left = str(i.operands[0]) if i.operands else ""
            return {"fence": "pass", "commit_group": "core.commit_products()"}.get(i.op[1]) or f"core.wait_products({left})"
        target, a, b, kept, scale_a, scale_b, *transposed = i.operands
        rows, columns, inner = map(int, re.findall(r"\d+", i.op[4]))
        if (rows, inner) != (64, 16) or (scale_a, scale_b) != ("1", "1") or i.op[5] != "f32" or guard:
            raise ValueError(i.op[4:])
        left = self.many(a, "b32") if isinstance(a, tuple) else self.value(a, "b64")
        ways = tuple(x == "1" for x in transposed)[-2:]
        call = ", ".join([
            left, self.value(b, "b64"), self.many(target, "b32"), str(columns), self.value(kept, "pred"),
            str((False, *ways)[-2:]), f"'{i.op[6]}'", str(self.site),
        ])  # fmt: skip
        return self.results(target, f"core.group_multiply({call})", "")
