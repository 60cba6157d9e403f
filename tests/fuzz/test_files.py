"""Files that somebody wrote on purpose: each kind of harm once, and what it must come to."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import titans_graph as tg
from tests.fuzz import files
from tests.fuzz.files import packed, unpacked
from tests.models import example, small
from titans_graph.errors import CheckpointError, StateError, TitansGraphError
from titans_graph.runtime.layout import SMALLEST_ROOM, grid_layout, token_layout
from titans_graph.training import atomic, checkpoint, reading

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good state of ``blocks/lmm``."""
    model = files._model("blocks/lmm")
    model(example(model, 2, 9))[1].save(tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def load(path: Path) -> tg.State:
    return tg.State.load(files._model("blocks/lmm"), path)


def changed(path: Path, change: Callable[[dict[str, Any], bytearray], object]) -> None:
    """Write a file again, with a header and content that somebody changed and a checksum that fits them."""
    header, content = unpacked(path.read_bytes())
    data = bytearray(content)
    change(header, data)
    path.write_bytes(packed(header, bytes(data)))


def test_every_flipped_bit_and_every_cut_is_refused(path: Path) -> None:
    good = path.read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    for at in [*range(0, length, 7), *range(length, len(good), max(1, (len(good) - length) // 60))]:
        for damaged in (good[:at], good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(StateError):
                load(path)
    path.write_bytes(good)
    assert load(path).batch == 2


class Harm:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_pickles_are_refused_and_never_run(path: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    torch.save(Harm(mark), tmp_path / "zip")
    folder = tmp_path / "step"
    folder.mkdir()
    model = small("transformer", torch.float32)
    for content in (pickle.dumps(Harm(mark)), (tmp_path / "zip").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(StateError):
            load(path)
        for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER):
            (folder / name).write_bytes(content)
        found = checkpoint.Checkpoint(folder, {"step": 1})
        with pytest.raises(CheckpointError):
            checkpoint.load_weights(model, found)
        with pytest.raises(CheckpointError):
            checkpoint.restore_random(found, model)
    assert not mark.exists()


@pytest.mark.parametrize("length", [0, 1, 2**24 + 1, 2**31, 2**63, 2**64 - 1])
def test_declared_header_sizes_are_checked_first(path: Path, length: int) -> None:
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(StateError, match=r"a header of \d+ bytes"):
        load(path)


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.OPTIMIZER])
@pytest.mark.parametrize("length", [0, 1, 2**24 + 1, 2**31, 2**63, 2**64 - 1])
def test_declared_header_sizes_of_a_checkpoint_are_checked_first(step: Path, name: str, length: int) -> None:
    (step / name).write_bytes(length.to_bytes(8, "little") + (step / name).read_bytes()[8:])
    model = small("transformer", torch.float32)
    found = checkpoint.Checkpoint(step, json.loads((step / checkpoint.PROGRESS).read_text()))
    with pytest.raises(CheckpointError, match=r"a header of \d+ bytes"):
        checkpoint.restore(found, model, torch.optim.AdamW(model.parameters()))


def test_declared_shapes_are_held_against_the_file(path: Path) -> None:
    for shape in ([2**40], [2**62, 4], [2, 2**61], [0], [], [3]):
        changed(path, lambda header, data: header["position"].update(shape=shape))  # noqa: B023
        with pytest.raises(StateError):
            load(path)


@pytest.mark.parametrize(
    ("name", "value"), [("position", -1), ("position", 2**62 + 1), ("position", -(2**63)), ("document", -2)]
)
def test_places_that_no_row_can_have_are_refused(path: Path, name: str, value: int) -> None:
    def change(header: dict[str, Any], data: bytearray) -> None:
        at = header[name]["data_offsets"][0]
        data[at : at + 8] = value.to_bytes(8, "little", signed=True)

    changed(path, change)
    with pytest.raises(StateError, match="no row can have"):
        load(path)


def test_a_cache_holds_the_tokens_that_were_read(tmp_path: Path) -> None:
    model = files._model("transformer")
    model(example(model, 1, 9))[1].save(tmp_path / "s.safetensors")
    assert tg.State.load(model, tmp_path / "s.safetensors").position.tolist() == [9]

    def further(header: dict[str, Any], data: bytearray) -> None:
        at = header["position"]["data_offsets"][0]
        data[at : at + 8] = (2**40).to_bytes(8, "little")

    changed(tmp_path / "s.safetensors", further)
    with pytest.raises(StateError, match="a cache of fewer than the 1099511627776 tokens"):
        tg.State.load(model, tmp_path / "s.safetensors")


def test_all_tensors_have_as_many_rows(path: Path) -> None:
    tensors = load_file(path)
    about = json.dumps(
        {"format": 2, "kind": "state", "fingerprint": files._model("blocks/lmm").fingerprint, "sha256": "0" * 64}
    )
    tensors["position"], tensors["document"] = torch.zeros(5, dtype=torch.int64), torch.full((5,), -1)
    save_file(
        {k: t if k in ("position", "document") else t[:1].clone() for k, t in tensors.items()}, path, {"titans_graph": about}
    )
    path.write_bytes(packed(*unpacked(path.read_bytes())))
    with pytest.raises(StateError, match="has 1 rows, position has 5"):
        load(path)


def test_a_state_without_rows_says_nothing_about_capacity(tmp_path: Path) -> None:
    """An axis of any length takes no bytes where another is 0; a call once made a list as long as it."""
    model, path = files._model("transformer"), tmp_path / "s.safetensors"
    model.initial_state(0).save(path)
    header, content = unpacked(path.read_bytes())
    for size in (2**40, 2**62):
        for name, entry in header.items():
            if name.endswith("/cache"):
                entry["shape"][1] = size
        path.write_bytes(packed(header, content))
        state = tg.State.load(model, path)
        assert model(example(model, 0, 2), state)[0].shape[:2] == (0, 2)
        assert state.bytes == 0


@pytest.mark.parametrize(
    "about", ["[]", "null", "{", "[" * 5000, '{"kind": "state"}', '{"kind": "state", "format": 1}', "\x1b[31m"]
)
def test_other_descriptions_and_versions_are_refused(path: Path, about: str) -> None:
    changed(path, lambda header, data: header["__metadata__"].update(titans_graph=about))
    with pytest.raises(StateError) as caught:
        load(path)
    assert "\x1b" not in str(caught.value)


def test_what_is_no_plain_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "folder", "loop", "none"):
        with pytest.raises(StateError):
            load(tmp_path / name)
        with pytest.raises(CheckpointError):
            reading.progress(tmp_path / name)


def test_a_loaded_state_does_not_change_with_its_file(path: Path) -> None:
    """Tensors of a mapped file would be those of whatever is copied over it."""
    model = files._model("blocks/lmm")
    state = load(path)
    before = [t.clone() for ts in state.nodes.values() for t in ts.values()]
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    after = [t for ts in state.nodes.values() for t in ts.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert bool(model(example(model, 2, 3), state)[0].isfinite().all())


def test_a_constant_state_needs_no_room_for_the_tokens_it_read(path: Path) -> None:
    """Ten million million tokens: a call once made a list of their positions."""
    model = files._model("blocks/lmm")
    state = model.initial_state(1)
    far = tg.State(state.position + 10**13, state.document, state.nodes, state.fingerprint, state.fresh)
    y, after = model(example(model, 1, 3), far)
    assert y.shape[:2] == (1, 3)
    assert after.position.tolist() == [10**13 + 3]
    for layout in (
        grid_layout(far.position, far.document, None, 3, 4, grows=False),
        token_layout(far.position, far.document, None, grows=False),
    ):
        assert layout.clock.room.numel() == SMALLEST_ROOM


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A good checkpoint of the small transformer."""
    for name, content in files._checkpoint().items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def progress_of(folder: Path, **changes: Any) -> checkpoint.Checkpoint:
    found = json.loads((folder / checkpoint.PROGRESS).read_text())
    for key, value in changes.items():
        inside = found["random"] if key in found["random"] else found
        inside[key] = value(inside[key]) if callable(value) else value
    (folder / checkpoint.PROGRESS).write_text(json.dumps(found))
    return checkpoint.Checkpoint(folder, reading.progress(folder / checkpoint.PROGRESS))


@pytest.mark.parametrize("at", [-1, 625, 10**6, 2**40, 10**30, 1.5, "1", None])
def test_a_position_outside_of_the_random_state_is_refused(step: Path, at: Any) -> None:
    """NumPy takes it, and reads memory that is not its own when it draws the next number."""
    found = progress_of(step, numpy=lambda state: [*state[:2], at, *state[3:]])
    model = small("transformer", torch.float32)
    with pytest.raises(CheckpointError, match="random states"):
        checkpoint.restore_random(found, model)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": 1.5},
        {"step": "1"},
        {"step": True},
        {"step": 10**30},
        {"seconds": "x"},
        {"config": []},
        {"bits_per_byte": {}},
    ],
)
def test_progress_of_the_wrong_kind_is_refused(step: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="no progress of a training run"):
        progress_of(step, **changes)


@pytest.mark.parametrize("content", ["[", "[" * 100_000, "null", "[]", '{"step": NaN}', "{}", "\udcff", "9" * 5000])
def test_damaged_progress_is_refused(step: Path, content: str) -> None:
    (step / checkpoint.PROGRESS).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError):
        reading.progress(step / checkpoint.PROGRESS)


def test_a_manifest_looks_at_nothing_outside_of_its_folder(step: Path) -> None:
    for name in ("../secret", "/etc/passwd", "a/b", "..", "", "\x1b[31m", "x" * 200):
        (step / atomic.MANIFEST).write_text(json.dumps({name: {"bytes": 1, "sha256": ""}}))
        assert "not a file of this folder" in atomic.damage(step)


def test_moments_that_do_not_fit_are_refused(step: Path) -> None:
    model = small("transformer", torch.float32)
    adamw = torch.optim.AdamW(model.parameters())
    good = load_file(step / checkpoint.OPTIMIZER)
    key = next(k for k in good if k.endswith("/exp_avg"))
    progress = json.loads((step / checkpoint.PROGRESS).read_text())
    odd = {
        "shape": {**good, key: torch.zeros(3)},
        "type": {**good, key: good[key].to(torch.int64)},
        "missing": {k: t for k, t in good.items() if k != key},
        "more": {**good, f"{key}_more": good[key].clone()},
        "nobody's": {**good, "nobody/exp_avg": good[key].clone()},
        "random": {**good, "random/cpu": torch.zeros(10, dtype=torch.uint8)},
    }
    for kind, tensors in odd.items():
        save_file(tensors, step / checkpoint.OPTIMIZER)
        with pytest.raises(CheckpointError):
            checkpoint.restore(checkpoint.Checkpoint(step, progress), model, adamw)
        assert kind


LIMITED = """
import json, resource, sys, torch
from pathlib import Path
from tests.fuzz import files
import titans_graph as tg
lmm = files._model("blocks/lmm")
one, _ = lmm(torch.randn(1, 3, 16))
def spec(**values):
    return lambda: tg.load("mac", **{"dim": 16, "heads": 2, "layers": 1, **values})
def rows():
    path = Path(sys.argv[1])
    state = lmm.initial_state(1)
    n = 2_000_000
    torch_save = __import__("safetensors.torch").torch.save_file
    tensors = {k: t.clone() for k, t in state._tensors().items()}
    tensors["position"], tensors["document"] = torch.zeros(n, dtype=torch.int64), torch.full((n,), -1)
    about = {"format": 2, "kind": "state", "fingerprint": lmm.fingerprint, "sha256": "0" * 64}
    torch_save(tensors, path, {"titans_graph": json.dumps(about)})
    path.write_bytes(files.packed(*files.unpacked(path.read_bytes())))
    return lambda: tg.State.load(lmm, path)
def documents():
    model = tg.load("blocks/lmm", dim=16, heads=2, hidden=4, chunk=64)
    def work():
        with torch.no_grad():
            from titans_graph.runtime.layout import grid_layout
            ids = torch.arange(2000)[None]
            grid_layout(torch.zeros(1, dtype=torch.int64), torch.full((1,), -1), ids, 2000, 64)
            raise tg.InputError("laid out")
    return work
cases = {"dim": spec(dim=2**30), "vocab": spec(vocab=2**31), "segment": spec(segment=2**31 - 64), "hidden": spec(hidden=2**40),
    "persistent": spec(persistent=2**40), "window": lambda: tg.load("mag", dim=16, heads=2, window=2**40),
    "rows": rows(), "batch": lambda: lmm.initial_state(2**40), "documents": documents()}
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
for name, work in cases.items():
    try:
        work()
        print(name, "went through")
    except tg.TitansGraphError as error:
        print(name, "refused")
"""


def test_no_memory_is_taken_because_a_file_says_so(tmp_path: Path) -> None:
    """In a process that may take 200 MB more: running out of it would be a MemoryError or a RuntimeError."""
    if sys.platform != "linux":
        pytest.skip("counts memory the way Linux does")
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "s.safetensors")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    words = ["dim", "vocab", "segment", "hidden", "persistent", "window", "rows", "batch", "documents"]
    assert done.stdout.split("\n")[:-1] == [f"{word} refused" for word in words]


def test_a_hostile_checkpoint_with_a_manifest_that_fits_is_refused_by_its_readers(step: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    found = {p.name: p.read_bytes() for p in step.iterdir() if p.is_file() and p.name != atomic.MANIFEST}
    atomic.write_folder(tmp_path / "again", {**found, checkpoint.WEIGHTS: b"\x80\x04junk" * 50})
    model = small("transformer", torch.float32)
    with pytest.raises(TitansGraphError):
        checkpoint.load_weights(model, checkpoint.find(tmp_path / "again", lambda text: None))
