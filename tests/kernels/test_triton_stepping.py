"""Single tokens of whole models on the decoding kernels, against the portable form in fp64: a state stays a value.

On a GPU the kernels are compiled, elsewhere interpreted (``kernel: triton``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

import titans_graph as tg
from titans_graph.kernels.triton_config import available
from titans_graph.runtime.state import Stepping

if not available():
    pytest.skip(available().why, allow_module_level=True)

from titans_graph.kernels import triton_decode_host, triton_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM, CHUNK = 16, 16
MLP = {"mlp": {"depth": 2, "hidden": 16}}


@pytest.fixture
def types() -> set[torch.dtype]:
    """The types that kernels read weights in."""
    return set()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch, types: set[torch.dtype]) -> list[int]:
    """The number of rows of every token that a kernel decoded."""
    counts: list[int] = []
    given = triton_decode_host.decode

    def counted(sizes: Any, parameter: float, ring: Any, tokens: Any) -> list[Tensor]:
        counts.append(len(tokens.q))
        types.update(x.dtype for x in (*ring.anchor, *ring.weights, *ring.momenta))
        return given(sizes, parameter, ring, tokens)

    monkeypatch.setattr(triton_decode_host, "decode", counted)
    return counts


def block(kernel: str, network: Any = MLP, **options: Any) -> tg.Model:
    """One memory of one head; its two kernels have one set of parameters."""
    torch.manual_seed(3)
    b = tg.Builder(dim=DIM)
    x = b.input("x", ["B", "T", "dim"])
    memory = b.add("memory.neural", write=x, heads=1, chunk=CHUNK, network=network, kernel=kernel, **options)
    b.output(memory.recall)
    model: tg.Model = b.build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.requires_grad_(False)
    return model


def pair(dtype: torch.dtype = torch.float32, network: Any = MLP, **options: Any) -> tuple[tg.Model, tg.Model]:
    """The model on kernels, and the same in fp64 on the portable form."""
    fast, truth = block("triton", network, **options).to(DEVICE, dtype), block("chunk", network, **options)
    truth.load_state_dict({k: x.cpu() for k, x in fast.state_dict().items()})
    return fast, truth.double()


def stream(batch: int, tokens: int) -> Tensor:
    return torch.randn(batch, tokens, DIM, generator=torch.Generator().manual_seed(1))


def read(
    model: tg.Model, x: Tensor, parts: list[int], state: tg.State | None = None, document: Tensor | None = None
) -> tuple[Tensor, tg.State]:
    """What calls of so many tokens give one after the other, in fp64 and on the processor."""
    like, outputs, at = next(model.parameters()), [], 0
    for n in parts:
        ids = None if document is None else document[:, at : at + n]
        with torch.no_grad():
            y, state = model(x[:, at : at + n].to(like), state, document=ids)
        outputs.append(y.double().cpu())
        at += n
    assert state is not None
    return torch.cat(outputs, 1), state


def close(a: Tensor, b: Tensor, bar: float = 2e-5) -> None:
    assert float((a - b).square().mean().sqrt() / b.square().mean().sqrt()) <= bar


@pytest.mark.parametrize(
    ("network", "dtype", "bar", "options"),
    [
        (MLP, torch.float32, 2e-5, {}),
        ("linear", torch.float32, 2e-5, {"read": "before"}),
        (MLP, torch.float16, 1e-2, {"cap": "none", "max_step": 0.02}),
    ],
    ids=["mlp", "linear", "mlp-half"],
)
def test_single_tokens_are_the_whole(
    network: Any, dtype: torch.dtype, bar: float, options: dict[str, Any], decoded: list[int]
) -> None:
    """Outputs and the state; the kernels read all but what stands in the first call."""
    fast, truth = pair(dtype, network, **options)
    x = stream(2, 37)
    y, state = read(fast, x, [5, *[1] * 32])
    want, after = read(truth, x.to(dtype).double(), [37])
    assert decoded == [2] * 32
    close(y, want, bar)
    for key, t in after.nodes["memory_neural"].items():
        if key.split(".")[0] in ("anchor", "weights", "momenta"):
            close(state.nodes["memory_neural"][key].double().cpu(), t, bar)


@pytest.mark.parametrize("seed", [0, 1])
def test_calls_of_any_lengths_with_documents_and_rows_apart(seed: int, decoded: list[int]) -> None:
    """Rows that begin documents at places of their own stand at different places in their chunks."""
    g = torch.Generator().manual_seed(seed)
    parts = [n if n > 1 else 1 for n in torch.randint(-20, 7, (30,), generator=g).tolist()]
    fast, truth = pair()
    x = stream(3, sum(parts))
    document = (torch.rand(3, sum(parts), generator=g) < 0.06).long().cumsum(1)
    y, _ = read(fast, x, parts, None, document)
    want, _ = read(truth, x.double(), [sum(parts)], None, document)
    assert len(decoded) == parts.count(1) > 20
    close(y, want)


@pytest.mark.parametrize("network", ["linear", MLP], ids=["linear", "mlp"])
def test_a_model_in_half_precision_is_read_from_copies(network: Any, decoded: list[int], types: set[torch.dtype]) -> None:
    """At every token they are what they copy, also where rows begin documents and chunks apart and the ring is written."""
    fast, truth = pair(torch.float16, network, cap="none", max_step=0.02)
    x = stream(3, 60)
    document = (torch.rand(3, 60, generator=torch.Generator().manual_seed(2)) < 0.05).long().cumsum(1)
    y, state = read(fast, x, [5], None, document)
    names = [f"{kind}.{name}" for kind in ("anchor", "weights", "momenta") for name in tg.fast_weights(network, DIM)]
    answers, apart = [y], 0
    for t in range(5, 60):
        y, state = read(fast, x[:, t : t + 1], [1], state, document[:, t : t + 1])
        answers.append(y)
        apart += len(set((state.position % CHUNK).tolist())) > 1
        assert isinstance(state.nodes, Stepping)
        held = state.nodes.held["memory_neural"]
        for i, name in enumerate(names):
            assert held[name].dtype == torch.float32
            assert torch.equal(held[f"copies.{i}"], held[name].half()), f"{name} at token {t}"
        assert f"copies.{len(names)}" not in held
    assert decoded == [3] * 55
    assert types == {torch.float16}
    assert apart > 30
    close(torch.cat(answers, 1), read(truth, x.half().double(), [60], None, document)[0], 1e-2)
    assert not [key for key in state.nodes["memory_neural"] if key.startswith("copies")]


@pytest.mark.compile
def test_a_compiled_model_in_half_precision_decodes_from_copies(decoded: list[int], types: set[torch.dtype]) -> None:
    fast, truth = pair(torch.float16, "linear")
    x = stream(2, 20)
    compiled = fast.compile()
    y, _ = read(compiled, x, [1] * 20)
    assert decoded == [2] * 20
    assert types == {torch.float16}
    close(y, read(truth, x.half().double(), [20])[0], 1e-2)
    assert compiled.report().variants == 1


def test_a_stream_whose_model_changes_its_type_reads_what_goes_with_it(decoded: list[int], types: set[torch.dtype]) -> None:
    """In float32 that is the state itself: what was copied from it is dropped."""
    fast, truth = pair(torch.float16, "linear")
    x = stream(2, 34)
    _, state = read(fast, x, [4, 1, 1])
    fast.float()
    single = state.map(lambda t: t.float() if t.is_floating_point() else t)
    types.clear()
    y, state = read(fast, x[:, 6:], [1] * 28, single)
    assert types == {torch.float32}
    held = state.nodes.held["memory_neural"] if isinstance(state.nodes, Stepping) else {}
    assert "ring.shares" in held
    assert not [key for key in held if key.startswith("copies")]
    close(y, read(truth, x.double(), [34])[0][:, 6:], 1e-2)


def test_a_state_of_the_kernels_is_a_value(tmp_path: Path) -> None:
    """Forked, read on from twice, reordered, reset, saved: none of it shows in another."""
    fast, truth = pair()
    x = stream(3, 30)
    _, state = read(fast, x, [9, *[1] * 4])
    held = state.nodes
    assert isinstance(held, Stepping)
    leaves = [(t, t.clone()) for t in pytree.tree_leaves(held.held)]
    rest, order = x[:, 13:], [2, 0, 0]
    state.save(tmp_path / "s.safetensors")
    loaded = tg.State.load(fast, tmp_path / "s.safetensors")
    want = read(truth, x.double(), [30])[0][:, 13:]
    for other in (state, state.fork(), state.detach(), loaded, state):
        close(read(fast, rest, [1] * 5 + [12], other)[0], want)
    close(read(fast, rest[order], [1] * 8 + [9], state.reorder(order))[0], want[order])
    fresh = read(fast, rest, [1] * 8 + [9], state.reset([1]))[0]
    close(fresh[[0, 2]], want[[0, 2]])
    close(fresh[1:2], read(truth, rest[1:2].double(), [17])[0])
    # What stands in the column that counts pairs is nobody's: its shape alone matters.
    assert all(torch.equal(a, b) for a, b in leaves if a.dtype != torch.uint8)


def test_a_token_makes_a_ring_and_no_weights_anew() -> None:
    """Also where rows stand apart: a row that begins a chunk gets an anchor, M and S wait for the ring."""
    fast, _ = pair()
    x = stream(2, 40)
    _, state = read(fast, x, [11])
    state, written, anchored = state.reset([1]), [], []
    for t in range(11, 40):
        before = state.nodes.held["memory_neural"] if isinstance(state.nodes, Stepping) else None
        _, state = read(fast, x[:, t : t + 1], [1], state)
        assert isinstance(state.nodes, Stepping)
        after = state.nodes.held["memory_neural"]
        if before is not None:
            written += [t] * (after["weights.w1"] is not before["weights.w1"])
            anchored += [t] * (after["anchor.w1"] is not before["anchor.w1"])
    assert written == [27]
    assert anchored == [16, 27, 32]


def test_gradients_and_other_kernels_take_the_portable_form(decoded: list[int]) -> None:
    fast, truth = pair()
    x = stream(1, 3)
    read(truth, x, [1, 1, 1])
    fast.requires_grad_(True)
    y, _ = fast(x[:, :1].to(DEVICE))
    y.sum().backward()
    assert decoded == []


def test_under_autocast_the_kernels_multiply_in_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever makes the streams float32 under autocast, such as a convolution's taps; gradients come back in fp32."""
    seen = []
    given = triton_memory.memory_of

    def spied(*args: Any) -> triton_memory.Memory:
        seen.append(args[-1])
        return given(*args)

    monkeypatch.setattr(triton_memory, "memory_of", spied)
    fast, truth = pair()
    for model in (fast, truth):
        model.requires_grad_(True)
    x = stream(1, 20)
    with torch.autocast(DEVICE, torch.float16):
        y, _ = fast(x.to(DEVICE))
    y.float().sum().backward()
    truth(x.double())[0].sum().backward()
    assert set(seen) == {torch.float16}
    for (name, a), (_, b) in zip(fast.named_parameters(), truth.named_parameters(), strict=True):
        assert a.grad is not None, name
        assert b.grad is not None, name
        assert a.grad.dtype == torch.float32, name
        close(a.grad.double().cpu(), b.grad, 0.05)


@pytest.mark.compile
def test_a_compiled_model_decodes_on_the_kernels(decoded: list[int]) -> None:
    """One graph without a break for all tokens of a chunk and beyond."""
    fast, truth = pair()
    x = stream(2, 20)
    compiled = fast.compile()
    y, _ = read(compiled, x, [1] * 20)
    assert decoded == [2] * 20
    close(y, read(truth, x.double(), [20])[0])
    assert compiled.report().variants == 1
