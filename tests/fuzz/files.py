"""Files of tensors and JSON that somebody may have written on purpose: state files and the files of a checkpoint."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import pickle
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

import titans_graph as tg
from tests.fuzz import mutate
from tests.fuzz.contracts import Outcome, printable
from tests.models import example, small
from titans_graph.errors import TitansGraphError
from titans_graph.training import atomic, checkpoint, reading
from titans_graph.training.config import TrainConfig

_ODD_BYTES = (
    b"",
    b"\x80\x04\x95",
    pickle.dumps({"a": 1}),
    b"PK\x03\x04" + b"\0" * 40,
    b"\x93NUMPY\x01\0",
    b"\x7fELF",
    b"{}",
    b"\0" * 64,
)
_LENGTHS = (0, 1, 7, 8, 2**16, 2**24, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_POSITIONS = (-1, 0, 1, 15, 17, 2**31, 2**40, 2**62, 2**62 + 1, 2**63 - 1, -(2**63))


@functools.cache
def _model(name: str) -> tg.Model:
    return small(name, torch.float32)


NAMES = ("blocks/lmm", "transformer")
"""A state of constant size, and one that grows."""


def _bytes_of(save: Callable[[Path], None]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        save(path)
        return path.read_bytes()


@functools.cache
def _states() -> tuple[bytes, ...]:
    found = []
    for name in NAMES:
        for batch, tokens in ((2, 9), (1, 17), (0, 3)):
            _, state = _model(name)(example(_model(name), batch, tokens))
            found.append(_bytes_of(state.detach().save))
    return tuple(found)


def _adamw(model: tg.Model) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def _step(model: tg.Model, optimizer: torch.optim.Optimizer) -> None:
    y, _ = model(example(model, 1, 4))
    y.sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@functools.cache
def _checkpoint() -> dict[str, bytes]:
    """The files of a checkpoint of the small transformer, after one step."""
    model = copy.deepcopy(_model("transformer"))
    optimizer = _adamw(model)
    _step(model, optimizer)
    progress = {"step": 1, "seconds": 0.5, "bits_per_byte": 8.0, "config": TrainConfig(steps=2).plain()}
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save_checkpoint(Path(folder), model, optimizer, progress)
        return {p.name: p.read_bytes() for p in path.iterdir()}


def unpacked(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and content of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def packed(header: Any, content: bytes, *, honest: bool = True) -> bytes:
    """A safetensors file; where ``honest`` with the checksum of its content, as somebody would write who means harm."""
    header = copy.deepcopy(header)
    about = header.get("__metadata__") if isinstance(header, dict) else None
    if honest and isinstance(about, dict) and isinstance(about.get("titans_graph"), str):
        text = about["titans_graph"]
        at = text.find('"sha256": "')
        if at >= 0:
            about["titans_graph"] = text[: at + 11] + hashlib.sha256(content).hexdigest() + text[at + 75 :]
    text = json.dumps(header).encode("utf-8", "replace")
    return len(text).to_bytes(8, "little") + text + content


def _tensor_file(draw: Random, good: Sequence[bytes]) -> bytes:
    """One damaged file of tensors."""
    data, kind = draw.choice(good), draw.randrange(10)
    if kind < 2:
        return mutate.flip(draw, data, good)
    if kind == 2:
        cut = data[: draw.randrange(len(data))]
        return cut + draw.choice((b"", b"\0" * 8, data))
    if kind == 3:
        return draw.choice(_LENGTHS).to_bytes(8, "little") + data[8:]
    if kind == 4:
        return draw.choice(_ODD_BYTES) + draw.choice((b"", data, data[8:]))
    header, content = unpacked(data)
    if kind == 5:
        return packed(header, _content(draw, header, content))
    if kind == 6:
        about = (
            header["__metadata__"] if "__metadata__" in header else header.setdefault("__metadata__", {"titans_graph": "{}"})
        )
        text = mutate.text(draw, (about.get("titans_graph", "{}").encode(),))
        about["titans_graph"] = text.decode("utf-8", "replace")
        return packed(header, content, honest=draw.random() < 0.5)
    if kind == 7:
        text = mutate.text(draw, (json.dumps(header).encode(),), trees=False)
        return len(text).to_bytes(8, "little") + text + content
    return packed(_header(draw, header, unpacked(draw.choice(good))[0]), content)


def _header(draw: Random, header: dict[str, Any], donor: dict[str, Any]) -> Any:
    """Names, types, shapes and places exchanged, or replaced by odd ones."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        mutate.change(draw, header, donor)
    return header


def _content(draw: Random, header: dict[str, Any], content: bytes) -> bytes:
    """Numbers replaced: positions and documents that no row has, NaN, noise."""
    changed = bytearray(content)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if entry["dtype"] == "I64" and draw.random() < 0.7 and end > begin:
            changed[begin : begin + 8] = draw.choice(_POSITIONS).to_bytes(8, "little", signed=True)
        elif draw.random() < 0.1:
            changed[begin:end] = draw.choice((b"\0", b"\xff", b"\x7f")) * (end - begin)
    return bytes(changed)


