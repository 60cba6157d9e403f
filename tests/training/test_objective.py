"""What cannot be trained on bytes is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import titans_graph as tg
from tests.training.data import model, quick, run, small_text
from tests.training.stand_in import StandIn
from titans_graph.cli import main
from titans_graph.errors import UsageError
from titans_graph.training.loop import train
from titans_graph.training.objective import demand_language_model


def test_a_block_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_bytes(bytes(small_text().train.tolist()))
    out = tmp_path / "run"
    command = ["train", "blocks/lmm", "--set", "dim=8", "heads=2", "--data", str(tmp_path / "t.txt"), "--out", str(out)]
    assert main(command) == 2
    shown = capsys.readouterr()
    assert "'lmm_block' is a block on a stream of features" in shown.err
    assert "train needs a model of token ids\n  help: take a spec with input: {tokens: [B, T]}" in shown.err
    assert "step/s" not in shown.err
    assert not out.exists()
    block = tg.load("blocks/lmm", dim=8, heads=2)
    with pytest.raises(UsageError, match="train needs a model of token ids"):
        train(block, small_text(), quick(), out, progress=False)
    assert not out.exists()


def test_too_few_logits_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="100 logits"):
        run(tmp_path / "run", net=StandIn(8, vocabulary=100))
    assert not (tmp_path / "run").exists()


def test_trying_a_model_leaves_it_as_it_was() -> None:
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    demand_language_model(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training
