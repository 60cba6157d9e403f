"""One word takes a part of the memory out (the rows of table 5 in arXiv 2501.00663): each does what it says, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import titans_graph as tg
from tests.models import SMALL, example, small, streamed
from tests.runtime import paper
from titans_graph.errors import SpecError
from titans_graph.kernels.networks import parse_network

SWITCHES: dict[str, dict[str, Any]] = {
    "linear": {"network": "linear"},
    "no convolution": {"conv": 0},
    "no momentum": {"momentum": False},
    "no forgetting": {"forget": False},
    "no persistent tokens": {"persistent": 0},
    "nothing": {"network": "linear", "conv": 0, "momentum": False, "forget": False, "persistent": 0},
}
NAMES = ("mac", "mag", "mal", "lmm")


def switched(name: str, switch: str, **more: Any) -> tg.Model:
    """A small model of a spec with a switch turned; a spec without persistent tokens has no switch for them."""
    values = {k: v for k, v in SWITCHES[switch].items() if "lmm" not in name or k != "persistent"}
    return small(name, **values, **more)


def memory_of(model: tg.Model) -> Any:
    return next(m for path, m in model.body.named_modules() if path.endswith("memory"))


class Parts:
    """A memory as the plain loop wants it, what was taken out written as a value: one tap of 1, eta 0, keep 1."""

    def __init__(self, component: Any) -> None:
        self.component = component
        inner = component.norm.shape[0]
        whole = {kind: torch.ones(inner, 1, dtype=torch.float64) for kind in ("query", "key", "value")}
        self.taps = component.taps if component.p.conv else whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self.component, name)

    def controls(self, x: Tensor) -> Tensor:
        """Logits of theta, eta and keep, ``[3 * heads]``."""
        p = self.component.p
        rows = list(self.component.controls(x).unflatten(-1, (-1, p.heads)))
        step = rows.pop(0)
        momentum = rows.pop(0) if p.momentum else torch.full_like(step, -torch.inf)
        keep = rows.pop(0) if p.forget else torch.full_like(step, torch.inf)
        return torch.cat([step, momentum, keep])


class Loop(paper.Memory):
    """The paper's memory, one token after another, for every switch."""

    def __init__(self, component: nn.Module, heads: int, chunk: int, max_momentum: float) -> None:
        parts: Any = Parts(component)
        super().__init__(parts, heads, chunk, max_momentum if parts.p.momentum else 0.0)

    def network(self, weights: paper.Weights, x: Tensor) -> Tensor:
        return x @ weights["w"] if "w" in weights else super().network(weights, x)


def lmm(body: nn.Module, x: Tensor, sizes: dict[str, int]) -> Tensor:
    """The memory alone: ``x + M(norm(x))``, ``[T, dim]``."""
    memory = Loop(body.get_submodule("memory"), sizes["heads"], sizes["chunk"], 0.9)
    out = []
    for token in x:
        normed = paper.rms(token, body.get_submodule("normed").gain)  # type: ignore[arg-type]
        memory.write(normed)
        out.append(token + memory.read(memory.weights, "ask", normed))
    return torch.stack(out)


