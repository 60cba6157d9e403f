"""The default configurations of the Triton kernels, as rules: for every field, the first rule that fits and names it counts.

Each configuration that this table chooses for the usual sizes is compiled by tests/kernels/test_triton_aot.py, which fails
where one spills registers or needs more shared memory than the chip has; tests/golden/triton_budgets.txt holds the figures.
"""

from __future__ import annotations

from titans_graph.kernels.triton_config import Rule, Sizes, table_arch

LINEAR: tuple[Rule, ...] = (
    Rule("linear_scan", "sm_80", {"dim": 256}, {"tile": 16}),
    Rule("linear_scan", "sm_100", {"dim": 256}, {"tile": 16}),
    Rule("linear_scan", "gfx942", {"dim": 256, "chunk": 64}, {"num_warps": 8, "tile": 16}),
    Rule("linear_scan", "gfx942", {"dim": 256}, {"num_warps": 4}),
    Rule("linear_scan", sizes={"dim": 256}, config={"num_warps": 8, "num_stages": 2, "tile": 32}),
    Rule("linear_scan", "sm_100", {"dim": 128}, {"num_warps": 8}),
    Rule("linear_scan", "gfx942", {"chunk": 128}, {"tile": 16}),
    Rule("linear_scan", "gfx942", {"chunk": 256}, {"tile": 16}),
    Rule("linear_fused", "sm_80", config={"num_warps": 8, "tile": 16}),
    Rule("linear_fused", "sm_100", {"chunk": 32}, {"tile": 16}),
    Rule("linear_fused", "sm_100", config={"num_warps": 8}),
    Rule("linear_reverse", "sm_100", {"dim": 256, "chunk": 64}, {"num_stages": 1}),
    Rule("linear_reverse", "gfx942", {"dim": 256}, {"num_warps": 4}),
    Rule("linear_reverse", sizes={"dim": 256}, config={"num_warps": 8, "num_stages": 2, "tile": 16}),
    Rule("linear_reverse", "gfx942", {"dim": 64, "chunk": 128}, {"num_warps": 4}),
    Rule("linear_reverse", "gfx942", {"dim": 64, "chunk": 256}, {"num_warps": 4}),
    Rule("linear_reverse", "gfx942", {"dim": 128, "chunk": 128}, {"num_stages": 1}),
    Rule("linear_reverse", "gfx942", {"chunk": 64}, {"num_warps": 4}),
    Rule("linear_reverse", "gfx942", {"chunk": 32}, {"num_warps": 4}),
    Rule("linear_reverse", "gfx942", {"chunk": 16}, {"num_warps": 4}),
    Rule("linear_reverse", sizes={"dim": 128}, config={"num_warps": 8}),
    Rule("linear_reverse", sizes={"chunk": 128}, config={"tile": 16}),
    Rule("linear_reverse", sizes={"chunk": 256}, config={"tile": 16}),
    Rule("linear_read", "sm_80", {"dim": 128, "chunk": 128}, {"num_warps": 8}),
    Rule("linear_read", "gfx942", {"dim": 256}, {"num_warps": 4}),
    Rule("linear_read", sizes={"dim": 256}, config={"num_warps": 8, "num_stages": 2, "tile": 64}),
    Rule("linear_read", config={"num_warps": 4, "num_stages": 2, "tile": 64}),
    Rule("linear_delta_backward", "sm_80", {"dim": 128, "chunk": 128}, {"num_warps": 8, "tile": 32}),
    Rule("linear_delta_backward", "sm_80", {"dim": 128, "chunk": 256}, {"num_warps": 8, "num_stages": 1}),
    Rule("linear_delta_backward", sizes={"dim": 256}, config={"num_warps": 8, "num_stages": 2, "tile": 64}),
    Rule("linear_delta_backward", config={"num_warps": 4, "num_stages": 2, "tile": 64}),
    Rule("linear_query_backward", "sm_90", {"dim": 64, "chunk": 16}, {"num_warps": 8}),
    Rule("linear_query_backward", "gfx942", {"dim": 128, "chunk": 32}, {"num_warps": 4}),
    Rule("linear_query_backward", sizes={"dim": 64}, config={"num_warps": 4, "num_stages": 2, "tile": 64}),
    Rule("linear_query_backward", config={"num_warps": 8, "num_stages": 2, "tile": 64}),
    Rule("linear_key_backward", "gfx942", {"dim": 128, "chunk": 32}, {"num_warps": 4}),
    Rule("linear_key_backward", "sm_80", {"chunk": 64}, {"num_warps": 8}),
    Rule("linear_key_backward", "sm_100", {"chunk": 64}, {"num_warps": 8}),
    Rule("linear_key_backward", sizes={"dim": 64}, config={"num_warps": 4, "num_stages": 2, "tile": 64}),
    Rule("linear_key_backward", config={"num_warps": 8, "num_stages": 2, "tile": 64}),
)
"""Linear memory; ``tile``: value columns of a program, or of a step where a program works on all of them."""

