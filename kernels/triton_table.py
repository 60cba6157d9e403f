"""The default configurations of the Triton kernels, as rules: for every field, the first rule that fits and names it counts.

Each configuration that this table chooses is compiled ahead of time by tests/kernels/test_triton_aot.py, which fails where
one spills registers or needs more shared memory than the chip has; tests/golden/triton_budgets.txt holds the figures.
"""

from __future__ import annotations

from titans_graph.kernels.triton_config import Rule

LINEAR: tuple[Rule, ...] = (
    Rule("linear_scan", "sm_100", {"dim": 128}, {"num_warps": 8}),
    Rule("linear_scan", "gfx942", {"chunk": 128}, {"tile": 16}),
    Rule("linear_fused", "sm_80", config={"num_warps": 8}),
    Rule("linear_fused", "sm_100", config={"num_warps": 8}),
    Rule("linear_reverse", "gfx942", {"chunk": 128}, {"num_warps": 4, "tile": 16}),
    Rule("linear_reverse", "gfx942", {"chunk": 64}, {"num_warps": 4}),
    Rule("linear_reverse", sizes={"dim": 128}, config={"num_warps": 8}),
    Rule("linear_reverse", sizes={"dim": 64, "chunk": 128}, config={"tile": 16}),
    Rule("linear_read", config={"num_warps": 4, "tile": 64}),
    Rule("linear_delta_backward", config={"num_warps": 4, "tile": 64}),
    Rule("linear_query_backward", sizes={"dim": 64}, config={"num_warps": 4, "tile": 64}),
    Rule("linear_query_backward", config={"num_warps": 8, "tile": 64}),
    Rule("linear_key_backward", "sm_80", {"chunk": 64}, {"num_warps": 8, "tile": 64}),
    Rule("linear_key_backward", "sm_100", {"chunk": 64}, {"num_warps": 8, "tile": 64}),
    Rule("linear_key_backward", sizes={"dim": 64}, config={"num_warps": 4, "tile": 64}),
    Rule("linear_key_backward", config={"num_warps": 8, "tile": 64}),
)
"""Linear memory; ``tile``: value columns of a program, or of a step where a program works on all of them."""

TABLE: tuple[Rule, ...] = (
    *LINEAR,
    Rule(sizes={"chunk": 256}, config={"num_warps": 8, "num_stages": 1}),
    Rule(sizes={"chunk": 128}, config={"num_warps": 8}),
    Rule(config={"num_warps": 4, "num_stages": 2, "tile": 32}),
)
