"""The Triton kernels of a linear memory against the scan in float64: outputs, final states and all gradients.

On a GPU they are compiled, elsewhere interpreted. Buffers that the launchers allocate are filled with NaN, and so are the
tokens and the cotangents of slots that hold no token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.kernels.test_memory_cases import Case, call, gradients, make
from titans_graph.kernels.triton_config import Config, Sizes, available, override

if not available():
    pytest.skip(available().why, allow_module_level=True)

from titans_graph.kernels.memory_objectives import parse_objective
from titans_graph.kernels.triton_host import State, Tokens
from titans_graph.kernels.triton_linear_host import backward, forward
from titans_graph.kernels.triton_plan import Plan, grid_plan, packed_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HUBER = {"huber": {"delta": 0.3}}
KERNELS = ("linear_scan", "linear_fused", "linear_read", "linear_delta_backward", "linear_reverse", "linear_query_backward",
           "linear_key_backward")  # fmt: skip
NAMES = ("y", "anchor", "weights", "momenta", "d_anchor", "d_weights", "d_momenta", "d_initial_weights",
         "d_initial_momenta", "d_q", "d_k", "d_v", "d_step", "d_log_momentum", "d_log_keep")  # fmt: skip
FP32 = dict.fromkeys(NAMES, 1e-5)
FP16 = {**dict.fromkeys(NAMES, 0.01), "y": 0.005, **dict.fromkeys(NAMES[-3:], 0.02)}


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that is allocated holds NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Run(NamedTuple):
    """How the kernels are run: operands' type, tile of the value columns, and the promises made to them."""

    dtype: torch.dtype = torch.float32
    tile: int = 16
    fused: bool = False
    resumed: bool = False
    restarts: bool = True

    def sizes(self, case: Case) -> Sizes:
        name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.dtype]
        return Sizes(
            case.chunk, case.tokens["q"].shape[-1], dtype=name, objective=parse_objective(case.objective).name,
            read=case.read, resumed=self.resumed,
        )  # fmt: skip


def parameter(case: Case) -> float:
    return float(next(iter(dict(parse_objective(case.objective).options).values()), 0.0))  # type: ignore[arg-type]


def ask(case: Case, plan: Plan, run: Run, cotangents: list[Tensor]) -> dict[str, Tensor]:
    """All results and gradients of the kernels, by name; the state ``[S, H, d, d]`` of the case's sequences."""
    sizes = run.sizes(case)
    inputs = {n: x.detach().to(DEVICE) for n, x in case.tokens.items()}
    hole = ~(case.valid.to(DEVICE).view(len(case.valid), 1, -1))
    inputs = {n: x.masked_fill(hole if x.dim() == 3 else hole[..., None], torch.nan) for n, x in inputs.items()}
    tokens = Tokens(*(x.to(run.dtype if x.dim() == 4 else torch.float32).contiguous() for x in inputs.values()))
    state = {n: x[0].detach().float().to(DEVICE) for n, x in case.state.items()}
    start = (state["initial_weights"], state["initial_momenta"]) if run.restarts else (None, None)
    entry = State(state["anchor"], state["weights"], state["momenta"])
    d_y = cotangents[0].to(DEVICE, run.dtype).masked_fill(hole[..., None], torch.nan)
    ends = State(*(x.float().to(DEVICE) for x in cotangents[1:]))
    tiles = [override(name, Config(4, 1, run.tile)) for name in KERNELS]
    for tile in tiles:
        tile.__enter__()
    try:
        y, after, saved = forward(plan, sizes, parameter(case), tokens, entry, *start, fused=run.fused)
        assert saved is not None
        back = backward(plan, sizes, parameter(case), tokens, entry.anchor, saved, d_y, ends, restarts=run.restarts)
    finally:
        for tile in reversed(tiles):
            tile.__exit__(None, None, None)
    started = [torch.zeros_like(entry.weights) if x is None else x for x in (back.start_m, back.start_s)]
    return dict(zip(NAMES, (y, *after, *back.state, *started, *back.tokens), strict=True))


