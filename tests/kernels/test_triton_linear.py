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
from titans_graph.kernels.triton_plan import SLOTS, Plan, grid_plan, packed_plan

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
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(8).isnan().all())
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


def ragged(case: Case) -> Case:
    """Four rows of three chunks: begun before, ended in the second chunk; three documents, so that the row restarts inside;
    begun in the second chunk; a few tokens of a chunk begun before and nothing else."""
    chunk = case.chunk
    slots = torch.arange(3 * chunk)
    valid = torch.stack([
        (slots >= 2) & (slots < chunk + 7),
        (slots < 3) | ((slots >= chunk) & (slots < 2 * chunk)) | ((slots >= 2 * chunk) & (slots < 3 * chunk - 1)),
        slots >= chunk + 6,
        (slots >= chunk + 3) & (slots < chunk + 9),
    ])  # fmt: skip
    position = torch.stack([slots + 2 * chunk, slots % chunk, slots + chunk, slots + chunk])
    return case._replace(valid=valid, position=position)


def hostile(case: Case) -> Case:
    """Keep and momentum exactly 0 (log -inf) and exactly 1, mixed; some steps exactly 0."""
    g = torch.Generator().manual_seed(3)
    tokens = dict(case.tokens)
    for name in ("log_momentum", "log_keep"):
        pick = torch.randint(0, 3, tokens[name].shape, generator=g)
        gates = tokens[name].detach().masked_fill(pick == 0, -torch.inf)
        tokens[name] = gates.masked_fill(pick == 1, 0.0).requires_grad_()
    tokens["step"] = tokens["step"].detach().index_fill(2, torch.arange(0, case.valid.shape[1], 5), 0.0).requires_grad_()
    return case._replace(tokens=tokens)


@pytest.mark.parametrize(
    ("objective", "read", "dim", "run", "bars"),
    [
        ("dot", "before", 32, Run(), FP32),
        ("l2", "chunk", 16, Run(), FP32),
        (HUBER, "after", 16, Run(torch.float16, fused=True), FP16),
        pytest.param("l2", "after", 32, Run(torch.float16), FP16, marks=pytest.mark.nightly),
        pytest.param(HUBER, "chunk", 32, Run(fused=True), FP32, marks=pytest.mark.nightly),
    ],
)
def test_whole_rows(objective: Any, read: str, dim: int, run: Run, bars: dict[str, float]) -> None:
    check(make("linear", objective, read, chunk=16, slots=32, batch=1, heads=3, dim=dim), run, bars)


@pytest.mark.parametrize(
    ("objective", "read", "dim", "fused"),
    [
        ("l2", "after", 32, False),
        (HUBER, "before", 16, True),
        (HUBER, "chunk", 16, False),
        pytest.param("dot", "after", 32, True, marks=pytest.mark.nightly),
        pytest.param("dot", "chunk", 32, True, marks=pytest.mark.nightly),
    ],
)
def test_rows_that_begin_restart_and_end_anywhere(objective: Any, read: str, dim: int, fused: bool) -> None:
    case = ragged(make("linear", objective, read, chunk=16, slots=48, batch=4, heads=1, dim=dim))
    check(case, Run(fused=fused, resumed=True))


@pytest.mark.parametrize("read", ["after", pytest.param("before", marks=pytest.mark.nightly)])
def test_hostile_gates_and_chunks_of_several_tiles(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("triton_linear.token_tile", "triton_linear_host.token_tile", "triton_linear_host.scan_tile"):
        monkeypatch.setattr(f"titans_graph.kernels.{place}", lambda sizes: 16)
    case = hostile(make("linear", "l2", read, chunk=32, slots=64, batch=1, heads=2, dim=16))
    check(case._replace(valid=torch.arange(64)[None] < 61), Run())


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_packed_sequences_are_as_if_run_apart(fused: bool) -> None:
    lengths = [5, 0, 32, 19]
    apart = rounded(make("linear", "l2", "after", chunk=16, slots=32, batch=4, heads=2, dim=16), torch.float32)
    slots = torch.arange(32)
    # Not position 0: a sequence begins with a state of its own, not with the initial one.
    apart = apart._replace(valid=slots < torch.tensor(lengths)[:, None], position=(slots + 32).expand(4, 32).contiguous())
    want, cotangents = truth(apart), projections(apart)

    def packed(x: Tensor) -> Tensor:
        return torch.cat([row[:, :n] for row, n in zip(x, lengths, strict=True)], 1)[None]

    tokens = {n: packed(x) for n, x in apart.tokens.items()}
    together = apart._replace(tokens=tokens, valid=torch.ones(1, sum(lengths), dtype=torch.bool))
    offsets = torch.tensor([0, 5, 5, 37, 56], device=DEVICE)
    plan = packed_plan(offsets, sum(lengths), 16, 2)
    got = ask(together, plan, Run(fused=fused, restarts=False), [packed(cotangents[0]), *cotangents[1:]])
    want = {n: packed(x) if x.shape[2] == 32 and n not in NAMES[1:9] else x for n, x in want.items()}
    assert_agrees(got, want, FP32)


def test_nothing_is_kept_unless_asked_for() -> None:
    case = make("linear", chunk=16, slots=32, batch=1, heads=1, dim=16)
    plan = grid_plan(case.valid.to(DEVICE), case.position.to(DEVICE), 16, 1)
    tokens = Tokens(*(x.detach().float().to(DEVICE) for x in case.tokens.values()))
    state = {n: x[0].detach().float().to(DEVICE) for n, x in case.state.items()}
    entry, start = State(*(state[n] for n in State._fields)), (state["initial_weights"], state["initial_momenta"])
    with override("linear_fused", Config(4, 1, 16)):
        y, _, saved = forward(plan, Run().sizes(case), 0.0, tokens, entry, *start, save=False, fused=True)
    assert saved is None
    want = call(case)[0].detach()
    assert float((y.double().cpu() - want).abs().max()) < 1e-5


def test_the_comparison_can_fail() -> None:
    want = {"y": torch.ones(3), "d_q": torch.zeros(3)}
    assert_agrees(want, want, dict.fromkeys(want, 1e-5))
    with pytest.raises(AssertionError, match="y: error"):
        assert_agrees({**want, "y": torch.full((3,), 1.001)}, want, {"y": 1e-5})
    with pytest.raises(AssertionError, match="d_q: error"):
        assert_agrees({**want, "d_q": torch.full((3,), torch.nan)}, want, {"d_q": 1e-5})


def test_the_plan_knows_where_tokens_lie() -> None:
    case = ragged(make("linear", chunk=16, slots=48, batch=4, heads=1))
    spans = grid_plan(case.valid, case.position, 16, 1).chunks[:, 3]
    found = [(int(x) % SLOTS, int(x) // SLOTS) for x in spans]
    assert found == [(2, 16), (0, 7), (0, 0), (0, 3), (0, 16), (0, 15), (0, 0), (6, 16), (0, 16), (0, 0), (3, 9), (0, 0)]
    packed = packed_plan(torch.tensor([0, 5, 5, 37]), 37, 16, 1).chunks
    assert [int(x) // SLOTS for x in packed[:, 3]] == [5, 16, 16, *[0] * (len(packed) - 3)]
