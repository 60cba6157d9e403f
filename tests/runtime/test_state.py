"""State as a value: saving, loading, forking, reordering, resetting, and refusing what does not fit."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree
from safetensors.torch import save_file

import titans_graph as tg
from tests.models import ALL, MODELS, example, small
from titans_graph.spec import read_text


@pytest.mark.parametrize("name", ALL)
def test_a_saved_state_goes_on_exactly(name: str, tmp_path: Path) -> None:
    model = small(name)
    x = example(model, 2, 25)
    _, state = model(x[:, :14])
    state.save(tmp_path / "s.safetensors")
    loaded = tg.State.load(model, tmp_path / "s.safetensors")
    assert torch.equal(model(x[:, 14:], state)[0], model(x[:, 14:], loaded)[0])


def test_a_loaded_state_lies_in_memory_like_any_other(tmp_path: Path) -> None:
    """Tensors at odd addresses are multiplied with other rounding, and a run from a file would drift from one in memory."""
    model = small("blocks/mac")
    _, state = model(example(model, 2, 5))
    state.save(tmp_path / "s.safetensors")
    for s in (state, tg.State.load(model, tmp_path / "s.safetensors")):
        assert all(t.data_ptr() % 64 == 0 for t in pytree.tree_leaves(s) if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("name", MODELS)
def test_rows_can_be_reordered(name: str) -> None:
    model = small(name)
    x = example(model, 3, 20)
    _, state = model(x[:, :9])
    order = torch.tensor([2, 0, 0, 1])
    y, _ = model(x[order, 9:], state.reorder(order))
    assert (y - model(x)[0][order, 9:]).abs().max() <= 1e-9


@pytest.mark.parametrize("name", ALL)
def test_streams_that_were_read_apart_go_on_together(name: str) -> None:
    """At different places: in the middle of a chunk, after single tokens, before any token, two rows at once."""
    model = small(name)
    x = example(model, 4, 40)
    starts = [9, 33, 0, 33]
    states = [model(x[:1, :7])[1], model(x[[1, 3], :33])[1], model.initial_state(1)]
    for t in (7, 8):
        _, states[0] = model(x[:1, t : t + 1], states[0])
    joined = tg.State.join(*states).reorder([0, 1, 3, 2])
    assert joined.position.tolist() == starts
    rest = torch.stack([x[row, start : start + 7] for row, start in enumerate(starts)])
    want = torch.stack([model(x[row : row + 1])[0][0, start : start + 7] for row, start in enumerate(starts)])
    assert (model(rest, joined)[0] - want).abs().max() <= 1e-9
    for t in range(7):
        y, joined = model(rest[:, t : t + 1], joined)
        assert (y[:, 0] - want[:, t]).abs().max() <= 1e-9


def test_gradients_reach_every_joined_stream() -> None:
    model = small("lmm").requires_grad_(False)
    x = example(model, 2, 8)
    states = [model(x[:1, :n])[1].map(lambda t: t.detach().requires_grad_(t.is_floating_point())) for n in (3, 4)]
    y, _ = model(x[:, 3:], states[0].join(states[1]))
    torch.autograd.backward(y.square().sum())
    for state in states:
        assert any(t.grad is not None and bool(t.grad.any()) for n in state.nodes.values() for t in n.values())


def test_states_that_do_not_belong_together_are_not_joined() -> None:
    mac, lmm = small("mac").initial_state(1), small("lmm").initial_state(1)
    with pytest.raises(tg.StateError, match="state 1 is of another spec than state 0"):
        mac.join(lmm)
    for wrong in ([mac], None):
        with pytest.raises(tg.StateError, match=rf"join takes states, .*; argument 1 is a {type(wrong).__name__}"):
            mac.join(wrong)  # type: ignore[arg-type]
    with pytest.raises(tg.StateError, match=r"the states differ in '.*': float64 on cpu and float32 on cpu; move"):
        mac.join(mac.map(lambda t: t.float() if t.is_floating_point() else t))


def test_a_fork_and_a_call_leave_the_original_alone() -> None:
    model = small("mac")
    x = example(model, 2, 20)
    _, state = model(x[:, :9])
    before = [t.clone() for t in pytree.tree_leaves(state)]
    fork = state.fork()
    model(x[:, 9:], state)
    for t in pytree.tree_leaves(fork):
        if isinstance(t, torch.Tensor):
            t.data.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, pytree.tree_leaves(state), strict=True))


def test_detach_cuts_the_history() -> None:
    model = small("lmm")
    x = example(model, 1, 20)
    _y, state = model(x[:, :9])
    assert any(t.requires_grad for t in pytree.tree_leaves(state))
    assert not any(t.requires_grad for t in pytree.tree_leaves(state.detach()))


@pytest.mark.parametrize("name", ALL)
def test_the_size_of_the_state_is_constant_unless_said(name: str) -> None:
    model = small(name)
    sizes = [model(example(model, 1, n))[1].bytes for n in (1, 9, 64, 200)]
    if model.summary().grows:
        assert sizes[-1] > sizes[0]
        assert "grows" in model.summary().text()
    else:
        assert len(set(sizes)) == 1
        assert sizes[0] == model.summary().state_bytes


@pytest.mark.parametrize("name", ALL)
def test_a_reset_row_is_like_new(name: str) -> None:
    model = small(name)
    x = example(model, 2, 22)
    _, state = model(x[:, :13])
    again = state.reset(torch.tensor([True, False]))
    fresh = model.initial_state(2)
    for node, tensors in again.nodes.items():
        for key, t in tensors.items():
            want = fresh.nodes[node][key]
            assert torch.equal(t[0, : want.shape[1]], want[0]), (node, key)
            assert torch.equal(t[1], state.nodes[node][key][1])


def test_states_of_another_spec_are_refused(tmp_path: Path) -> None:
    mac, lmm = small("mac"), small("lmm")
    _, state = lmm(example(lmm, 2, 5))
    with pytest.raises(tg.StateError, match="another spec"):
        mac(example(mac, 2, 5), state)
    state.save(tmp_path / "s.safetensors")
    with pytest.raises(tg.StateError, match="another spec"):
        tg.State.load(mac, tmp_path / "s.safetensors")
    other_chunk = small("lmm", chunk=2)
    with pytest.raises(tg.StateError, match="another spec"):
        tg.State.load(other_chunk, tmp_path / "s.safetensors")


def test_damaged_state_files_are_named_errors(tmp_path: Path) -> None:
    model = small("mag")
    _, state = model(example(model, 2, 9))
    path = tmp_path / "s.safetensors"
    state.save(path)
    good = path.read_bytes()
    damaged = {
        "empty": b"",
        "short": good[: len(good) // 2],
        "junk": b"\x80\x04junk" * 100,
        "length": b"\xff" * 8 + good[8:],
        "header": good[:40] + b"\x00\x01\x02" + good[43:],
    }
    for kind, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(tg.StateError):
            tg.State.load(model, path)
        assert kind
    save_file({"position": torch.zeros(2)}, path)
    with pytest.raises(tg.StateError, match="not a state"):
        tg.State.load(model, path)
    with pytest.raises(tg.StateError, match="cannot read"):
        tg.State.load(model, tmp_path / "none")


def test_rows_out_of_range_are_refused() -> None:
    state = small("lmm").initial_state(2)
    with pytest.raises(tg.StateError, match=r"0\.\.1"):
        state.reorder([2])
    with pytest.raises(tg.StateError, match=r"0\.\.1"):
        state.reset([-1])


def test_the_batch_must_fit() -> None:
    model = small("lmm")
    with pytest.raises(tg.StateError, match="2 rows, the input 3"):
        model(example(model, 3, 4), model.initial_state(2))


NESTED = """titans_graph: 1
name: nested
input: {x: [B, T, 4]}
nodes:
  a: {use: outer, in: x}
  b: {use: last, in: a}