def projections(case: Case) -> list[Tensor]:
    """The cotangents that :func:`gradients` draws."""
    g = torch.Generator().manual_seed(5)
    like = [case.tokens["q"], *(case.state[n][0] for n in ("anchor", "weights", "momenta"))]
    return [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in like]


def truth(case: Case) -> dict[str, Tensor]:
    results = call(case)
    return dict(zip(NAMES, (*results, *gradients(case, results)), strict=True))


def assert_agrees(got: dict[str, Tensor], want: dict[str, Tensor], bars: dict[str, float]) -> None:
    """RMS of the error over RMS of the truth (which may be zero altogether: then the result is, too)."""
    for name, bar in bars.items():
        a, b = got[name].double().cpu(), want[name].detach().double()
        assert a.shape == b.shape
        size = float(b.square().mean().sqrt())
        error = float((a - b).square().mean().sqrt())
        assert error <= bar * size, f"{name}: error {error:.2e} of {size:.2e}"


def rounded(case: Case, dtype: torch.dtype) -> Case:
    """The same case with unit keys and tokens that the operands' type can hold."""
    keys = torch.nn.functional.normalize(case.tokens["k"].detach(), dim=-1)
    tokens = {**case.tokens, "k": keys}
    tokens = {n: (x.detach().to(dtype if x.dim() == 4 else torch.float32).double()).requires_grad_() for n, x in tokens.items()}
    state = {n: [x.detach().float().double().requires_grad_() for x in xs] for n, xs in case.state.items()}
    return case._replace(tokens=tokens, state=state)


def check(case: Case, run: Run, bars: dict[str, float] = FP32) -> None:
    case = rounded(case, run.dtype)
    heads = case.tokens["q"].shape[1]
    plan = grid_plan(case.valid.to(DEVICE), case.position.to(DEVICE), case.chunk, heads)
    cotangents = [projections(case)[0].to(run.dtype).double(), *projections(case)[1:]]
    assert_agrees(ask(case, plan, run, cotangents), truth(case), bars)


def ragged(case: Case, chunk: int) -> Case:
    """Four rows of four chunks: begun before and ended early; two documents; begun in the second chunk; empty."""
    slots = torch.arange(4 * chunk)
    second = 2 * chunk
    valid = torch.stack([
        (slots >= 2) & (slots < second + 7),
        (slots < chunk + 3) | ((slots >= second) & (slots < 4 * chunk - 5)),
        slots >= chunk + 6,
        slots < 0,
    ])  # fmt: skip
    position = torch.stack([slots + second, torch.where(slots < second, slots, slots - second), slots + chunk, slots])
    return case._replace(valid=valid, position=position)


COVER = [
    ("l2", "after", 16, 16, Run(fused=True)),
    ("dot", "before", 16, 32, Run()),
    (HUBER, "before", 32, 16, Run()),
    (HUBER, "chunk", 16, 32, Run(fused=True)),
    ("l2", "chunk", 16, 16, Run()),
]


@pytest.mark.parametrize(("objective", "read", "chunk", "dim", "run"), COVER)
def test_matches_the_scan(objective: Any, read: str, chunk: int, dim: int, run: Run) -> None:
    check(make("linear", objective, read, chunk=chunk, slots=2 * chunk, batch=1, heads=3, dim=dim), run)


@pytest.mark.parametrize(
    ("objective", "read", "chunk", "dim", "fused"),
    [("l2", "after", 16, 32, False), (HUBER, "before", 16, 16, True), ("dot", "chunk", 16, 16, False), (HUBER, "chunk", 16, 16, True)],
)
def test_rows_that_begin_and_end_anywhere(objective: Any, read: str, chunk: int, dim: int, fused: bool) -> None:
    case = ragged(make("linear", objective, read, chunk=chunk, slots=4 * chunk, batch=4, heads=1, dim=dim), chunk)
    check(case, Run(fused=fused, resumed=True))
