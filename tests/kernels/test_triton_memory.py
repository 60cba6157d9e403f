"""The memory on Triton kernels (in Triton's interpreter where there is no GPU) against the portable form in fp64."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import titans_graph as tg
from tests.kernels.test_memory_cases import STATE, Case, make
from titans_graph.errors import UsageError
from titans_graph.kernels import triton_memory
from titans_graph.kernels.memory import _tell, choose, memory_scan
from titans_graph.kernels.networks import parse_network
from titans_graph.kernels.triton_config import Availability, available, interpreted
from titans_graph.kernels.triton_host import kept_limit
from titans_graph.kernels.triton_memory import join, triton_op
from titans_graph.spec import read_text

pytestmark = [
    pytest.mark.skipif(not available(), reason=str(available().why)),
    # exp(-z) of a very negative z is infinite on a GPU too, and the sigmoid 0.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCAN: Any = memory_scan
BARS = {torch.float32: (2e-6, 2e-6), torch.float16: (5e-3, 2e-2)}


def spread(case: Case, skip: Sequence[int], stop: Sequence[int], restart: int = -1) -> Case:
    """Rows that begin ``skip`` slots late and end before ``stop``; the first restarts at chunk ``restart``."""
    valid, position = case.valid.clone(), case.position.clone() + 4 * case.chunk
    for row, (a, b) in enumerate(zip(skip, stop, strict=True)):
        valid[row, :a] = False
        valid[row, b:] = False
    if restart >= 0:
        begin = restart * case.chunk
        position[0, begin:] -= position[0, begin].clone()
    return case._replace(valid=valid, position=position)


def run(case: Case, kernel: str, dtype: torch.dtype, poison: bool = False, resumed: bool = True) -> list[Tensor]:
    """y and the three final states, then the gradients of a fixed random weighting of them by all arguments."""
    where = "cpu" if kernel == "chunk" else DEVICE
    invalid = ~case.valid[:, None].expand_as(case.tokens["step"])
    leaves = [x.detach().to(where, torch.float64 if kernel == "chunk" else torch.float32) for x in case.leaves()]
    leaves = [x.requires_grad_() for x in leaves]
    n = len(case.state["weights"])
    state = [leaves[i * n : (i + 1) * n] for i in range(len(STATE))]
    tokens = leaves[len(STATE) * n :]
    given = [torch.where(_like(invalid.to(where), x), torch.nan, x) if poison else x for x in tokens]
    given = [x.to(dtype) if i < 3 and kernel != "chunk" else x for i, x in enumerate(given)]
    y, *ends = SCAN(
        case.network, case.objective, case.read, case.chunk, case.bounded, *state, *given,
        case.valid.to(where), case.position.to(where), kernel=kernel, resumed=resumed,
    )  # fmt: skip
    results = [y, *(x for end in ends for x in end)]
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in results]
    total = torch.stack([(x.double() * w.to(where)).sum() for x, w in zip(results, weights, strict=True)]).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [x.detach().cpu().double() for x in (*results, *(_zero(g, x) for g, x in zip(grads, leaves, strict=True)))]


def _like(invalid: Tensor, x: Tensor) -> Tensor:
    return invalid if x.dim() == 3 else invalid[..., None]


def _zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def far(got: Tensor, want: Tensor) -> float:
    """RMS of the error over RMS of what is wanted."""
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-2))


def assert_near(case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    got, want = run(case, "triton", dtype, poison=True, **options), run(case, "chunk", dtype)
    assert all(x.isfinite().all() for x in got)
    count = 1 + 3 * len(case.state["weights"])
    errors = [far(a, b) for a, b in zip(got, want, strict=True)]
    assert max(errors[:count]) <= BARS[dtype][0]
    assert max(errors[count:]) <= BARS[dtype][1]


def tame(*args: Any, **kwargs: Any) -> Case:
    """A random case inside the stable region: outputs of size 1, unit keys."""
    case = make(*args, **kwargs)
    state = {n: [x.detach() * (1.4 / x.shape[-2] ** 0.5) for x in xs] for n, xs in case.state.items()}
    tokens = {n: x.detach() for n, x in case.tokens.items()}
    tokens["k"] = torch.nn.functional.normalize(tokens["k"], dim=-1)
    return case._replace(state=state, tokens=tokens)


SILU = {"mlp": {"hidden": 32}}
SMALL: dict[str, Any] = {"chunk": 16, "slots": 32, "dim": 16, "heads": 1}
CASES: dict[str, Case] = {
    "silu": tame(SILU, **SMALL | {"slots": 48, "heads": 3}),
    "gelu, before, dot": tame({"mlp": {"hidden": 16, "activation": "gelu"}}, "dot", "before", **SMALL),
    "relu2, huber": tame(
        {"mlp": {"hidden": 48, "activation": "relu2"}}, {"huber": {"delta": 0.5}}, **SMALL | {"slots": 64, "chunk": 32}
    ),
    "huber": tame(SILU, {"huber": {"delta": 0.1}}, **SMALL),
    "bounded": tame(SILU, bounded=True, **SMALL),
    "chunk": tame(SILU, read="chunk", bounded=True, **SMALL),
    "linear": tame("linear", bounded=True, **SMALL),
    "linear, before, huber": tame("linear", {"huber": {"delta": 0.5}}, "before", **SMALL | {"dim": 32}),
    "linear, chunk": tame("linear", "dot", "chunk", **SMALL),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_begun_elsewhere_and_restarted(name: str) -> None:
    """Anchors that differ from the weights, an empty chunk, a restart inside a row, NaN in every slot without a token."""
    case = CASES[name]
    assert_near(spread(case, (5, case.chunk + 2), (case.valid.shape[1], case.valid.shape[1] - 3), restart=1))


@pytest.mark.parametrize("name", ["bounded", "chunk", "linear"])
def test_rows_that_begin_with_a_chunk(name: str) -> None:
    case = CASES[name]
    case = spread(case, (0, 0), (48, 17))
    same = case.state | {"anchor": case.state["weights"]}
    assert_near(case._replace(state=same), resumed=False)


def test_keys_of_128() -> None:
    """Larger than the parts in which the reverse scan takes the states' cotangents; no chip has the memory for fp32."""
    case = tame(SILU, **SMALL | {"dim": 128})
    rounded = case.tokens | {n: case.tokens[n].half().double() for n in "qkv"}
    dtype = torch.float32 if interpreted() else torch.float16
    assert_near(spread(case._replace(tokens=rounded), (0, 5), (32, 29), restart=1), dtype)


