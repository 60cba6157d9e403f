from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import titans_graph as tg
from titans_graph.errors import DataError, UsageError
from titans_graph.tasks import text
from titans_graph.training.evaluate import bits_per_byte
from titans_graph.training.generate import generate
from titans_graph.training.objective import LossModule


def content(part: torch.Tensor) -> bytes:
    return bytes(part.tolist())


def test_a_file_is_split_by_position(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(i % 251 for i in range(1000)))
    data = text.load(path)
    assert (len(data.train), len(data.validation)) == (950, 50)
    assert content(data.train) + content(data.validation) == path.read_bytes()
    assert "950" in data.report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/two.txt", "a.txt", "b/one.md", "c/three.py", ".hidden/x.txt", "b/.secret"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} {name[0] * 60}")
    (tmp_path / "zero.bin").write_bytes(b"a\0b")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "empty.txt").touch()
    return tmp_path


def test_a_folder_is_split_by_files(folder: Path) -> None:
    data = text.load(folder)
    both = content(data.train) + content(data.validation)
    assert sorted(both.decode().splitlines()) == sorted(
        f"{n} {n[0] * 60}" for n in ("a.txt", "b/one.md", "b/two.txt", "c/three.py")
    )
    assert both.endswith(b"\n")
    assert len(data.validation.tolist()) >= 60
    assert "2 skipped as no text" in data.report
    assert text.load(folder).identity == data.identity


def test_the_cap_is_named(folder: Path) -> None:
    data = text.load(folder, cap=150)
    assert "left out by the cap of 150 bytes" in data.report
    assert len(data.train) + len(data.validation) <= 152


def test_a_loop_of_links_ends(folder: Path) -> None:
    before = text.load(folder).identity
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "gone").symlink_to(folder / "nowhere")
    assert text.load(folder).identity == before


def test_the_identity_sees_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 100)
    before = text.load(path).identity
    path.write_bytes(b"x" * 99 + b"y")
    assert text.load(path).identity != before


@pytest.mark.parametrize("made", ["missing", "empty file", "small file", "empty folder", "binary folder", "device"])
def test_no_text_is_an_error_with_help(tmp_path: Path, made: str) -> None:
    path = tmp_path / "data"
    if made == "empty folder":
        path.mkdir()
    elif made == "binary folder":
        path.mkdir()
        (path / "x").write_bytes(bytes(100))
    elif made == "device":
        os.mkfifo(path)
    elif made != "missing":
        path.write_bytes(b"" if made == "empty file" else b"few bytes")
    with pytest.raises(DataError, match="help: ") as caught:
        text.load(path)
    assert str(path) in str(caught.value)


def test_a_short_text_is_told_how_long_it_has_to_be(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"y" * 39)
    with pytest.raises(DataError, match="at least 40"):
        text.load(path)
    path.write_bytes(b"y" * 40)
    assert text.load(path).train.numel() > 1


def test_a_window_longer_than_the_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"y" * 100)
    data = text.load(path)
    assert data.batch(0, 0, range(2), 94).shape == (2, 95)
    with pytest.raises(DataError, match=r"95 bytes.*96"):
        data.batch(0, 0, range(2), 95)


@given(st.lists(st.integers(1, 5000), min_size=2, max_size=40))
def test_a_split_leaves_nothing_out_and_neither_part_empty(sizes: list[int]) -> None:
    documents = [(f"file{i}", b"x" * size) for i, size in enumerate(sizes)]
    train, held = text.split(documents)
    assert sorted(train + held) == list(range(len(sizes)))
    assert train
    assert held
    assert sum(sizes[i] for i in held) <= max(0.1 * sum(sizes), min(sizes))


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 10_000), st.integers(1, 2**40))
def test_a_window_starts_inside(seed: int, step: int, row: int, starts: int) -> None:
    assert 0 <= text.window_start(seed, step, row, starts) < starts


def test_the_sampler_is_a_function_of_its_arguments() -> None:
    # These numbers are part of what a resumed run relies on: they must never change.
    assert [text.window_start(0, step, row, 1000) for step in (0, 1) for row in (0, 1, 2)] == [
        156,
        626,
        727,
        463,
        398,
        482,
    ]
    many = [text.window_start(1, step, 0, 10) for step in range(5000)]
    assert all(400 < many.count(i) < 600 for i in range(10))


def test_processes_share_a_batch() -> None:
    data = text.Text("x", torch.arange(200, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8), "")
    whole = data.batch(3, 5, range(6), 10)
    assert torch.equal(data.batch(3, 5, range(1, 6, 2), 10), whole[1::2])
    assert whole.dtype == torch.int64


def test_the_default_text_is_this_pythons_own() -> None:
    data = text.load()
    assert data.identity == text.standard_library().identity
    assert len(data.train) > 2_000_000
    assert 0.04 < len(data.validation) / len(data.train) < 0.12
    assert b"import" in content(data.validation[:65536])


def test_the_vocabulary_must_hold_bytes() -> None:
    text.check_vocabulary(256)
    with pytest.raises(UsageError, match="100 logits"):
        text.check_vocabulary(100)


TWO_OUTPUTS = """\
titans_graph: 1
input: {tokens: [B, T]}
nodes:
  e: {use: embedding, in: tokens, vocab: 256, dim: 4}
  y: {use: head.linear, in: e, vocab: 256}
output: {y: y, e: e}
"""


def test_a_model_of_several_outputs_speaks_no_text(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(TWO_OUTPUTS)
    model = tg.load(path)
    words = torch.zeros(1, 5, dtype=torch.int64)
    for use in (
        lambda: LossModule(model, compile=False)(words),
        lambda: list(generate(model, "a", tokens=1)),
        lambda: bits_per_byte(model, words[0].to(torch.uint8), restart=0),
    ):
        with pytest.raises(UsageError, match="the model gives y, e; byte text needs one output"):
            use()
