# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The emulator itself, in a process of its own (test_emulated_gpu.py): its arithmetic, and what it must not let pass."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import titans_graph as tg
from tests.emulator.core import Core
from tests.emulator.driver import launch
from tests.emulator.memory import Clock, Memory, Space
from tests.emulator.program import EmulationError
from titans_graph.kernels import triton_mlp, triton_mlp_host

MLP = {"mlp": {"hidden": 32}}


@triton.jit
def product_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, FLIP_A: tl.constexpr, FLIP_B: tl.constexpr):
    rows, columns = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    if FLIP_A:
        left = tl.trans(tl.load(a + tl.arange(0, K)[:, None] * M + tl.arange(0, M)[None, :]))
    else:
        left = tl.load(a + rows * K + tl.arange(0, K)[None, :])
    if FLIP_B:
        right = tl.trans(tl.load(b + tl.arange(0, N)[:, None] * K + tl.arange(0, K)[None, :]))
    else:
        right = tl.load(b + tl.arange(0, K)[:, None] * N + columns)
    tl.store(c + rows * N + columns, tl.dot(left, right, input_precision="ieee"))


@pytest.mark.parametrize(
    ("dtype", "shape", "flipped", "warps"),
    [
        (torch.bfloat16, (64, 64, 64), (False, False), 4),
        (torch.bfloat16, (64, 64, 64), (True, True), 4),
        (torch.bfloat16, (128, 32, 32), (True, False), 8),
        (torch.float16, (64, 16, 128), (False, True), 4),
        (torch.float16, (16, 16, 16), (False, False), 1),
        (torch.float32, (32, 64, 16), (False, True), 4),
    ],
)
def test_a_matrix_product(dtype: torch.dtype, shape: tuple[int, int, int], flipped: tuple[bool, bool], warps: int) -> None:
    """Every unit (wgmma on sm_90 from 64 rows on, else mma; none for fp32), swizzle and order of the operands."""
    m, n, k = shape
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    c = torch.empty(m, n)
    given = (x.T.contiguous() if flip else x for x, flip in zip((a, b), flipped, strict=True))
    product_kernel[1,](*given, c, m, n, k, *flipped, num_warps=warps)
    torch.testing.assert_close(c, a.float() @ b.float(), atol=1e-4, rtol=1e-5)


@triton.jit
def turn_kernel(x, y, room, N: tl.constexpr, WAITS: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(room + i, tl.load(x + i) * 2.0)
    if WAITS:
        tl.debug_barrier()
    tl.store(y + i, tl.load(room + (N - 1 - i)))


def test_what_other_warps_wrote_is_read_after_a_barrier() -> None:
    x, y, room = torch.randn(256), torch.empty(256), torch.empty(256)
    turn_kernel[1,](x, y, room, 256, True)
    assert torch.equal(y, 2 * x.flip(0))
    with pytest.raises(EmulationError, match=r"on_gpu_emulator\.py:\d+: .* without a barrier"):
        turn_kernel[1,](x, y, room, 256, False)
    # Nothing orders the lanes of one warp either.
    with pytest.raises(EmulationError, match="without a barrier"):
        turn_kernel[1,](x, y, room, 256, False, num_warps=1)
    turn_kernel[1,](x, y, room, 256, True, num_warps=1)


@triton.jit
def share_kernel(y, SPREAD: tl.constexpr):
    i = tl.arange(0, 64)
    tl.store(y + tl.program_id(0) * SPREAD + i, (i + tl.program_id(0)).to(tl.float32))


def test_programs_of_one_launch_write_apart() -> None:
    share_kernel[2,](torch.empty(128), 64)
    with pytest.raises(EmulationError, match="another warp's access"):
        share_kernel[2,](torch.empty(128), 32)


PTX = """
.visible .entry small(
	.param .u64 .ptr .global .align 1 small_param_0
)
.reqntid 64
{
	.reg .b32 %r<9>;
	.reg .b64 %rd<3>;
	.loc	1 7 0
	ld.param.b64 	%rd1, [small_param_0];
	INSTRUCTION;
	ret;
}
	.file	1 "/some/where/source.py"
"""


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1+4]", "source.py:7: address not a multiple of 16"),
        ("ld.global.b32 {%r1}, [%rd1+1024]", "source.py:7: out of bounds: byte 1024 of argument 0 (1024 bytes)"),
        ("ld.shared.b32 %r1, [global_smem+32]", "source.py:7: out of bounds: byte 32 of shared memory (32 bytes)"),
        ("st.shared.b32 [global_smem+4], %tid.x", "two warps write different numbers to one place in one store"),
        ("cp.async.ca.shared.global [global_smem+0], [%rd1+0], 0x4, 0x4;\n ld.shared.b32 %r1, [global_smem]", "under way"),
        ("bar.sync 1, 32", "source.py:7: bar.sync"),
        ("bar.arrive 0, 64", "source.py:7: bar.arrive"),
        ("mov.u32 %r1, %laneid", "source.py:7: mov.u32"),
        ("fma.rn.bf16x2 %r1, %r2, %r3, %r4", "source.py:7: fma.rn.bf16x2"),
        ("cvt.rmi.f32.f32 %r1, %r2", "source.py:7: cvt.rmi.f32.f32"),
        ("vote.sync.any.pred %p1, %p2, 0xffffffff", "source.py:7: vote.sync.any.pred"),
    ],
)
def test_what_a_gpu_forbids_and_what_is_not_emulated(instruction: str, message: str) -> None:
    with pytest.raises(EmulationError, match=re.escape(message)):
        launch(PTX.replace("INSTRUCTION", instruction), (1, 1, 1), 32, [("*fp32", torch.zeros(256))])