@pytest.mark.parametrize("name", ["bounded", "huber", "linear"])
def test_half_precision(name: str) -> None:
    """0.1 is less in half precision, so that a delta that was cut off is less than the limit: it has no slope still."""
    case = CASES[name]
    rounded = case.tokens | {n: case.tokens[n].half().double() for n in "qkv"}
    assert_near(spread(case._replace(tokens=rounded), (5, 18), (32, 29)), torch.float16)


def test_numbers_stay_on_the_host_whatever_the_default_device_is() -> None:
    """One that is made on a GPU is waited for, which no CUDA graph can hold."""
    with torch.device("meta"):
        assert 0.0999 < kept_limit(0.1, torch.float16) < 0.1
        assert kept_limit(0.5, torch.bfloat16) == 0.5


@pytest.mark.parametrize("network", [SILU, "linear"])
def test_hostile_gates(network: Any) -> None:
    """Momentum and keep of exactly 0 and 1, and steps of 0."""
    case = tame(network, **SMALL)
    tokens = {n: x.clone() for n, x in case.tokens.items()}
    tokens["log_momentum"][:, :, 3::7] = -torch.inf
    tokens["log_keep"][:, :, 5::11] = -torch.inf
    tokens["log_keep"][:, :, 6::11] = 0.0
    tokens["step"][:, :, ::5] = 0.0
    assert_near(case._replace(tokens=tokens))


