"""What users of other implementations of this memory run into, each as a test."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import titans_graph as tg
from tests.models import ALL, SMALL, example, small, streamed
from titans_graph.spec import read_text

DEEP = """titans_graph: 1
input: {{x: [B, T, 32]}}
nodes:
  y: {{use: memory.neural, in: x, heads: 2, chunk: 64, network: {{mlp: {{depth: {depth}}}}}}}
output: y
"""


@pytest.mark.parametrize("name", ALL)
def test_an_optimizer_steps_and_weights_load(name: str) -> None:
    model = small(name, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    y, _ = model(example(model, 2, 20))
    torch.autograd.backward(y.square().mean())
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
    optimizer.step()
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.load_state_dict(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["blocks/mac", "blocks/mag", "blocks/lmm"])
def test_activation_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = small(name)
    x = example(model, 2, 20)
    grads = []
    for run in (lambda t: model(t)[0], lambda t: checkpoint(lambda u: model(u)[0], t, use_reentrant=False)):
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(run(x).sin().sum())  # type: ignore[no-untyped-call]
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a is not None
        assert b is not None
        assert (a - b).abs().max() <= 1e-12


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_finite_at_initialisation_for_deep_memories_and_long_input(depth: int) -> None:
    declared = read_text(DEEP.format(depth=depth))
    assert declared.graph is not None
    model = tg.build(declared.graph)
    for x in (torch.randn(1, 8192, 32), torch.ones(1, 8192, 32)):
        y, state = model(x)
        assert torch.isfinite(y).all()
        assert all(torch.isfinite(t).all() for t in state.nodes["y"].values())
        assert max(float(t.detach().norm()) for k, t in state.nodes["y"].items() if k.startswith("weights")) < 1e3


def test_a_prompt_shorter_than_a_chunk_is_remembered() -> None:
    model = small("lmm")
    x = example(model, 1, 2)
    _, state = model(x[:, :1])
    fresh = model.initial_state(1)
    name = next(iter(state.nodes))
    assert not torch.equal(state.nodes[name]["weights.w1"], fresh.nodes[name]["weights.w1"])
    other = (x[:, :1] + 1) % SMALL["vocab"]
    _, changed = model(other)
    assert not torch.equal(model(x[:, 1:], state)[0], model(x[:, 1:], changed)[0])


@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 20, 33])
def test_decoding_after_any_prompt_equals_reading_it_all(prompt: int) -> None:
    """Shorter than a chunk (4), around a segment (8), longer than several."""
    model = small("mac")
    x = example(model, 2, prompt + 12)
    whole, _ = model(x)
    pieces, _ = streamed(model, x, [prompt, *[1] * 12])
    assert (whole - pieces).abs().max() <= 1e-9


def test_data_parallel_needs_no_search_for_unused_parameters(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(small("mac", torch.float32))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for seed in (0, 1):
            optimizer.zero_grad()
            y, _ = model(example(model.module, 2, 20, seed=seed))
            torch.autograd.backward(y.square().mean())
            optimizer.step()
    finally:
        dist.destroy_process_group()


def test_a_copy_has_parameters_of_its_own() -> None:
    model = small("mac")
    twin = copy.deepcopy(model)
    x = example(model, 1, 9)
    assert torch.equal(model(x)[0], twin(x)[0])
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    assert not torch.equal(model(x)[0], twin(x)[0])
