"""Decoding on Triton kernels, token by token, against the recurrence in fp64: any place in a chunk, rows apart, restarts.

On a GPU the kernels are compiled, elsewhere interpreted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_memory_cases import Case, call, make
from titans_graph.errors import UsageError
from titans_graph.kernels.memory_bound import step_bound
from titans_graph.kernels.memory_objectives import parse_objective
from titans_graph.kernels.networks import parse_network
from titans_graph.kernels.triton_config import Config, Sizes, available, override

if not available():
    pytest.skip(available().why, allow_module_level=True)

from titans_graph.kernels.triton_decode_host import KERNELS, Ring, begin, decode, decode_op, settled
from titans_graph.kernels.triton_host import State, Tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHUNK, DIM, HIDDEN = 16, 16, 32
HUBER = {"huber": {"delta": 0.3}}


def mlp(activation: str) -> dict[str, Any]:
    return {"mlp": {"depth": 2, "hidden": HIDDEN, "activation": activation}}


def case_of(network: Any, **options: Any) -> Case:
    """Row 0 begins a document at slot 16; row 1 goes on inside a chunk, misses a token and ends before the others."""
    case = make(network, chunk=CHUNK, slots=2 * CHUNK, dim=DIM, **options)
    with torch.no_grad():
        for name in ("q", "k"):
            case.tokens[name].copy_(torch.nn.functional.normalize(case.tokens[name], dim=-1))
    valid, position = case.valid.clone(), case.position.clone()
    position[0, CHUNK:] -= CHUNK
    position[1] += 2 * CHUNK
    valid[1, :5], valid[1, 27:] = False, False
    return case._replace(valid=valid, position=position)


def join(weights: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    one, *two = (x.detach().to(DEVICE, dtype) for x in weights)
    return torch.stack([one, two[0].mT], 2) if two else one


def begun(case: Case, dtype: torch.dtype) -> tuple[Sizes, float, Ring, tuple[Tensor, Tensor]]:
    """Sizes, the objective's number, the ring before the first token, and the state of a restart."""
    network, goal = parse_network(case.network), parse_objective(case.objective)
    kind = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    deep = len(case.state["weights"]) == 2
    act = network.nodes[1].use if deep else ""
    bounded = case.bounded and deep
    sizes = Sizes(CHUNK, DIM, HIDDEN if deep else 0, kind, act, goal.name, case.read, bounded=bounded)
    anchor = {n: x.detach().flatten(0, 1) for n, x in zip(network.weights(DIM), case.state["anchor"], strict=True)}
    scale = 1 / step_bound(network, anchor, case.tokens["k"].detach().flatten(0, 1)[:, :1])
    state = State(*(join(case.state[n]) for n in ("anchor", "weights", "momenta")))
    start = join(case.state["initial_weights"]), join(case.state["initial_momenta"])
    parameter = float(dict(goal.options).get("delta") or 0.0)
    return sizes, parameter, begin(sizes, state, scale.view(state.anchor.shape[:2]).to(DEVICE) if bounded else None), start


def tokens_at(case: Case, t: int, dtype: torch.dtype) -> tuple[Tokens, Tensor]:
    """The tokens of slot ``t``, NaN where there is none, and their positions, -1 there."""
    here = case.valid[:, t]
    hole = ~here[:, None, None]
    q, k, v, *gates = (x[:, :, t : t + 1].detach() for x in case.tokens.values())
    streams = [x.masked_fill(hole[..., None], torch.nan).to(DEVICE, dtype) for x in (q, k, v)]
    controls = [x.masked_fill(hole, torch.nan).to(DEVICE, torch.float32) for x in gates]
    return Tokens(*streams, *controls), torch.where(here, case.position[:, t], -1).to(DEVICE)


def assert_decodes(case: Case, dtype: torch.dtype = torch.float32, bar: float = 2e-6, tile: int = 16) -> None:
    sizes, parameter, ring, start = begun(case, dtype)
    answers = []
    with override("linear_decode", Config(4, 1, tile)), override("mlp_decode", Config(4, 1, tile)):
        for t in range(case.valid.shape[1]):
            tokens, position = tokens_at(case, t, dtype)
            answers.append(decode(sizes, parameter, ring, tokens, position, *start))
    want, *ends = call(case, "reference")
    count = len(ends) // 3
    wanted = [want, *(join(ends[i * count : (i + 1) * count], torch.float64) for i in range(3))]
    found = [torch.cat(answers, 2), *settled(sizes, ring, 2)]
    for name, a, b in zip(("y", "anchor", "weights", "momenta"), found, wanted, strict=True):
        error = float((a.double().cpu() - b.detach().cpu()).square().mean().sqrt() / b.detach().square().mean().sqrt())
        assert error <= bar, f"{name}: {error:.2e}"


