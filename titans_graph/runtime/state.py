"""The state of a model as an explicit value: what was read so far, row by row."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from safetensors import SafetensorError
from torch import Tensor

from titans_graph.errors import StateError, shortened
from titans_graph.runtime import files

if TYPE_CHECKING:
    from titans_graph.runtime.model import Model

FORMAT = 2
"""2: with a checksum."""
FURTHEST = 1 << 62
"""The largest position a row can have: more could not be counted on."""


Tensors = Mapping[str, Tensor]


class Stepping(Mapping[str, Tensors]):
    """Node states that single tokens left, settled for whoever looks.

    ``held`` is what the next single token takes: some components then have a form that is cheaper to go on with
    (:meth:`titans_graph.registry.Component.stepping`).
    """

    def __init__(self, held: Mapping[str, Tensors], settle: Callable[[str, Tensors], Tensors]) -> None:
        self.held, self._settle = held, settle
        self._settled: dict[str, Tensors] = {}

    def __getitem__(self, node: str) -> Tensors:
        if node not in self._settled:
            self._settled[node] = self._settle(node, self.held[node])
        return self._settled[node]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)

    def map(self, change: Callable[[Tensor], Tensor]) -> Stepping:
        """With every tensor changed by a function."""
        return Stepping({n: {k: change(t) for k, t in tensors.items()} for n, tensors in self.held.items()}, self._settle)


@dataclass(frozen=True, eq=False)
class State:
    """Everything a model remembers, for ``B`` rows that are independent of each other.

    ``position`` ``[B]`` int64: tokens read of the row's current document. ``document`` ``[B]`` int64: its id, -1 before any.
    Both live on the CPU, because the layout is made there. ``nodes`` maps a stateful node's path to its tensors, batch
    first, on the model's device. ``fingerprint`` names the graph the state belongs to.

    States are values: every method returns a new one, and :meth:`Model.forward` never writes into the one it is given.
    ``==`` asks whether two are the same object; to compare contents, compare tensors.
    A state can be pickled for processes of your own, without gradient history; files are :meth:`save` and :meth:`load`.
    """

    position: Tensor
    document: Tensor
    nodes: Mapping[str, Mapping[str, Tensor]]
    fingerprint: str
    fresh: Callable[[int], Mapping[str, Mapping[str, Tensor]]] | None = field(default=None, repr=False)

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
        nodes: Mapping[str, Tensors]
        if isinstance(self.nodes, Stepping):
            nodes = self.nodes.map(change)
        else:
            nodes = {n: {k: change(t) for k, t in tensors.items()} for n, tensors in self.nodes.items()}
        return State(change(self.position), change(self.document), nodes, self.fingerprint, self.fresh)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickles: the tensors, and what a fresh row is (runtime/pickling.py)."""
        from titans_graph.runtime.pickling import state_content, state_from

        return state_from, state_content(self)

    def __copy__(self) -> State:
        """The state itself: it is a value."""
        return self

    def __deepcopy__(self, memo: object) -> State:
        """As :meth:`fork`."""
        return self.fork()

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

    def join(self, *others: State) -> State:
        """One state with the rows of this one and then of all others: streams that were read apart go on as one batch.

        ``State.join(*states)`` does the same. The way back is :meth:`reorder`, which takes rows out. The streams may stand at
        any places. StateError for states of different specs, devices or types.
        """
        states = (self, *others)
        for i, state in enumerate(states):
            if not isinstance(state, State):
                raise StateError(f"join takes states, State.join(*states); argument {i} is a {type(state).__name__}")
            if state.fingerprint != self.fingerprint:
                raise StateError(f"state {i} is of another spec than state 0; only states of one model can be joined")
        nodes = {n: {k: _joined(f"{n}/{k}", [s.nodes[n][k] for s in states]) for k in self.nodes[n]} for n in self.nodes}
        place, document = torch.cat([s.position for s in states]), torch.cat([s.document for s in states])
        fresh = next((s.fresh for s in states if s.fresh is not None), None)
        return State(place, document, nodes, self.fingerprint, fresh)

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
        index = _indices(rows, self.batch)
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= self.batch):
            raise StateError(f"rows {index.tolist()} are not all in 0..{self.batch - 1}")
        return index

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as safetensors with a checksum, atomically (a reader never sees half a file).

        StateError where the file cannot be written.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise StateError(f"cannot write state to {path}: there is no folder {path.parent}; make it first")
        tensors = {k: t.detach().cpu().contiguous().clone() for k, t in self._tensors().items()}
        try:
            files.write(path, tensors, {"format": FORMAT, "kind": "state", "fingerprint": self.fingerprint})
        except (OSError, SafetensorError) as error:
            reason = (error.strerror if isinstance(error, OSError) else "") or str(error).partition("{")[0].strip()
            help = "is it a folder, is the disk full, and may you write there?"
            raise StateError(f"cannot write state to {path}: {shortened(reason, 300)}; {help}") from error

    @staticmethod
    def load(model: Model, path: str | os.PathLike[str]) -> State:
        """Read a state saved by :meth:`save`, onto the model's device.

        StateError where the file is missing, damaged, or of another spec; nothing is ever unpickled.
        """
        path = Path(path)
        tensors, about = files.read(path, "state", StateError)
        if about.get("kind") != "state":
            raise StateError(f"{path} is a safetensors file, but not a state written by State.save")
        if about.get("format") != FORMAT or "sha256" not in about:
            raise StateError(f"{path} has state format {about.get('format')!r:.20}, this version reads {FORMAT}")
        if about.get("fingerprint") != model.fingerprint:
            raise StateError(
                f"{path} holds the state of another spec (fingerprint {str(about.get('fingerprint'))[:12]!r}), "
                f"this model has {model.fingerprint[:12]!r}; load it with the model that made it"
            )
        return _assemble(model, tensors, path)