output: b
blocks:
  inner: {input: {x: [B, T, 4]}, nodes: {y: {use: conv.causal, in: x}}, output: y}
  last: {input: {x: [B, T, 4]}, nodes: {y: {use: inner, in: x}}, output: y}
  outer: {input: {x: [B, T, 4]}, nodes: {y: {use: inner, in: x}}, output: y}
"""


def test_the_order_of_blocks_does_not_matter_to_a_state(tmp_path: Path) -> None:
    """A model and the model of its own spec are the same architecture, in whatever order the blocks were declared."""
    read = read_text(NESTED).graph
    assert read is not None
    for names in itertools.permutations(read.blocks):
        model = tg.build(replace(read, blocks={name: read.blocks[name] for name in names}))
        assert model.fingerprint == hashlib.sha256(replace(read, name="").text().encode()).hexdigest()
        model(torch.randn(1, 3, 4))[1].save(tmp_path / "s.safetensors")
        (tmp_path / "spec.yaml").write_text(model.spec)
        assert tg.State.load(tg.load(tmp_path / "spec.yaml"), tmp_path / "s.safetensors").position.tolist() == [3]


def test_a_state_that_cannot_be_written_says_where_and_why(tmp_path: Path) -> None:
    state = small("blocks/lmm").initial_state(1)
    with pytest.raises(tg.StateError, match=r"cannot write state to .*none/s\.st: there is no folder .*none; make it first"):
        state.save(tmp_path / "none" / "s.st")
    with pytest.raises(tg.StateError, match=r"cannot write state to .*: Is a directory; is it a folder"):
        state.save(tmp_path)
    state.save(tmp_path / "s.st")
    assert [p.name for p in tmp_path.iterdir()] == ["s.st"]