@pytest.mark.parametrize("network", [SILU, "linear"])
def test_the_operators_keep_their_promises(network: Any) -> None:
    """Schema, fake results, autograd registration and tracing with dynamic shapes, forward and backward."""
    case = tame(network, **SMALL)
    state = [join([x.float() for x in case.state[n]]).contiguous().to(DEVICE).requires_grad_() for n in STATE]
    tokens = [x.float().to(DEVICE).requires_grad_() for x in case.tokens.values()]
    places = [case.valid.to(DEVICE), case.position.to(DEVICE)]
    torch.library.opcheck(triton_op, (case.network, "l2", "after", 16, False, True, True, state, tokens, places))


@pytest.mark.parametrize("network", ["linear", {"mlp": {"hidden": 16}}], ids=["linear", "mlp"])
def test_results_may_be_changed_in_place(network: Any) -> None:
    """One row of one head, whose tensors need no copy to be contiguous."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.ones(1, 1, 16, 16, device=device, requires_grad=True)
    start = {n: torch.ones(1, 1, *s, device=device) / 16 for n, s in tg.fast_weights(network, 16).items()}
    y, state = tg.neural_memory(network, start, x, x, x, step=x[..., 0].detach() / 100, chunk=16, kernel="triton")
    y += 1
    for values in (state.weights, state.momenta):
        for w in values.values():
            w.mul_(0.5)
    (grad,) = torch.autograd.grad(y.sum() + state.weights[next(iter(start))].sum(), x)
    assert grad.isfinite().all()


@pytest.mark.compile
def test_a_compiled_region_has_no_break_and_any_length() -> None:
    """One graph for all lengths of several chunks, the kernels opaque in it."""
    graphs = CompileCounterWithBackend("aot_eager")
    case = tame(SILU, **SMALL)
    weights = dict(zip(("w1", "w2"), (x.float().to(DEVICE) for x in case.state["weights"]), strict=True))

    def answer(q: Tensor, step: Tensor) -> Tensor:
        return tg.neural_memory(SILU, weights, q, q * 0.5, q + 1, step=step.sigmoid() * 0.01, chunk=16, kernel="triton")[0]

    compiled = torch.compile(answer, backend=graphs, fullgraph=True)
    for slots in (33, 50):
        q, step = torch.randn(2, 1, slots, 16, device=DEVICE), torch.randn(2, 1, slots, device=DEVICE)
        leaves = q.requires_grad_(), step.requires_grad_()
        for x in leaves:
            torch._dynamo.mark_dynamic(x, 2)
        got, want = compiled(*leaves), answer(*leaves)
        torch.testing.assert_close(got, want)
        for a, b in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (got, want)), strict=True):
            torch.testing.assert_close(a, b)
    assert graphs.frame_count == 1


def test_kernels_run_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU, which need not be theirs: both operators make it so first."""
    events: list[str] = []
    plan = triton_memory._plan

    @contextmanager
    def device(index: int) -> Iterator[None]:
        events.append(f"on {index}")
        yield
        events.append("done")

    def planned(*args: Any) -> Any:
        events.append("work")
        return plan(*args)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(triton_memory, "_plan", planned)
    run(tame("linear", **SMALL | {"slots": 16, "batch": 1}), "triton", torch.float32)
    assert events == [f"on {torch.empty(0, device=DEVICE).get_device()}", "work", "done"] * 2


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    triton_memory._announce.cache_clear()
    case = tame("linear", **SMALL | {"slots": 16, "batch": 1})
    with caplog.at_level(logging.INFO, "titans_graph.kernels"):
        run(case, "triton", torch.float32)
        run(case, "triton", torch.float32)
    assert sum("kernel triton" in r.getMessage() for r in caplog.records) == 1


