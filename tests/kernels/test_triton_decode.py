"""Decoding on Triton kernels, token by token, against the recurrence in fp64: any place in a chunk, rows apart, restarts.

On a GPU the kernels are compiled, elsewhere interpreted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_memory_cases import STATE, Case, make
from tests.kernels.test_memory_lazy import standing, truth
from titans_graph.errors import UsageError
from titans_graph.kernels.memory_decode import decode_kernel, decode_op, refusal, write_op
from titans_graph.kernels.memory_lazy import Lazy, begin, current, lazy_step, ready
from titans_graph.kernels.networks import parse_network
from titans_graph.kernels.triton_config import Config, Sizes, available, override

if not available():
    pytest.skip(available().why, allow_module_level=True)

from titans_graph.kernels import triton_decode_host
from titans_graph.kernels.triton_decode_host import KERNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHUNK, DIM, HIDDEN, TOKENS = 20, 16, 32, 24
HUBER = {"huber": {"delta": 0.3}}

run_step: Any = lazy_step  # Called with unpacked lists, which no checker follows.


def mlp(activation: str) -> dict[str, Any]:
    return {"mlp": {"depth": 2, "hidden": HIDDEN, "activation": activation}}


def case_of(network: Any, chunk: int = CHUNK, **options: Any) -> Case:
    """Weights small enough for fp32 to follow fp64; the texts in the form in which a component gives them."""
    case = make(network, chunk=chunk, slots=TOKENS, dim=DIM, **options)
    with torch.no_grad():
        for name in ("q", "k"):
            case.tokens[name].copy_(torch.nn.functional.normalize(case.tokens[name], dim=-1))
    return case._replace(network=parse_network(case.network).text())


def poisoned(state: Lazy, taken: int) -> Lazy:
    """The state with NaN in every slot that holds no pair, where a slot has a share of 0."""
    rings = [[x.clone() for x in values] for values in (state.inputs, state.deltas)]
    for ring in (*rings[0], *rings[1]):
        ring[:, :, taken:] = torch.nan
    return state._replace(inputs=rings[0], deltas=rings[1])


def decoded(case: Case, position: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """All tokens one by one, rows standing at ``position`` ``[B, T]``: ``[y, anchor.., weights.., momenta..]``.

    The state is in float32, as a component keeps it; a narrower ``dtype`` is that of the tokens and of what is read.
    """
    lists = [[x.detach().to(DEVICE, torch.float32) for x in case.state[n]] for n in STATE]
    tokens = {n: x.detach().to(DEVICE, dtype if n in "qkv" else torch.float32) for n, x in case.tokens.items()}
    state, taken, answers = begin(case.network, case.chunk, case.bounded, *lists[:3], reads=dtype), 0, []
    for t in range(position.shape[1]):
        places = position[:, t].tolist()
        state, taken = ready(case.network, case.chunk, poisoned(state, taken), taken, places, lists[3], "triton")
        now = [x[:, :, t : t + 1] for x in tokens.values()]
        form = case.network, case.objective, case.read, case.bounded
        y, state = run_step(*form, poisoned(state, taken), *now, kernel="triton")
        taken += 1
        answers.append(y)
    ends = current(case.network, poisoned(state, taken), "triton")
    return [torch.cat(answers, 2), *state.anchor, *(x for values in ends for x in values)]


def assert_decodes(case: Case, dtype: torch.dtype = torch.float32, bar: float = 2e-6, tile: int = 16) -> None:
    """Row 0 stands inside a chunk, row 1 begins a new document after seven tokens."""
    position = standing(2, TOKENS, [3, 0])
    with torch.no_grad():
        wanted = truth(case, position)
        with override("linear_decode", Config(4, 1, tile)), override("mlp_decode", Config(4, 1, tile)):
            found = decoded(case, position, dtype)
    for a, b in zip(found, wanted, strict=True):
        error = float((a.double().cpu() - b).square().mean().sqrt() / b.square().mean().sqrt())
        assert error <= bar, f"{list(a.shape)}: {error:.2e}"


@pytest.mark.parametrize("read", ["after", "before", "chunk"])
@pytest.mark.parametrize("network", ["linear", mlp("silu")], ids=["linear", "mlp"])
def test_decoding_follows_the_recurrence(network: Any, read: str) -> None:
    assert_decodes(case_of(network, read=read))


@pytest.mark.parametrize(
    ("activation", "objective", "bounded"), [("gelu", "dot", True), ("relu2", HUBER, True), ("silu", "l2", True)]
)
def test_activations_objectives_and_the_bound(activation: str, objective: Any, bounded: bool) -> None:
    assert_decodes(case_of(mlp(activation), objective=objective, bounded=bounded), bar=5e-6)


@pytest.mark.parametrize("objective", ["dot", HUBER], ids=["dot", "huber"])
def test_objectives_of_a_linear_memory(objective: Any) -> None:
    assert_decodes(case_of("linear", objective=objective, bounded=True))


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_any_chunk(chunk: int) -> None:
    """A chunk below the ring's slots, whose number is then no power of 2, and one as long as the ring."""
    assert_decodes(case_of("linear", chunk), bar=5e-6)


