"""The state of a model as an explicit value: what was read so far, row by row."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from titans_graph.errors import StateError

if TYPE_CHECKING:
    from titans_graph.runtime.model import Model

FORMAT = 1
LARGEST_FILE = 1 << 40


@dataclass(frozen=True)
class State:
    """Everything a model remembers, for ``B`` rows that are independent of each other.

    ``position`` ``[B]`` int64: tokens read of the row's current document. ``document`` ``[B]`` int64: its id, -1 before any.
    Both live on the CPU, because the layout is made there. ``nodes`` maps a stateful node's path to its tensors, batch
    first, on the model's device. ``fingerprint`` names the graph the state belongs to.

    States are values: every method returns a new one, and :meth:`Model.forward` never writes into the one it is given.
    """

    position: Tensor
    document: Tensor
    nodes: Mapping[str, Mapping[str, Tensor]]
    fingerprint: str
    fresh: Callable[[int], Mapping[str, Mapping[str, Tensor]]] | None = field(default=None, compare=False, repr=False)

    @property
    def batch(self) -> int:
        """The number of rows."""
        return int(self.position.shape[0])

    @property
    def bytes(self) -> int:
        """Bytes of all tensors of all rows."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        flat = {f"nodes/{n}/{k}": t for n, tensors in self.nodes.items() for k, t in tensors.items()}
        return {"position": self.position, "document": self.document, **flat}

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """A state with every tensor changed by a function (``position`` and ``document`` too)."""
        nodes = {n: {k: change(t) for k, t in tensors.items()} for n, tensors in self.nodes.items()}
        return State(change(self.position), change(self.document), nodes, self.fingerprint, self.fresh)

    def detach(self) -> State:
        """The same state without gradient history: truncates backpropagation through time here."""
        return self.map(torch.Tensor.detach)

    def fork(self) -> State:
        """An independent copy; gradients still flow to the original's history."""
        return self.map(torch.Tensor.clone)

    def reorder(self, rows: Sequence[int] | Tensor) -> State:
        """The state whose row i is this one's row ``rows[i]`` (repetitions allowed: beams). StateError if out of range."""
        index = self._rows(rows)
        return self.map(lambda t: t.index_select(0, index.to(t.device)))

    def reset(self, rows: Sequence[int] | Tensor) -> State:
        """The state in which some rows start afresh, as before their first token; the others are untouched."""
        index = self._rows(rows)
        if self.fresh is None:
            raise StateError("this state was not made by a model, so it cannot be reset; use model.initial_state(batch)")
        mask = torch.zeros(self.batch, dtype=torch.bool)
        mask[index] = True
        initial = self.fresh(self.batch)
        nodes = {n: {k: _where_rows(mask, initial[n][k], t) for k, t in tensors.items()} for n, tensors in self.nodes.items()}
        position = torch.where(mask, 0, self.position)
        document = torch.where(mask, -1, self.document)
        return State(position, document, nodes, self.fingerprint, self.fresh)

    def _rows(self, rows: Sequence[int] | Tensor) -> Tensor:
        index = torch.as_tensor(rows)
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        index = index.to("cpu", torch.int64).reshape(-1)
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= self.batch):
            raise StateError(f"rows {index.tolist()} are not all in 0..{self.batch - 1}")
        return index

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as safetensors, atomically (a reader never sees half a file)."""
        path = Path(path)
        tensors = {k: t.detach().cpu().contiguous().clone() for k, t in self._tensors().items()}
        metadata = {"titans_graph": json.dumps({"format": FORMAT, "kind": "state", "fingerprint": self.fingerprint})}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, metadata)
            os.replace(temporary, path)
        except OSError as error:
            raise StateError(f"cannot write state to {path}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def load(model: Model, path: str | os.PathLike[str]) -> State:
        """Read a state saved by :meth:`save`, onto the model's device.

        StateError where the file is missing, damaged, or of another spec; nothing is ever unpickled.
        """
        tensors, found = _read(Path(path))
        if found.get("fingerprint") != model.fingerprint:
            raise StateError(
                f"{path} holds the state of another spec (fingerprint {str(found.get('fingerprint'))[:12]}), "
                f"this model has {model.fingerprint[:12]}; load it with the model that made it"
            )
        return _assemble(model, tensors, path)


def _where_rows(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    mask = mask.to(old.device).view(-1, *[1] * (old.dim() - 1))
    if new.shape[1:] != old.shape[1:]:  # a grown cache: an empty one of the same capacity is as good as new
        new = torch.zeros_like(old)
    return torch.where(mask, new, old)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and metadata of a state file; StateError for anything that is not one."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise StateError(f"{path} is too large to be a state")
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("titans_graph", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except OSError as error:
        raise StateError(f"cannot read state {path}: {error}") from error
    except (SafetensorError, ValueError, TypeError, MemoryError) as error:
        raise StateError(f"{path} is damaged or not a state file (safetensors): {error}") from error
    if not isinstance(metadata, dict) or metadata.get("kind") != "state":
        raise StateError(f"{path} is a safetensors file, but not a state written by State.save")
    if metadata.get("format") != FORMAT:
        raise StateError(f"{path} has state format {metadata.get('format')}, this version reads {FORMAT}")
    return tensors, metadata


def _assemble(model: Model, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> State:
    """Put tensors in place, checking every name, shape and type against a fresh state."""
    position, document = tensors.get("position"), tensors.get("document")
    if position is None or document is None or position.dim() != 1 or position.dtype != torch.int64:
        raise StateError(f"{path} is damaged: position or document is missing")
    expected = model.initial_state(position.shape[0])
    wanted = expected._tensors()
    if set(wanted) != set(tensors):
        odd = sorted(set(wanted) ^ set(tensors))
        raise StateError(f"{path} does not hold this model's state: {', '.join(odd[:5])}")
    for key, want in wanted.items():
        got = tensors[key]
        grown = key in model.growing and got.dim() == want.dim() and got.shape[2:] == want.shape[2:]
        if got.dtype != want.dtype or not (got.shape == want.shape or (grown and got.shape[0] == want.shape[0])):
            raise StateError(f"{path}: {key} is {list(got.shape)} {got.dtype}, expected {list(want.shape)} {want.dtype}")
    if bool((position < 0).any()):
        raise StateError(f"{path} is damaged: a negative position")
    nodes = {n: {k: tensors[f"nodes/{n}/{k}"].to(t.device) for k, t in ts.items()} for n, ts in expected.nodes.items()}
    return State(position, document, nodes, model.fingerprint, expected.fresh)


def _flatten(state: State) -> tuple[list[object], tuple[object, ...]]:
    return [state.position, state.document, {k: dict(v) for k, v in state.nodes.items()}], (state.fingerprint, state.fresh)


def _unflatten(values: Iterable[Any], context: Any) -> State:
    return State(*values, *context)


pytree.register_pytree_node(State, _flatten, _unflatten, serialized_type_name="titans_graph.State")
