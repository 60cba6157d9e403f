"""Models and states in pickles, for processes of one's own: workers, copies, ``torch.save``.

A pickle holds the graph's text, from which the program is made again, and the modules with their tensors. What is made from a
graph (functions, compiled code) never travels. Files for others, or for later, are safetensors: whoever loads a pickle runs
what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from titans_graph.ir import parse
from titans_graph.runtime import api
from titans_graph.runtime.runner import Eager
from titans_graph.runtime.state import State, Tensors

if TYPE_CHECKING:
    from titans_graph.runtime.model import Model

_MADE = ("compilation", "_runner")
"""Attributes of a model that are made from its graph."""


def bare(cls: type[Model]) -> Model:
    """A model with nothing in it, to be filled by :func:`unpack`."""
    return cls.__new__(cls)


def packed(model: Model) -> dict[str, Any]:
    """What a model's pickle holds: the graph as text, the passes that were left out, and everything not made from them."""
    left_out = [record.name for record in model.compilation.records if record.after is None]
    kept = {key: value for key, value in model.__dict__.items() if key not in _MADE}
    return {"graph": model.graph.text(), "disable": left_out, "kept": kept}


def unpack(model: Model, content: Mapping[str, Any]) -> None:
    """Fill a bare model with what :func:`packed` gave. SpecError where a component or objective is not known here."""
    with torch.device("meta"):  # the weights come with the pickle: none are made, and nothing is drawn at random
        made = api.compilation(parse(content["graph"]), disable=content["disable"])
    fill: Callable[[Model, dict[str, Any]], None] = torch.nn.Module.__setstate__
    fill(model, dict(content["kept"]))
    model.compilation = replace(made, lowered=replace(made.lowered, modules=model.body))
    model._runner = Eager(model.compilation.lowered)


@dataclass(frozen=True, eq=False)
class FreshRows:
    """What ``State.fresh`` is where no model stands behind it: the state before the first token, kept for one row."""

    one: Mapping[str, Tensors]

    def __call__(self, batch: int) -> dict[str, dict[str, Tensor]]:
        """The state of ``batch`` rows before their first token."""
        return _mapped(self.one, lambda t: t.expand(batch, *t.shape[1:]).clone())


def state_content(state: State) -> tuple[Any, ...]:
    """What a state's pickle holds: its tensors without gradient history, and one fresh row, so that it can be reset."""
    fresh = state.fresh
    start = None if fresh is None else _mapped(fresh(1), _own)
    return _own(state.position), _own(state.document), _mapped(state.nodes, _own), state.fingerprint, start


def state_from(
    position: Tensor, document: Tensor, nodes: Mapping[str, Tensors], fingerprint: str, start: Mapping[str, Tensors] | None
) -> State:
    """The state of what :func:`state_content` gave."""
    return State(position, document, nodes, fingerprint, None if start is None else FreshRows(start))


def _mapped(nodes: Mapping[str, Tensors], change: Callable[[Tensor], Tensor]) -> dict[str, dict[str, Tensor]]:
    return {n: {k: change(t) for k, t in tensors.items()} for n, tensors in nodes.items()}


def _own(tensor: Tensor) -> Tensor:
    """Without history, and without the rest of the storage that a view looks into."""
    return tensor.detach().clone()