MLP: tuple[Rule, ...] = (
    Rule("mlp_scan", "sm_100", {"dim": 128}, {"num_warps": 8, "num_stages": 1, "tile": 16}),
    Rule("mlp_scan", sizes={"dim": 128}, config={"num_warps": 8, "tile": 16}),
    Rule("mlp_scan", "sm_80", config={"num_warps": 8}),
    Rule("mlp_scan", "sm_90", {"resumed": True}, {"num_warps": 8}),
    Rule("mlp_scan", "sm_100", config={"num_warps": 8}),
    Rule("mlp_read", "sm_80", {"dim": 128}, {"num_warps": 8}),
    Rule("mlp_read", "sm_90", {"dim": 128}, {"num_warps": 8}),
    Rule("mlp_recall", "sm_80", {"dim": 128}, {"num_warps": 8}),
    # Every tile computes the likeness of queries and keys anew: half as many tiles are 29 % less instructions.
    *(
        Rule(kernel, arch, {"dim": 64, "chunk": 64, "dtype": dtype}, {"tile": 64})
        for kernel in ("mlp_recall", "mlp_answer_backward")
        for arch in ("sm_90", "sm_100")
        for dtype in ("bf16", "fp16")
    ),
    Rule("mlp_query_backward", "sm_100", {"dim": 128}, {"num_warps": 8, "num_stages": 1}),
    Rule("mlp_query_backward", sizes={"dim": 128}, config={"num_warps": 8}),
    # Triton 3.6 cannot pipeline this kernel's resumed form (its pass fails), and unpipelined only a small tile spills nothing.
    Rule("mlp_reverse", sizes={"resumed": True}, config={"num_stages": 1, "tile": 16}),
    Rule("mlp_reverse", "sm_100", config={"num_warps": 8, "num_stages": 1}),
    Rule("mlp_reverse", sizes={"dim": 128}, config={"num_warps": 8}),
    Rule("mlp_reverse", "sm_80", config={"tile": 16}),
    Rule("mlp_key_backward", sizes={"dim": 128}, config={"num_warps": 8}),
    Rule("mlp_key_backward", "sm_80", config={"tile": 16}),
)
"""An MLP of two layers; ``tile``: of the hidden size."""

DECODE: tuple[Rule, ...] = (
    # Decoding is bound by loads on their way: large tiles have more of them.
    Rule("linear_decode", config={"num_warps": 8, "num_stages": 1, "tile": 128}),
    Rule("mlp_decode", config={"num_warps": 8, "num_stages": 1, "tile": 128}),
    Rule("decode_write", sizes={"dim": 128}, config={"num_warps": 8}),
)
"""One token at a time."""

GATES: tuple[Rule, ...] = (
    # A row of 64 numbers is little for one warp: with four, three do again what the first does, and wait for it.
    Rule("gates", config={"num_warps": 1}),
    Rule("gates_backward", config={"num_warps": 1}),
)
"""The mixing matrix and its adjoint."""

TABLE: tuple[Rule, ...] = (
    *GATES,
    *LINEAR,
    *MLP,
    *DECODE,
    Rule(sizes={"chunk": 256}, config={"num_warps": 8, "num_stages": 1}),
    Rule(sizes={"chunk": 128}, config={"num_warps": 8}),
    Rule(config={"num_warps": 4, "num_stages": 2, "tile": 32}),
)

LONGEST = {"sm_80": (128, 128), "sm_90": (256, 128), "sm_100": (128, 64), "gfx942": (64, 64), "small": (128, 32)}
"""The longest chunks of an MLP with keys up to 64 and of 128 that a chip has the memory for; ``small``: NVIDIA's with 99 KB."""


def longest_chunk(sizes: Sizes, arch: str) -> int:
    """The longest chunk for which a chip has the shared memory (and tensor memory) that the kernels take; 0: for none.

    Operands in float32 take twice the room.
    """
    if not sizes.hidden:
        return 256
    small = arch.startswith(("sm_86", "sm_89", "sm_12"))
    narrow, wide = LONGEST["small" if small else table_arch(arch)]
    if sizes.dtype == "fp32":
        narrow, wide = 32 if small else 64, 0
    return narrow if sizes.dim <= 64 else wide