def draw_state(draw: Random) -> bytes:
    """A damaged state file."""
    return _tensor_file(draw, _states())


def state(data: bytes, folder: Path) -> Outcome:
    """A state file: refused with a named error, or a state that a call can take."""
    path = folder / "fuzz.safetensors"
    path.write_bytes(data)
    outcome = "refused"
    for name in NAMES:
        model = _model(name)
        try:
            found = tg.State.load(model, path)
        except TitansGraphError as error:
            printable(str(error))
            continue
        outcome = "loaded"
        with torch.no_grad():
            model(example(model, found.batch, 2), found)
    return outcome


def draw_weights(draw: Random) -> bytes:
    """A damaged file of weights."""
    return _tensor_file(draw, (_checkpoint()[checkpoint.WEIGHTS],))


def draw_optimizer(draw: Random) -> bytes:
    """A damaged file of moments and random states."""
    return _tensor_file(draw, (_checkpoint()[checkpoint.OPTIMIZER],))


def draw_progress(draw: Random) -> bytes:
    """A damaged ``progress.json``: its numbers one by one, or its text."""
    if draw.random() < 0.3:
        return mutate.text(draw, (_checkpoint()[checkpoint.PROGRESS],))
    found = json.loads(_checkpoint()[checkpoint.PROGRESS])
    part = found["random"] if draw.random() < 0.6 else found
    mutate.change(draw, part, found)
    if draw.random() < 0.3:
        part[draw.choice(list(part) or ["x"])] = draw.choice(mutate.VALUES)
    if isinstance(found.get("random"), dict) and isinstance(found["random"].get("numpy"), list) and draw.random() < 0.3:
        numbers = found["random"]["numpy"]
        if len(numbers) > 2:
            numbers[draw.randrange(len(numbers))] = draw.choice((*_POSITIONS, 10**40, 0.5, None, "x", []))
    return json.dumps(found).encode()


def draw_manifest(draw: Random) -> bytes:
    """A damaged ``manifest.json``."""
    return mutate.text(draw, (_checkpoint()[atomic.MANIFEST],))


def _folder(folder: Path, name: str, data: bytes) -> Path:
    path = folder / "step-00000001"
    path.mkdir(exist_ok=True)
    for other, content in _checkpoint().items():
        if not (path / other).is_file() or other == name:
            (path / other).write_bytes(data if other == name else content)
    return path


@functools.cache
def _trained() -> tuple[tg.Model, torch.optim.AdamW]:
    """A model that may be changed: every input that is accepted overwrites it."""
    model = copy.deepcopy(_model("transformer"))
    return model, _adamw(model)


def _held(work: Callable[[], object]) -> Outcome:
    """Run some work that may refuse; random states are put back."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True)
    try:
        work()
        torch.rand(700)
        random.random()
        np.random.rand(700)
    except TitansGraphError as error:
        printable(str(error))
        return "refused"
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])
    return "taken"


def weights(data: bytes, folder: Path) -> Outcome:
    """A checkpoint's weights: refused, or in the model."""
    found = checkpoint.Checkpoint(_folder(folder, checkpoint.WEIGHTS, data), {"step": 1})
    model, _ = _trained()
    return _held(lambda: checkpoint.load_weights(model, found))


def optimizer(data: bytes, folder: Path) -> Outcome:
    """A checkpoint's moments and random states: refused, or the next step can be made."""
    path = _folder(folder, checkpoint.OPTIMIZER, data)
    progress = json.loads(_checkpoint()[checkpoint.PROGRESS])
    model, _ = _trained()
    adamw = _adamw(model)

    def work() -> None:
        checkpoint.restore(checkpoint.Checkpoint(path, progress), model, adamw)
        _step(model, adamw)

    return _held(work)


def progress(data: bytes, folder: Path) -> Outcome:
    """``progress.json``: refused, or everything that training takes from it can be taken."""
    path = _folder(folder, checkpoint.PROGRESS, data)
    model, adamw = _trained()

    def work() -> None:
        found = checkpoint.Checkpoint(path, reading.progress(path / checkpoint.PROGRESS))
        assert found.step >= 0
        f"{found.value('seconds'):.1f} {found.value('bits_per_byte')}"
        TrainConfig.from_plain(found.value("config"))
        checkpoint.restore(found, model, adamw)

    return _held(work)


def manifest(data: bytes, folder: Path) -> Outcome:
    """``manifest.json``: damage is said, and nothing outside the folder is looked at."""
    path = _folder(folder, atomic.MANIFEST, data)
    wrong = atomic.damage(path)
    if wrong:
        printable(wrong)
        return "damaged"
    return _held(lambda: checkpoint.find(path, lambda text: None))