@pytest.mark.parametrize("read", ["after", "before", "chunk"])
@pytest.mark.parametrize("network", ["linear", mlp("silu")], ids=["linear", "mlp"])
def test_decoding_follows_the_recurrence(network: Any, read: str) -> None:
    assert_decodes(case_of(network, read=read))


@pytest.mark.parametrize(
    ("activation", "objective", "bounded"), [("gelu", "dot", False), ("relu2", HUBER, True), ("silu", "l2", True)]
)
def test_activations_objectives_and_the_bound(activation: str, objective: Any, bounded: bool) -> None:
    assert_decodes(case_of(mlp(activation), objective=objective, bounded=bounded), bar=5e-6)


@pytest.mark.parametrize("objective", ["dot", HUBER], ids=["dot", "huber"])
def test_objectives_of_a_linear_memory(objective: Any) -> None:
    assert_decodes(case_of("linear", objective=objective, bounded=True))


@pytest.mark.parametrize("network", ["linear", mlp("silu")], ids=["linear", "mlp"])
def test_half_precision(network: Any) -> None:
    assert_decodes(case_of(network), torch.float16, bar=5e-3, tile=32)


def test_what_came_before_a_document_is_forgotten() -> None:
    """Also what is not finite: the ring still holds it when the next document begins."""
    case = case_of(mlp("silu"))
    for x in case.tokens.values():
        with torch.no_grad():
            x[0, :, 7:CHUNK] = torch.nan
    sizes, parameter, ring, start = begun(case, torch.float32)
    for t in range(case.valid.shape[1]):
        tokens, position = tokens_at(case, t, torch.float32)
        y = decode(sizes, parameter, ring, tokens, position, *start)
        if t >= CHUNK:
            assert y.isfinite().all()
    assert all(x.isfinite().all() for x in settled(sizes, ring, 2))


def test_a_row_without_a_token_stays_as_it_is() -> None:
    case = case_of("linear")
    sizes, parameter, ring, start = begun(case, torch.float32)
    before = settled(sizes, ring, 2)
    tokens, _ = tokens_at(case, 0, torch.float32)
    y = decode(sizes, parameter, ring, tokens, torch.tensor([-1, -1], device=DEVICE), *start)
    assert not y.any()
    for a, b in zip(before, settled(sizes, ring, 2), strict=True):
        assert torch.equal(a, b)


def test_one_operator_inside_a_compiled_region() -> None:
    """The same numbers, the ring changed in place, and initial states given once for all rows."""
    case = case_of("linear")
    outcomes = []
    for compiled in (False, True):
        sizes, parameter, ring, start = begun(case, torch.float32)
        shared = [x[:1].expand_as(x) if not compiled else x[0] for x in start]
        given: Any = decode
        step = torch.compile(given, backend="aot_eager", fullgraph=True) if compiled else given
        y = [step(sizes, parameter, ring, *tokens_at(case, t, torch.float32), *shared) for t in (0, 5, CHUNK)]
        outcomes.append([*y, *settled(sizes, ring, 2)])
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


def test_the_operator_keeps_its_promises() -> None:
    case = case_of("linear")
    sizes, parameter, ring, start = begun(case, torch.float32)
    tokens, position = tokens_at(case, 6, torch.float32)
    form = sizes.chunk, sizes.hidden, sizes.dtype, sizes.activation, sizes.objective, sizes.read, sizes.bounded, parameter
    torch.library.opcheck(decode_op, (*form, *ring, list(tokens), position, *start))


def test_what_no_kernel_knows_is_refused() -> None:
    state = State(*torch.zeros(3, 1, 1, 12, 12))
    with pytest.raises(UsageError, match="no kernel decodes"):
        begin(Sizes(16, 12), state)
    with pytest.raises(UsageError, match="needs the scale"):
        begin(Sizes(16, 16, 16, activation="silu", bounded=True), State(*torch.zeros(3, 1, 1, 2, 16, 16)))


def test_every_kernel_is_described() -> None:
    """What is compiled ahead of time is what is launched: every argument has a type or a value."""
    for kernel in KERNELS:
        size = Sizes(16, 16, 0 if kernel.name == "linear_decode" else 32, activation="silu")
        types, constants = kernel.describe(size, Config())
        assert list(kernel.function.arg_names) == [n for n in kernel.function.arg_names if n in types or n in constants]
