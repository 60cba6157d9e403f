"""``tg.neural_memory``: against a recurrence of its own written from the equations, for any split, with its errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree

import titans_graph as tg
from titans_graph.errors import UsageError

# Called with unpacked settings, which no checker follows.
memorise: Any = tg.neural_memory

B, H, D = 2, 2, 3
Weights = dict[str, Tensor]


def mlp(weights: Weights, x: Tensor) -> Tensor:
    return F.silu(x @ weights["w1"]) @ weights["w2"]


def swiglu(weights: Weights, x: Tensor) -> Tensor:
    return (F.silu(x @ weights["gate"]) * (x @ weights["up"])) @ weights["down"]


NETWORKS: dict[str, tuple[Any, Callable[[Weights, Tensor], Tensor]]] = {
    "linear": ("linear", lambda weights, x: x @ weights["w"]),
    "mlp": ({"mlp": {"depth": 2, "hidden": 5}}, mlp),
    "swiglu": ({"swiglu": {"hidden": 4}}, swiglu),
}
OBJECTIVES: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "l2": ("l2", lambda y, v: (y - v).square()),
    "dot": ("dot", lambda y, v: -y * v),
    "huber": ({"huber": {"delta": 0.3}}, lambda y, v: F.huber_loss(y, v, delta=0.3, reduction="none")),
    "lp": ({"lp": {"p": 3}}, lambda y, v: (y - v).abs() ** 3),
}


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Tokens:
    """Random inputs of a call, each a leaf that asks for its gradient."""

    def __init__(self, network: Any, tokens: int) -> None:
        shapes = tg.fast_weights(network, D)
        self.weights = {n: 0.5 * numbers((B, H, *s), i) for i, (n, s) in enumerate(shapes.items())}
        self.momenta = {n: 0.3 * numbers((B, H, *s), 10 + i) for i, (n, s) in enumerate(shapes.items())}
        self.q, self.k, self.v = (0.7 * numbers((B, H, tokens, D), 20 + i) for i in range(3))
        self.step = 0.02 * numbers((B, H, tokens), 30).sigmoid()
        self.log_momentum, self.log_keep = (F.logsigmoid(numbers((B, H, tokens), 31 + i)) for i in range(2))
        for x in self.leaves():
            x.requires_grad_()

    def leaves(self) -> list[Tensor]:
        named = [*self.weights.values(), *self.momenta.values()]
        return [*named, self.q, self.k, self.v, self.step, self.log_momentum, self.log_keep]

    def part(self, a: int, b: int) -> tuple[list[Tensor], dict[str, Any]]:
        streams = [x[:, :, a:b] for x in (self.q, self.k, self.v)]
        gates = ("step", "log_momentum", "log_keep")
        return streams, {n: getattr(self, n)[:, :, a:b] for n in gates}


def recurrence(
    f: Callable[[Weights, Tensor], Tensor], loss: Callable[[Tensor, Tensor], Tensor], t: Tokens, chunk: int, read: str
) -> tuple[list[Tensor], Weights, Weights]:
    """Equations 8-15, a token at a time."""
    now, momenta, anchor, outputs = t.weights, t.momenta, t.weights, []
    for i in range(t.q.shape[2]):
        if i % chunk == 0:
            anchor = now
        q, k, v = (x[:, :, i : i + 1] for x in (t.q, t.k, t.v))

        def surprise(weights: Weights, k: Tensor = k, v: Tensor = v) -> Tensor:
            return loss(f(weights, k), v).sum()

        gradient = torch.func.grad(surprise)(anchor)
        theta, eta, keep = (x[:, :, i, None, None] for x in (t.step, t.log_momentum.exp(), t.log_keep.exp()))
        momenta = {n: eta * momenta[n] - theta * gradient[n] for n in momenta}
        after = {n: keep * now[n] + momenta[n] for n in now}
        outputs.append(f({"after": after, "before": now, "chunk": anchor}[read], q))
        now = after
    return outputs, now, momenta


def streamed(network: Any, objective: Any, t: Tokens, cuts: list[int], **settings: Any) -> tuple[Tensor, Any]:
    state = tg.MemoryState.initial(t.weights, t.momenta)
    parts = []
    for a, b in zip([0, *cuts], [*cuts, t.q.shape[2]], strict=True):
        streams, gates = t.part(a, b)
        y, state = memorise(network, None, *streams, **gates, objective=objective, state=state, **settings)
        parts.append(y)
    return torch.cat(parts, 2), state


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().abs().max()) / max(1.0, float(want.detach().square().mean().sqrt()))


@pytest.mark.parametrize("read", ["after", "before", "chunk"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("network", NETWORKS)
@settings(max_examples=max(5, settings().max_examples // 4))  # of each of 36 combinations
@given(data=st.data())
def test_any_split_equals_the_recurrence(network: str, objective: str, read: str, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 11), "tokens")
    chunk = data.draw(st.sampled_from([1, 3, 4, 16]), "chunk")
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=3), "cuts"))
    described, f = NETWORKS[network]
    goal, loss = OBJECTIVES[objective]
    t = Tokens(described, tokens)
    y, state = streamed(described, goal, t, cuts, chunk=chunk, read=read)
    outputs, weights, momenta = recurrence(f, loss, t, chunk, read)
    names = list(weights)
    got = [y, *(state.weights[n] for n in names), *(state.momenta[n] for n in names)]
    want = [torch.cat(outputs, 2), *weights.values(), *momenta.values()]
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) <= 1e-9
    probe = [numbers(tuple(x.shape), 50 + i) for i, x in enumerate(got)]
    ours, theirs = (
        torch.autograd.grad(
            torch.stack([(x * p).sum() for x, p in zip(xs, probe, strict=True)]).sum(),
            t.leaves(),
            allow_unused=True,
            materialize_grads=True,
        )
        for xs in (got, want)
    )
    assert max(error(a, b) for a, b in zip(ours, theirs, strict=True)) <= 1e-8


@pytest.mark.parametrize("kernel", ["reference", "chunk", "compiled"])
def test_every_kernel_gives_the_same(kernel: str) -> None:
    described, f = NETWORKS["mlp"]
    t = Tokens(described, 10)
    streams, gates = t.part(0, 10)
    y, _ = memorise(described, t.weights, *streams, **gates, chunk=4, kernel=kernel)
    zero = Tokens(described, 10)
    zero.momenta = {n: torch.zeros_like(s) for n, s in t.momenta.items()}
    outputs, _, _ = recurrence(f, OBJECTIVES["l2"][1], zero, 4, "after")
    assert error(y, torch.cat(outputs, 2)) <= 1e-9


def test_the_delta_rule() -> None:
    """Chunk 1, linear, no momentum: M_t = M_(t-1) - 2 theta k^T (k M_(t-1) - v); with keep, the gated delta rule."""
    t = Tokens("linear", 9)
    streams, gates = t.part(0, 9)
    state = memorise("linear", t.weights, *streams, step=gates["step"], chunk=1)[1]
    m = t.weights["w"]
    for i in range(9):
        k, v = t.k[:, :, i : i + 1], t.v[:, :, i : i + 1]
        m = m - 2 * t.step[:, :, i, None, None] * k.mT @ (k @ m - v)
    assert error(state.weights["w"], m) <= 1e-12
    # Titans takes the gradient before the decay: keep = alpha, 2 theta = alpha beta, and v / alpha in place of v.
    alpha, beta = t.log_keep.exp(), t.step
    scaled = t.v / alpha[..., None]
    state = memorise(
        "linear", t.weights, t.q, t.k, scaled, step=alpha * beta / 2, log_keep=t.log_keep, chunk=1
    )[1]  # fmt: skip
    m = t.weights["w"]
    for i in range(9):
        k, v = t.k[:, :, i : i + 1], t.v[:, :, i : i + 1]
        kept = alpha[:, :, i, None, None] * m
        m = kept - beta[:, :, i, None, None] * k.mT @ (k @ kept - v)
    assert error(state.weights["w"], m) <= 1e-12


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("gate", ["keep 0", "keep 1", "momentum 0", "momentum 1", "step 0", "zeros"])
def test_hostile_gates(gate: str, chunk: int) -> None:
    described, f = NETWORKS["mlp"]
    t = Tokens(described, 10)
    zero = torch.zeros(B, H, 10, dtype=torch.float64)
    some = torch.arange(10) % 3 == 1
    if gate.startswith("keep"):
        t.log_keep = torch.where(some, -torch.inf if gate == "keep 0" else 0.0, zero)
    elif gate.startswith("momentum"):
        t.log_momentum = torch.where(some, -torch.inf if gate == "momentum 0" else 0.0, zero - 0.5)
    elif gate == "step 0":
        t.step = zero
    else:
        t.k, t.v = t.k.detach() * 0, t.v.detach() * 0
    streams, gates = t.part(0, 10)
    y, state = memorise(described, None, *streams, **gates, chunk=chunk, state=tg.MemoryState.initial(t.weights, t.momenta))
    outputs, weights, _ = recurrence(f, OBJECTIVES["l2"][1], t, chunk, "after")
    assert error(y, torch.cat(outputs, 2)) <= 1e-9
    assert all(error(state.weights[n], w) <= 1e-9 for n, w in weights.items())
    gradients = torch.autograd.grad(y.sum(), [*t.weights.values(), t.q])
    assert all(g.isfinite().all() for g in gradients)


def test_single_precision() -> None:
    described = {"mlp": {"depth": 2, "hidden": 64}}
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 300, 16, generator=g, dtype=torch.float64) for _ in range(3))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    shapes = tg.fast_weights(described, 16)
    weights = {n: torch.randn(2, 2, *s, generator=g, dtype=torch.float64) / s[0] ** 0.5 for n, s in shapes.items()}
    gates = [torch.randn(2, 2, 300, generator=g, dtype=torch.float64) for _ in range(3)]
    settings = {
        "step": 0.002 * gates[0].sigmoid(),
        "log_momentum": F.logsigmoid(gates[1]),
        "log_keep": F.logsigmoid(gates[2] + 4),
    }
    want, end = memorise(described, weights, q, k, v, **settings)
    single: dict[str, Any] = {n: x.float() for n, x in settings.items()}
    y, state = memorise(described, {n: w.float() for n, w in weights.items()}, q.float(), k.float(), v.float(), **single)
    pairs = [(y, want), *((state.weights[n], w) for n, w in end.weights.items())]
    assert all(((a - b).square().mean() / b.square().mean()).sqrt() <= 1e-4 for a, b in pairs)


def test_state_is_a_pytree_that_detaches_and_reorders() -> None:
    t = Tokens("linear", 5)
    streams, gates = t.part(0, 5)
    _, state = memorise("linear", t.weights, *streams, **gates, chunk=4)
    assert (state.phase, state.chunk) == (1, 4)
    leaves, spec = _pytree.tree_flatten(state)
    assert len(leaves) == 3
    again = _pytree.tree_unflatten(leaves, spec)
    assert again.weights["w"] is state.weights["w"]
    assert (again.phase, again.chunk) == (1, 4)
    assert _pytree.treespec_loads(_pytree.treespec_dumps(spec)) == spec
    assert next(_pytree.keystr(path) for path, _ in _pytree.tree_flatten_with_path(state)[0]) == ".weights['w']"
    assert state.to(torch.float32).momenta["w"].dtype == torch.float32
    assert not state.detach().weights["w"].requires_grad
    swapped = state.reorder(torch.tensor([1, 0, 1]))
    assert torch.equal(swapped.momenta["w"], state.momenta["w"][[1, 0, 1]])


def test_no_tokens_change_nothing() -> None:
    t = Tokens("linear", 3)
    streams, gates = t.part(0, 0)
    y, state = memorise("linear", t.weights, *streams, **gates)
    assert y.shape == (B, H, 0, D)
    assert torch.equal(state.weights["w"], t.weights["w"])


def test_fast_weights() -> None:
    assert tg.fast_weights({"mlp": {"depth": 3, "hidden": 8}}, 4) == {"w1": (4, 8), "w2": (8, 8), "w3": (8, 4)}
    assert tg.fast_weights({"swiglu": {"hidden": 8}}, 4) == {"gate": (4, 8), "up": (4, 8), "down": (8, 4)}
    assert tg.fast_weights("linear", 4) == {"w": (4, 4)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": None}, "needs weights, or a state"),
        ({"weights": {"m": torch.zeros(B, H, D, D)}}, r"weights of linear must be \{w: \[2, 2, 3, 3\]\}; got \{m:"),
        ({"k": torch.zeros(B, H, 4, D)}, "q, k and v must have one shape"),
        ({"step": torch.zeros(B, H, 4)}, r"must have the shape \[2, 2, 5\]"),
        ({"chunk": 0}, "chunk must be a whole number of at least 1"),
        ({"read": "later"}, "read is one of after, before, chunk"),
        ({"network": "lineal"}, "did you mean 'linear'"),
        ({"objective": "l3"}, "unknown objective"),
        ({"kernel": "fast"}, "kernel one of"),
        ({"kernel": "fast", **{n: torch.zeros(B, H, 0, D) for n in "qkv"}, "step": torch.zeros(B, H, 0)}, "kernel one of"),
        ({"weights": {"w": torch.zeros(B, H, D, D, device="meta")}}, "one device; got cpu, meta"),
        ({"weights": {"w": torch.zeros(B, H, D, D, dtype=torch.int64)}}, "must be floating point"),
        (
            {"state": tg.MemoryState.initial({"w": torch.zeros(B, H, D, D)}, {"w": torch.zeros(B, H, D, D).double()})},
            "of one type",
        ),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    zeros = torch.zeros(B, H, 5, D)
    call: dict[str, Any] = {"network": "linear", "weights": {"w": torch.zeros(B, H, D, D)}, "q": zeros, "k": zeros, "v": zeros}
    call |= {"step": torch.zeros(B, H, 5)}
    with pytest.raises(UsageError, match=message):
        memorise(**{**call, **change})


def test_a_chunk_cannot_change_its_size_half_way() -> None:
    t = Tokens("linear", 5)
    streams, gates = t.part(0, 5)
    _, state = memorise("linear", t.weights, *streams, **gates, chunk=4)
    with pytest.raises(UsageError, match="inside a chunk of 4"):
        memorise("linear", None, *streams, **gates, chunk=8, state=state)
    with pytest.raises(UsageError, match="momenta must have"):
        tg.MemoryState.initial(t.weights, {})


def test_sizes_of_weights_are_whole_numbers() -> None:
    for dim in (0, 2.5, "4"):
        with pytest.raises(UsageError, match="dim must be a whole number"):
            tg.fast_weights("linear", dim)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_transforms_without_a_rule_are_refused_and_run_on_the_reference() -> None:
    t = Tokens({"mlp": {"hidden": 3}}, 5)
    streams, gates = t.part(0, 5)

    def total(k: Tensor, kernel: str) -> Tensor:
        y, _ = memorise({"mlp": {"hidden": 3}}, t.weights, streams[0], k, streams[2], **gates, chunk=2, kernel=kernel)
        loss: Tensor = y.square().sum()
        return loss

    k = streams[1].detach()
    with pytest.raises(UsageError, match="kernel='reference'"):
        torch.func.jvp(lambda k: total(k, "chunk"), (k,), (torch.ones_like(k),))
    with pytest.raises(UsageError, match="kernel='reference'"):
        torch.func.grad(lambda k: total(k, "auto"))(k)
    jvp: Any = torch.func.jvp
    _, tangent = jvp(lambda k: total(k, "reference"), (k,), (torch.ones_like(k),))
    (gradient,) = torch.autograd.grad(total(leaf := k.clone().requires_grad_(), "chunk"), [leaf])
    assert error(tangent, gradient.sum()) <= 1e-9


def test_autocast_does_not_reach_the_reference() -> None:
    t = Tokens("linear", 5)
    streams, gates = t.part(0, 5)
    call = [w.detach().float() for w in t.weights.values()], [x.detach().float() for x in streams]
    single = {n: x.detach().float() for n, x in gates.items()}
    plain, _ = memorise("linear", {"w": call[0][0]}, *call[1], **single, kernel="reference")
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = memorise("linear", {"w": call[0][0]}, *call[1], **single, kernel="reference")
    assert torch.equal(plain, mixed)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_it_compiles_as_one_graph() -> None:
    described = {"mlp": {"depth": 2, "hidden": 3}}
    t = Tokens(described, 6)
    gates = {"step": t.step, "log_momentum": t.log_momentum, "log_keep": t.log_keep}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, state = memorise(described, t.weights, q, k, v, **gates, chunk=4)
        again, _ = memorise(described, None, q, k, v, **gates, chunk=4, state=state)
        out: Tensor = y + again
        return out

    torch._dynamo.reset()
    fast: Any = torch.compile(run, fullgraph=True)
    got, want = (f(t.q, t.k, t.v) for f in (fast, run))
    assert error(got, want) <= 1e-12
    leaves = [*t.weights.values(), t.q, t.k, t.step]
    ours, theirs = (torch.autograd.grad(y.square().sum(), leaves) for y in (got, want))
    assert max(error(a, b) for a, b in zip(ours, theirs, strict=True)) <= 1e-10


@pytest.mark.compile
def test_threads_build_bodies_one_after_the_other() -> None:
    from concurrent.futures import ThreadPoolExecutor

    t = Tokens("linear", 8)
    streams, gates = t.part(0, 8)

    def run(chunk: int) -> Tensor:
        y, _ = memorise("linear", t.weights, *streams, **gates, chunk=chunk, kernel="compiled")
        out: Tensor = y.detach()
        return out

    with ThreadPoolExecutor(3) as pool:
        for chunk, y in zip((2, 3, 5), pool.map(run, (2, 3, 5)), strict=True):
            assert error(y, memorise("linear", t.weights, *streams, **gates, chunk=chunk)[0]) <= 1e-12


def test_second_derivatives_are_a_named_error_or_the_reference() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 6, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weights = {"w": torch.randn(1, 1, 4, 4, generator=g, dtype=torch.float64, requires_grad=True)}
    step = torch.full((1, 1, 6), 0.1, dtype=torch.float64)

    def slope(kernel: str) -> Tensor:
        y, _ = tg.neural_memory("linear", weights, q, k, v, step=step, chunk=4, kernel=kernel)
        (first,) = torch.autograd.grad(y.pow(3).sum(), k, create_graph=True)
        return first.square().sum()

    for kernel in ("chunk", "auto"):
        with pytest.raises(UsageError, match="first derivatives only; take kernel='reference'"):
            slope(kernel).backward()  # type: ignore[no-untyped-call]
    (second,) = torch.autograd.grad(slope("reference"), v)
    assert second.isfinite().all()
    assert second.abs().max() > 0
