"""The state of the component ``memory.neural`` by name, and its other form for single tokens.

Between calls a state is ``anchor.*``, ``weights.*`` and ``momenta.*``, which anything can be done with. While single tokens
are read without gradients it holds a ring of pairs besides (:class:`~titans_graph.kernels.memory_lazy.Lazy`): ``ring.inputs.i``
and ``ring.deltas.i`` for every use of a weight, ``ring.shares``, ``ring.ends``, ``ring.norms`` and ``ring.slot``; ``weights.*``
and ``momenta.*`` are then those last written. ``ring.taken`` ``[B, n]`` tells the host by its shape how many pairs there are:
what stands in it means nothing and is never read, so that nothing waits for a GPU. The portable form and the Triton kernels
have this one layout: nothing is converted but where single tokens begin or end. ``copies.i``: where a model in half precision
is read by Triton kernels, anchor, weights and momenta in its type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from titans_graph.kernels.memory_lazy import Lazy, begin, current, read_in, ready

State = Mapping[str, Tensor]

_LISTS = ("anchor", "weights", "momenta")


def named(names: Sequence[str], anchor: list[Tensor], weights: list[Tensor], momenta: list[Tensor]) -> dict[str, Tensor]:
    """The entries of a state that hold fast weights."""
    lists = zip(_LISTS, (anchor, weights, momenta), strict=True)
    return {f"{kind}.{name}": x for kind, values in lists for name, x in zip(names, values, strict=True)}


def listed(state: State, names: Sequence[str]) -> list[list[Tensor]]:
    """Anchor, weights and momenta in the order of ``names``."""
    return [[state[f"{kind}.{name}"] for name in names] for kind in _LISTS]


def lazy_of(state: State, names: Sequence[str]) -> Lazy | None:
    """The ring and what it stands on; None where the state has none."""
    if "ring.shares" not in state:
        return None
    inputs, deltas = _numbered(state, "ring.inputs"), _numbered(state, "ring.deltas")
    anchor, weights, momenta = listed(state, names)
    rest = state["ring.shares"], state["ring.ends"], state["ring.slot"], state["ring.norms"]
    return Lazy(anchor, weights, momenta, inputs, deltas, *rest, _numbered(state, "copies"))


def _numbered(state: State, kind: str) -> list[Tensor]:
    """The entries ``kind.0``, ``kind.1`` ...

    By look-up alone: a traced call that runs through a mapping is specialised on the order of its keys.
    """
    found: list[Tensor] = []
    while f"{kind}.{len(found)}" in state:
        found.append(state[f"{kind}.{len(found)}"])
    return found


def named_lazy(names: Sequence[str], lazy: Lazy) -> dict[str, Tensor]:
    """The entries of a state with a ring."""
    fast = named(names, lazy.anchor, lazy.weights, lazy.momenta)
    copies = {f"copies.{i}": x for i, x in enumerate(lazy.copies)}
    return {**fast, **named_ring(lazy), "ring.norms": lazy.norms, **copies}


def named_ring(lazy: Lazy) -> dict[str, Tensor]:
    """The entries that every token changes."""
    rings = ("inputs", lazy.inputs), ("deltas", lazy.deltas)
    ring = {f"ring.{kind}.{i}": x for kind, values in rings for i, x in enumerate(values)}
    return {**ring, "ring.shares": lazy.shares, "ring.ends": lazy.ends, "ring.slot": lazy.slot}


def stepping(
    network: str,
    names: Sequence[str],
    chunk: int,
    segment: int,
    bounded: bool,
    state: State,
    initial: Sequence[Tensor],
    position: Tensor,
    kernel: str,
    reads: torch.dtype,
) -> dict[str, Tensor]:
    """The state with a ring, ready for the tokens at ``position`` (int64 ``[B]``, on the CPU).

    Rows at position 0 begin with ``initial`` (``[H, *shape]`` each), rows that begin a chunk get its anchor, rows that begin
    a segment its ``opening`` where there is one. ``kernel``: ``triton``, which reads weights in the type ``reads``, or
    ``portable``.
    """
    lazy = lazy_of(state, names) or begin(network, chunk, bounded, *listed(state, names))
    # At every token: the model, or what it is run on, may have changed since the last.
    lazy = read_in(lazy, reads if kernel == "triton" else None)
    taken = state["ring.taken"].shape[1] if "ring.taken" in state else 0
    places = position.tolist()  # Whole numbers: with tensors the questions below would cost as much as a token.
    fresh = [x.expand_as(w) for x, w in zip(initial, lazy.weights, strict=True)]
    lazy, taken = ready(network, chunk, lazy, taken, places, fresh, kernel)
    count = lazy.slot.new_empty(len(places), taken + 1, dtype=torch.uint8)
    kept = {key: x for key, x in state.items() if not key.startswith("copies.")}
    new = {**kept, **named_lazy(names, lazy), "ring.taken": count}
    if f"opening.{names[0]}" in state and any(place % segment == 0 for place in places):
        opens = (position % segment == 0).to(lazy.ends.device)
        for name, anchor in zip(names, lazy.anchor, strict=True):
            there = opens.view(-1, *[1] * (anchor.dim() - 1))
            new[f"opening.{name}"] = torch.where(there, anchor, state[f"opening.{name}"])
    return new


def settled(network: str, names: Sequence[str], state: State, kernel: str) -> dict[str, Tensor]:
    """The state without a ring: weights and momenta of the last token."""
    lazy = lazy_of(state, names)
    if lazy is None:
        return dict(state)
    weights, momenta = current(network, lazy, kernel)
    kept = {key: x for key, x in state.items() if not key.startswith(("ring.", "copies."))}
    return {**kept, **named(names, lazy.anchor, weights, momenta)}


def opening_weights(
    names: Sequence[str], segment: int, state: State, initial: Sequence[Tensor], valid: Tensor, position: Tensor
) -> list[Tensor]:
    """The weights from before the segment: where the segment begins with this call, the current ones.

    ``initial`` ``[H, *shape]`` each; ``valid`` and ``position`` ``[B, G]`` of the call.
    """
    if "ring.shares" in state:
        return [state[f"opening.{name}"] for name in names]
    begins, fresh = valid[:, 0], valid[:, 0] & (position[:, 0] == 0)
    if valid.shape[1] == 1:
        begins = begins & (position[:, 0] % segment == 0)
    chosen = []
    for name, start in zip(names, initial, strict=True):
        shape = (-1, *[1] * start.dim())
        now = torch.where(fresh.view(shape), start, state[f"weights.{name}"])
        chosen.append(torch.where(begins.view(shape), now, state[f"opening.{name}"]))
    return chosen


def free_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names that a ParameterDict has no attribute of, such as ``half_`` for a fast weight called ``half``."""
    taken, found = nn.ParameterDict(), list[str]()
    for name in names:
        free = name
        while hasattr(taken, free) or (free != name and free in (*names, *found)):
            free += "_"
        found.append(free)
    return tuple(found)