def _indices(rows: Sequence[int] | Tensor, batch: int) -> Tensor:
    """Rows by index, or by a mask ``[B]``, as indices on the CPU."""
    try:
        index = torch.as_tensor(rows)
        index = index if index.numel() or index.dtype == torch.bool else index.to(torch.int64)
        index = index.to("cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise StateError(f"rows must be whole numbers, or a mask of {batch}, got {rows!r:.100}") from error
    if index.dtype == torch.bool and index.shape == (batch,):
        return index.nonzero()[:, 0]
    if index.dim() > 1 or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise StateError(f"rows must be whole numbers, or a mask of {batch}, got {list(index.shape)} {index.dtype}")
    return index.to(torch.int64).reshape(-1)


def _joined(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Rows of one tensor of all states; caches that grow, to the capacity of the largest."""
    kinds = list(dict.fromkeys(f"{str(t.dtype).removeprefix('torch.')} on {t.device}" for t in parts))
    if len(kinds) > 1:
        raise StateError(f"the states differ in {name!r}: {' and '.join(kinds)}; move the streams to one device and type first")
    if parts[0].dim() == 1:
        return torch.cat(list(parts))
    longest = max(t.shape[1] for t in parts)
    return torch.cat([t if t.shape[1] == longest else _grown(t, longest) for t in parts])


def _grown(cache: Tensor, capacity: int) -> Tensor:
    """A cache ``[B, N, ...]`` with room for ``capacity`` tokens."""
    return torch.cat([cache, cache.new_zeros(cache.shape[0], capacity - cache.shape[1], *cache.shape[2:])], 1)


def _where_rows(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    mask = mask.to(old.device).view(-1, *[1] * (old.dim() - 1))
    if new.shape[1:] != old.shape[1:]:  # a grown cache: an empty one of the same capacity is as good as new
        new = torch.zeros_like(old)
    return torch.where(mask, new, old)


def _assemble(model: Model, tensors: dict[str, Tensor], path: Path) -> State:
    """Put tensors in place, checking every name, type and shape against the state of one fresh row.

    One row, because the file says how many there are: nothing is made for that number before the file holds as many.
    """
    position, document = tensors.get("position"), tensors.get("document")
    if position is None or document is None or position.dim() != 1 or position.dtype != torch.int64:
        raise StateError(f"{path} is damaged: position or document is missing")
    batch, one = position.shape[0], model.initial_state(1)
    rows = {k: t.shape[0] if t.dim() else "no" for k, t in tensors.items()}
    odd = next((k for k, n in rows.items() if n != batch), None)
    if odd is not None:
        raise StateError(f"{path} is damaged: {odd!r:.100} has {rows[odd]} rows, position has {batch}")
    found = {k: t[:1] for k, t in tensors.items()}
    wanted = {k: t[:batch] for k, t in one._tensors().items()}
    for key in model.growing & found.keys():
        wanted[key], found[key] = _same_capacity(wanted[key], found[key])
    wrong = files.misfit(wanted, found) or _misplaced(position, document, [tensors[k] for k in model.growing])
    if wrong:
        raise StateError(f"{path} does not hold this model's state: {wrong}")
    if batch == 0:
        return model.initial_state(0)  # what has no rows takes no bytes, whatever capacity it says a cache has
    position, document = (files.copied(t, torch.device("cpu")) for t in (position, document))
    nodes = {n: {k: files.copied(tensors[f"nodes/{n}/{k}"], t.device) for k, t in ts.items()} for n, ts in one.nodes.items()}
    return State(position, document, nodes, model.fingerprint, one.fresh)


def _same_capacity(wanted: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the tokens of a cache that grows: how many it holds is a matter of its own."""
    return wanted[:, :0], found[:, :0] if found.dim() > 1 else found


def _misplaced(position: Tensor, document: Tensor, growing: Sequence[Tensor]) -> str:
    """What is wrong with where the rows stand; an empty string where nothing is."""
    if bool((position < 0).any()) or bool((position > FURTHEST).any()) or bool((document < -1).any()):
        return "a position or document that no row can have"
    longest = int(position.max()) if position.numel() else 0
    if any(t.shape[1] < longest for t in growing):
        return f"a cache of fewer than the {longest} tokens that were read"
    return ""


def _flatten(state: State) -> tuple[list[object], tuple[object, ...]]:
    return [state.position, state.document, {k: dict(v) for k, v in state.nodes.items()}], (state.fingerprint, state.fresh)


def _unflatten(values: Iterable[Any], context: Any) -> State:
    return State(*values, *context)


pytree.register_pytree_node(State, _flatten, _unflatten, serialized_type_name="titans_graph.State")