def test_a_gpu_without_a_kernel_for_the_memory_says_what_runs_instead(caplog: pytest.LogCaptureFixture) -> None:
    _tell.cache_clear()
    with caplog.at_level(logging.INFO, "titans_graph.kernels"):
        assert choose("auto", "linear", "l2", "after", 16, False, 12, torch.float32, True) == "chunk"
        assert choose("auto", "linear", "l2", "after", 16, False, 16, torch.float32, True) == "triton"
        assert choose("auto", "linear", "l2", "after", 16, False, 16, torch.float32, False) == "chunk"
        assert choose("portable", "linear", "l2", "after", 16, False, 16, torch.float32, True) == "chunk"
    assert ["chunk instead of triton" in r.getMessage() for r in caplog.records] == [True]


def test_a_spec_names_the_kernel() -> None:
    """The component on Triton kernels equals the same on the portable form, streamed and whole."""
    memory = "{use: memory.neural, in: x, heads: 2, chunk: 16, conv: 0, network: {mlp: {hidden: 16}}, kernel: %s}"
    text = f"titans_graph: 1\ninput: {{x: [B, T, 32]}}\nnodes:\n  y: {memory}\noutput: y\n"
    models = []
    for kernel in ("triton", "chunk"):
        torch.manual_seed(0)
        declared = read_text(text % kernel)
        assert declared.graph is not None
        models.append(tg.build(declared.graph).to(DEVICE))
    x = torch.randn(1, 40, 32, device=DEVICE)
    with torch.no_grad():
        (whole, _), (want, _) = (model(x) for model in models)
        first, state = models[0](x[:, :21])
        second, _ = models[0](x[:, 21:], state)
    torch.testing.assert_close(whole, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([first, second], 1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": {"mlp": {"depth": 3}}}, "an MLP of two layers"),
        ({"network": {"swiglu": {}}}, "an MLP of two layers"),
        ({"network": {"mlp": {"hidden": 16, "residual": True}}, "dim": 16}, "an MLP of two layers"),
        ({"objective": {"lp": {"p": 3}}}, "no kernel knows the objective 'lp'"),
        ({"dim": 12}, "keys of size 12"),
        ({"chunk": 8, "dim": 16, "slots": 16}, "chunks of 8"),
    ],
)
def test_what_there_is_no_kernel_for_is_refused(options: dict[str, Any], message: str) -> None:
    case = tame(**({"chunk": 16, "slots": 16, "dim": 16} | options))
    with pytest.raises(UsageError, match=message):
        run(case, "triton", torch.float32)


def test_double_precision_is_refused() -> None:
    case = tame(SILU, **SMALL)
    state = [case.state[n] for n in STATE]
    with pytest.raises(UsageError, match="computes in float64"):
        SCAN(
            case.network, "l2", "after", 16, False, *state, *case.tokens.values(), case.valid, case.position, kernel="triton"
        )  # fmt: skip


def test_a_chip_without_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk too long for a GPU's shared memory goes to the portable form instead of failing when it is launched."""
    network = parse_network({"mlp": {"hidden": 256}}).text()
    monkeypatch.setattr(triton_memory, "interpreted", lambda: False)
    monkeypatch.setattr(triton_memory, "available", Availability)

    def why(arch: str, chunk: int, dim: int = 64, operand: torch.dtype = torch.bfloat16) -> str:
        monkeypatch.setattr(triton_memory, "current_arch", lambda: arch)
        return triton_memory.refusal(network, "l2", "after", chunk, False, dim, operand)

    assert why("sm_90", 256) == why("sm_80", 128) == why("gfx942", 64) == ""
    assert why("sm_80", 256).endswith("in chunks of 256 and bf16 on sm_80, which has memory for chunks of 128")
    assert why("sm_90", 256, 128).endswith("which has memory for chunks of 128")
    assert why("sm_90", 16, 128, torch.float32).endswith("in chunks of 16 and fp32 on sm_90")
