"""The default configurations of the Triton kernels, as rules: for every field, the first rule that fits and names it counts.

Each configuration that this table chooses is compiled ahead of time by tests/kernels/test_triton_aot.py, which fails where
one spills registers or needs more shared memory than the chip has; tests/golden/triton_budgets.txt holds the figures.
"""

from __future__ import annotations

from titans_graph.kernels.triton_config import Rule

TABLE: tuple[Rule, ...] = (
    Rule(sizes={"chunk": 256}, config={"num_warps": 8, "num_stages": 1}),
    Rule(sizes={"chunk": 128}, config={"num_warps": 8}),
    Rule(config={"num_warps": 4, "num_stages": 2, "tile": 32}),
)