def eight_warps() -> Core:
    """A program at its beginning, its shared memory zero."""
    clock = Clock((np.arange(256) // 32).astype(np.int32), places=["here"])
    core = Core(clock, Memory([], clock), Space("shared memory", np.zeros(16384, np.uint8), clock, shared=True), [0])
    core.begin()
    core.memory.data[:] = 0
    return core


def multiply(core: Core) -> None:
    """A product of two operands in shared memory, in rows of 128 bytes."""
    where = np.uint64(1 << 16 | 64 << 32 | 1 << 62)
    core.group_multiply(where, where, [np.zeros(256, np.uint32)] * 4, 8, True, (False, False), "bf16", 0)
    core.commit_products()


def write(core: Core) -> None:
    """Warp 0 writes to where the operands are."""
    core.shared.store(np.arange(256) * 4, 4, [np.full(256, 7, np.uint32)], np.arange(256) < 32, 0)


def test_a_product_and_its_operands() -> None:
    """They stay until every group has waited for its own product and all have met."""
    core = eight_warps()
    multiply(core)
    core.barrier()
    with pytest.raises(EmulationError, match="a matrix product still uses it"):
        write(core)
    core.wait_products(0)
    with pytest.raises(EmulationError, match="without a barrier"):
        write(core)
    core.barrier()
    write(core)
    core.barrier()
    with pytest.raises(EmulationError, match="without a fence"):
        multiply(core)
    core.fence()
    multiply(core)
    with pytest.raises(EmulationError, match="never waited for"):
        core.end()


@triton.jit
def walk_kernel(state, turn, COUNT: tl.constexpr, STAGES: tl.constexpr):
    cell = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    by = tl.load(turn + cell)
    for c in tl.range(0, COUNT, num_stages=STAGES):
        made = tl.dot(tl.load(state + c * 1024 + cell), by)
        tl.store(state + (c + 1) * 1024 + cell, made.to(tl.bfloat16))
        if STAGES == 1:
            tl.debug_barrier()


def test_a_pipelined_loop_whose_state_passes_through_memory() -> None:
    """Wrong results in silence on a GPU: the next state is fetched before it is written."""
    state, turn = torch.zeros(5, 32, 32, dtype=torch.bfloat16), torch.eye(32, dtype=torch.bfloat16).flip(0).contiguous()
    state[0] = torch.randn(32, 32)
    walk_kernel[1,](state, turn, 4, 1)
    assert torch.equal(state[4], state[0])
    state[1:] = 0
    with pytest.raises(EmulationError, match=r"changed while it was copied|without a barrier"):
        walk_kernel[1,](state, turn, 4, 3)


def changed(tmp_path: Path, source: str, old: str, new: str) -> ModuleType:
    """A module of kernels with one piece of text in place of another."""
    text = Path(source).read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "changed_kernels.py"
    path.write_text(text.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["changed_kernels"] = module
    spec.loader.exec_module(module)
    return module


def forward() -> torch.Tensor:
    """A small memory on the kernels."""
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(3, 1, 1, 48, 16), dim=-1).bfloat16()
    weights = {n: torch.randn(1, 1, *s) / s[0] ** 0.5 for n, s in tg.fast_weights(MLP, 16).items()}
    return tg.neural_memory(MLP, weights, *x, step=torch.full((1, 1, 48), 0.1), chunk=16, kernel="triton")[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("count = (length + C - 1) // C", "count = (length + C - 1) // C + 1"),
        ("m_states + behind + place", "m_states + place"),
    ],
    ids=["a chunk too many", "the next chunk's state here"],
)
def test_a_defect_in_the_scan(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = forward()
    module = changed(tmp_path, str(triton_mlp.__file__), old, new)
    monkeypatch.setattr(triton_mlp_host, "mlp_scan_kernel", module.mlp_scan_kernel)
    try:
        wrong = forward()
    except EmulationError:
        return
    assert not torch.allclose(wrong, right, atol=1e-2)