LOOPS = {"mac": paper.mac, "mag": paper.mag, "mal": paper.mal, "lmm": lmm}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", NAMES)
def test_the_block_equals_the_loop_over_tokens(name: str, switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = switched(f"blocks/{name}", switch, seed=3)
    if name != "lmm" and "persistent" in SWITCHES[switch]:
        none = torch.empty(0, SMALL["dim"], dtype=torch.float64)
        monkeypatch.setattr(model.body.get_submodule("prefix"), "parameters", lambda: iter([none]))
    network = memory_of(model).p.network
    monkeypatch.setattr(paper, "Memory", Loop)
    monkeypatch.setattr(paper, "parse_network", lambda _: parse_network(network))
    x = example(model, 1, 11, seed=1)
    assert (model(x)[0][0] - LOOPS[name](model.body, x[0], SMALL)).abs().max() <= 1e-9


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", NAMES)
def test_the_model_streams_and_trains(name: str, switch: str) -> None:
    model = switched(name, switch)
    x = example(model, 2, 21)
    whole, state = model(x)
    assert (whole - streamed(model, x, [1, 6, 1, 13])[0]).abs().max() <= 1e-9
    assert all(0 not in t.shape for tensors in state.nodes.values() for t in tensors.values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = functional.cross_entropy(model(x[:, :-1])[0].flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_model_of_the_default_is_another(switch: str) -> None:
    """No switch is without effect: each changes which parameters there are."""
    model, plain = switched("mac", switch), small("mac")
    mine, theirs = ({n: p.shape for n, p in m.named_parameters()} for m in (model, plain))
    assert mine != theirs


def test_linear_is_one_matrix_a_head() -> None:
    memory = memory_of(switched("mac", "linear"))
    assert {n: tuple(w.shape) for n, w in memory.initial.items()} == {"w": (2, 8, 8)}


def recorded(memory: Any) -> dict[str, Tensor]:
    """What queries, keys and values become, filled when the model is called."""
    seen: dict[str, Tensor] = {}
    original = memory._stream

    def stream(name: str, *given: Any) -> Tensor:
        seen[name] = original(name, *given)
        return seen[name]

    memory._stream = stream
    return seen


@pytest.mark.parametrize("conv", [0, 4])
def test_without_convolution_a_key_is_its_own_tokens(conv: int) -> None:
    model = small("blocks/lmm", conv=conv)
    memory = memory_of(model)
    seen = recorded(memory)
    x = example(model, 1, 8)
    model(x)
    before = dict(seen)
    changed = x.clone()
    changed[:, 3] += 1.0
    model(changed)
    for name in ("query", "key", "value"):
        moved = (before[name] - seen[name]).abs().amax((0, 1, 3)) > 0
        reach = range(3, 3 + max(conv, 1))
        assert moved.nonzero()[:, 0].tolist() == list(reach)
    assert len(memory.taps) == (3 if conv else 0)


def test_without_momentum_nothing_of_the_surprise_carries_on() -> None:
    """Any momenta in the state give the same outputs and weights."""
    model = switched("blocks/lmm", "no momentum")
    x = example(model, 1, 9)
    _, state = model(x[:, :3])
    nodes = {n: {k: t + 7.0 * k.startswith("momenta") for k, t in tensors.items()} for n, tensors in state.nodes.items()}
    other = tg.State(state.position, state.document, nodes, state.fingerprint, state.fresh)
    (y, after), (z, later) = model(x[:, 3:], state), model(x[:, 3:], other)
    assert torch.equal(y, z)
    assert all(torch.equal(t, later.nodes["memory"][k]) for k, t in after.nodes["memory"].items())
    assert torch.equal(memory_of(model)._controls(x)[1], torch.full((1, 2, 9), -torch.inf, dtype=torch.float64))


def test_without_forgetting_all_is_kept() -> None:
    """The weights after some tokens are the first ones plus every momentary change: exactly nothing decays."""
    model = switched("blocks/lmm", "no forgetting", momentum=False)
    memory = memory_of(model)
    x = example(model, 1, 1)
    assert torch.equal(memory._controls(x)[2].exp(), torch.ones(1, 2, 1, dtype=torch.float64))
    state = model.initial_state(1)
    for token in example(model, 1, 7).unbind(1):
        before = state.nodes["memory"]
        _, state = model(token[:, None], state)
        after = state.nodes["memory"]
        for name in memory.names:
            change = after[f"weights.{name}"] - before[f"weights.{name}"]
            assert (change - after[f"momenta.{name}"]).abs().max() <= 1e-12


@pytest.mark.parametrize("name", ["mac", "mag", "mal"])
def test_without_persistent_tokens_the_context_has_no_prefix(name: str) -> None:
    model = switched(name, "no persistent tokens")
    assert not [n for n, _ in model.named_parameters() if "prefix" in n]
    assert not [n for n in model.state_dict() if "prefix" in n]
    types = {ref.node: value for ref, value in model.compilation.types.items()}
    assert types["layers.0.context"].pieces[0].length == 0
    twin = small(name, persistent=1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.copy_(twin.get_parameter(path))
    x = example(model, 1, 9)
    assert (model(x)[0] - twin(x)[0]).abs().max() > 1e-6


def test_a_switch_of_another_kind_is_refused() -> None:
    for wrong in ({"momentum": 0}, {"conv": 1}, {"network": "linaer"}, {"persistent": -1}):
        with pytest.raises(SpecError):
            tg.load("mac", **wrong)
