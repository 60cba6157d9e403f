"""Where the first NaN or infinity of a training step came from: one step with every node looked at, forward and backward.

Forward, the first node in the order of execution that gave one although it may have been handed one: the first in time.
Backward, the first node, in the order of the backward pass, that was given finite gradients for its outputs and returned
one that is not finite for an input or parameter.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from titans_graph.runtime.health import doctor
from titans_graph.runtime.model import Model


@dataclass(frozen=True)
class Trace:
    """A step, looked at. ``forward`` and ``backward`` name the first node and what of it, empty where all was finite.

    ``parameters``: those that hold a NaN or infinity already. ``norm`` (of the gradient) is NaN where the loss was not finite.
    """

    loss: float
    norm: float
    parameters: tuple[str, ...]
    forward: str
    backward: str

    @property
    def finite(self) -> bool:
        """Whether nothing was found."""
        return not (self.parameters or self.forward or self.backward) and _finite(self.loss) and _finite(self.norm)

    def lines(self) -> list[str]:
        """For people."""
        found = [f"parameter {name} is not finite" for name in self.parameters]
        if self.forward:
            found.append(f"the first output that is not finite: {self.forward}")
        elif not _finite(self.loss):
            found.append("every node's output is finite, the loss is not: the logits are too large")
        if self.backward:
            found.append(f"the first gradient that is not finite: {self.backward}")
        elif _finite(self.loss) and not _finite(self.norm):
            found.append("every gradient is finite, their norm is not: it is too large for float32")
        return found or ["every output and gradient is finite"]

    def plain(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "loss": self.loss if _finite(self.loss) else None,
            "norm": self.norm if _finite(self.norm) else None,
            "parameters": list(self.parameters),
            "forward": self.forward,
            "backward": self.backward,
        }


def trace(model: nn.Module, loss_of: Callable[[], Tensor], windows: Tensor) -> Trace:
    """One step of ``loss_of``, which calls ``model`` (its eager program) on ``windows`` ``[B, T + 1]``.

    Parameters and their ``grad`` stay as they are.
    """
    look = _Look(_nodes(model))
    with look.hooked(), torch.enable_grad():
        loss = loss_of()
        value, norm = float(loss.detach()), float("nan")
        if _finite(value):
            named = {n: p for n, p in model.named_parameters() if p.requires_grad}
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
            norm = float(torch.stack([g.float().square().sum() for g in gradients]).sum().sqrt())
    parameters = tuple(n for n, p in model.named_parameters() if not bool(p.isfinite().all()))
    forward = look.forward and _forward(model, look.forward, windows)
    # Slots without a token may hold anything; what is read of them is nothing, so a finite result clears them.
    return Trace(value, norm, parameters, "" if _finite(value) else forward, "" if _finite(norm) else look.backward)


def _forward(model: nn.Module, found: str, windows: Tensor) -> str:
    """The node, and for a model of ours its output and token, as the doctor sees it."""
    first = doctor(model, windows[:, :-1]).first if isinstance(model, Model) else None
    return first.text() if first is not None else found


def _finite(x: float) -> bool:
    return x - x == 0


def _nodes(model: nn.Module) -> dict[str, nn.Module]:
    """The nodes of a graph by path; of another module, its parts that have no parts, or itself."""
    if isinstance(model, Model):
        return {name: model.body.get_submodule(name) for name in model.compilation.nodes}
    leaves = {name: m for name, m in model.named_modules() if name and not list(m.children())}
    return {**leaves, "model": model}


class _Look:
    """Hooks on nodes for one step, and the first that went wrong, in each direction."""

    def __init__(self, nodes: dict[str, nn.Module]) -> None:
        self.nodes = nodes
        self.forward = self.backward = ""
        self.handles: list[Any] = []

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """While entered, every call of a node is looked at."""
        handles = self.handles
        for name, module in self.nodes.items():
            calls: list[_Call] = []
            handles.append(module.register_forward_pre_hook(self._before(name, calls), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after(calls)))
            for parameter, value in module.named_parameters():
                if value.requires_grad:
                    watch = self._parameter(name, parameter, calls)
                    handles.append(value.register_hook(watch))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str, calls: list[_Call]) -> Any:
        mine = threading.get_ident()

        def hook(module: nn.Module, args: Any, given: Any) -> Any:
            if threading.get_ident() != mine:  # others may use the model meanwhile
                return None
            call = _Call(self, name)
            calls.append(call)
            return pytree.tree_map(call.enter, (args, given))

        return hook

    @staticmethod
    def _after(calls: list[_Call]) -> Any:
        mine = threading.get_ident()

        def hook(module: nn.Module, args: Any, result: Any) -> None:
            if threading.get_ident() != mine:
                return
            for leaf in pytree.tree_leaves(result):
                calls[-1].leave(leaf)

        return hook

    def _parameter(self, name: str, parameter: str, calls: list[_Call]) -> Callable[[Tensor | None], None]:
        def hook(gradient: Tensor | None) -> None:
            if not any(call.spoiled for call in calls):
                self.returned(f"{name}, for its parameter {parameter}", gradient)

        return hook

    def returned(self, what: str, gradient: Tensor | None) -> None:
        """Note a gradient that a node gave back (None: it gave none)."""
        if not self.backward and gradient is not None and not bool(gradient.isfinite().all()):
            self.backward = what


class _Call:
    """One call of a node; ``spoiled`` once it was handed a gradient that is not finite."""

    def __init__(self, look: _Look, name: str) -> None:
        self.look, self.name, self.spoiled = look, name, False

    def enter(self, leaf: Any) -> Any:
        """An input, as a view of its own: what flows back through it comes from this call alone."""
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad):
            return leaf
        own = leaf.view_as(leaf)
        own.register_hook(self._back)  # type: ignore[no-untyped-call]
        return own

    def leave(self, leaf: Any) -> None:
        """An output."""
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return
        if not self.look.forward and not bool(leaf.isfinite().all()):
            self.look.forward = self.name
        if leaf.requires_grad:
            # Kept, to be removed: a node may give out a parameter as it is.
            self.look.handles.append(leaf.register_hook(self._arrive))  # type: ignore[no-untyped-call]

    def _arrive(self, gradient: Tensor | None) -> None:
        self.spoiled |= gradient is not None and not bool(gradient.isfinite().all())

    def _back(self, gradient: Tensor | None) -> None:
        if not self.spoiled:
            self.look.returned(f"{self.name}, for one of its inputs", gradient)