@pytest.mark.parametrize("network", ["linear", mlp("silu")], ids=["linear", "mlp"])
def test_half_precision(network: Any) -> None:
    assert_decodes(case_of(network), torch.float16, bar=5e-3, tile=64)


def begun(case: Case) -> tuple[tuple[Any, ...], list[Any], list[Tensor]]:
    """What :func:`decode_op` takes: the form, a state, the tokens of the first slot."""
    lists = [[x.detach().to(DEVICE, torch.float32) for x in case.state[n]] for n in STATE]
    state = begin(case.network, case.chunk, case.bounded, *lists[:3])
    tokens = [x.detach()[:, :, :1].to(DEVICE, torch.float32) for x in case.tokens.values()]
    return (case.network, case.objective, case.read, case.bounded), list(state[:-1]), tokens


@pytest.mark.parametrize("network", ["linear", mlp("silu")], ids=["linear", "mlp"])
def test_the_operators_keep_their_promises(network: Any) -> None:
    form, state, tokens = begun(case_of(network))
    for kind in (torch.float32, torch.float16):
        torch.library.opcheck(decode_op, (*form, *([x.to(kind) for x in fast] for fast in state[:3]), *state[3:], tokens))
    for reads in (None, torch.float16):
        torch.library.opcheck(write_op, (*state[1:7], reads))


def test_one_operator_inside_a_compiled_region() -> None:
    """The same numbers, one graph for every slot."""
    form, state, tokens = begun(case_of("linear"))
    compiled: Any = torch.compile(run_step, backend="aot_eager", fullgraph=True)
    one = two = Lazy(*state)
    for _ in range(3):
        y, one = run_step(*form, one, *tokens, kernel="triton")
        z, two = compiled(*form, two, *tokens, kernel="triton")
        assert torch.equal(y, z)
    assert torch.equal(one.shares, two.shares)


def test_kernels_run_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        events.append(f"on {index}")
        yield
        events.append("done")

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(triton_decode_host, "_launch", lambda name, *_: events.append(name))
    form, state, tokens = begun(case_of("linear"))
    run_step(*form, Lazy(*state), *tokens, kernel="triton")
    current(form[0], Lazy(*state), "triton")
    here = f"on {tokens[0].get_device()}"
    assert events == [here, "linear_decode", "done", here, "decode_write", "done"]


def test_no_rows() -> None:
    form, state, tokens = begun(case_of(mlp("silu"), batch=0))
    y, after = run_step(*form, Lazy(*state), *tokens, kernel="triton")
    assert y.shape == (0, 2, 1, DIM)
    assert [x.shape for x in current(form[0], after, "triton")[0]] == [x.shape for x in after.weights]


@pytest.mark.parametrize(
    ("network", "objective", "dim", "operand", "why"),
    [
        ({"mlp": {"depth": 3}}, "l2", 16, torch.float32, "an MLP of two layers"),
        ("linear", {"lp": {"p": 3}}, 16, torch.float32, "no kernel knows the objective 'lp'"),
        ("linear", "l2", 12, torch.float32, "no kernel decodes with keys of size 12"),
        ({"mlp": {"hidden": 24}}, "l2", 16, torch.float32, "keys of size 16, hidden size 24"),
        ("linear", "l2", 16, torch.float64, "no kernel computes in float64"),
    ],
)
def test_what_no_kernel_knows(network: Any, objective: Any, dim: int, operand: torch.dtype, why: str) -> None:
    """By name an error, by itself the portable form."""
    case = make(network, objective, dim=dim)
    assert why in refusal(case.network, case.objective, "after", dim, operand)
    with pytest.raises(UsageError, match=r"kernel='triton': (no kernel|there are kernels)"):
        decode_kernel("triton", case.network, case.objective, "after", dim, operand, DEVICE)
    assert decode_kernel("auto", case.network, case.objective, "after", dim, operand, "cuda") == "portable"


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    network = parse_network({"mlp": {"hidden": 112}}).text()
    with caplog.at_level("INFO", logger="titans_graph.kernels"):
        for kernel, device in (("auto", "cuda"), ("auto", "cuda"), ("portable", "cuda"), ("auto", "cpu")):
            decode_kernel(kernel, network, "l2", "after", 16, torch.float16, device)
        decode_kernel("auto", network, "l2", "after", 12, torch.float16, "cuda")
    said = [r.getMessage() for r in caplog.records]
    assert [m.split(" for ")[0] for m in said] == [
        "single tokens: kernel triton on cuda in torch.float16",
        "single tokens: kernel portable on cuda in torch.float16",
    ]
    assert said[1].endswith("no kernel decodes with keys of size 12, hidden size 112")


def test_every_kernel_is_described() -> None:
    """What is compiled ahead of time is what is launched: every argument has a type or a value."""
    for kernel in KERNELS:
        size = Sizes(16, 16, 0 if kernel.name == "linear_decode" else 32, activation="silu")
        types, constants = kernel.describe(size, Config())
        assert list(kernel.function.arg_names) == [n for n in kernel.function.arg_names if n in types or n in constants]
