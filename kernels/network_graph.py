"""A memory network as a graph, and what is derived from it: shapes, values, and the bound of its curvature.

Stands between :mod:`~titans_graph.kernels.network_ops` and :mod:`~titans_graph.kernels.networks`, which reads descriptions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from titans_graph.kernels.network_ops import INPUT, OPS, At, NetworkError, Node, Use

if TYPE_CHECKING:
    from torch import Generator, Tensor

Shapes = dict[str, tuple[int, ...]]


class PlainUse:
    """Fast weights used as they are: ``linear`` is a matrix product, ``vector`` a broadcast over tokens."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights

    def linear(self, name: str, u: Tensor) -> Tensor:
        """``u @ W_name``."""
        return u @ self.weights[name]

    def vector(self, name: str) -> Tensor:
        """The vector ``name`` with one axis for tokens."""
        return self.weights[name].unsqueeze(-2)


@dataclass(frozen=True)
class Network:
    """A memory network as data: nodes, each after its inputs, and which one is the output; hashable.

    ``short`` is the canonical text of a network that was written by a short name, else empty.
    """

    nodes: tuple[Node, ...]
    output: str
    short: str = ""

    def sizes(self, dim: int) -> dict[str, int]:
        """The size of every node's value for inputs of size ``dim``; :class:`NetworkError` where sizes do not agree."""
        sizes = {INPUT: dim}
        for node in self.nodes:
            sizes[node.name] = OPS[node.use].size(node, sizes, dim)
        return sizes

    def weights(self, dim: int) -> Shapes:
        """Names and shapes of the fast weights for inputs and outputs of size ``dim``: ``(in, out)`` or ``(size,)``.

        In the order of their first use. :class:`NetworkError` where sizes do not agree.
        """
        sizes = self.sizes(dim)
        shapes: Shapes = {}
        owner: dict[str, str] = {}
        for node in self.nodes:
            if not OPS[node.use].measure:
                continue
            out, name = sizes[node.name], node.weight
            shape = (sizes[node.inputs[0]], out) if OPS[node.use].measure == "spectral" else (out,)
            if shapes.setdefault(name, shape) != shape:
                raise NetworkError(
                    f"fast weight {name!r} has shape {list(shapes[name])} in node {owner[name]!r} and {list(shape)} in node "
                    f"{node.name!r}; a tied weight needs one shape",
                    *("nodes", node.name),
                )
            owner.setdefault(name, node.name)
        self._check_ends(sizes, dim)
        return shapes

    def _check_ends(self, sizes: Mapping[str, int], dim: int) -> None:
        if sizes[self.output] != dim:
            raise NetworkError(
                f"output {self.output!r} has size {sizes[self.output]}, but must have that of the input {INPUT!r}, {dim}",
                *("nodes", self.output),
            )
        sums = [node.inputs for node in self.nodes if node.use == "residual"]
        if sums and all(sizes[before] != sizes[after] for before, after in sums):
            raise NetworkError("residual has no effect, no layer's input and output agree in size; set hidden or depth")

    def uses(self, dim: int) -> tuple[str, ...]:
        """Names of the fast weights in the order in which :meth:`apply` uses them, with repetitions."""
        return tuple(node.weight for node in self.nodes if OPS[node.use].measure)

    def values(self, x: Tensor, use: Use) -> dict[str, Tensor]:
        """Every node's value for ``x`` ``[..., C, dim]``, by name, the input's included."""
        values = {INPUT: x}
        for node in self.nodes:
            inputs = [values[name] for name in node.inputs]
            values[node.name] = OPS[node.use].apply(use, node.weight, dict(node.options), inputs)
        return values

    def apply(self, x: Tensor, use: Use) -> Tensor:
        """The network's output for ``x`` ``[..., C, dim]``, with the same shape."""
        return self.values(x, use)[self.output]

    def measures(self) -> dict[str, str]:
        """Which norm of each fast weight the bounds are made from: ``spectral``, ``length`` or ``largest`` entry."""
        return {node.weight: OPS[node.use].measure for node in self.nodes if OPS[node.use].measure}

    def behind(self) -> frozenset[str]:
        """The nodes whose values depend on fast weights."""
        found: set[str] = set()
        for node in self.nodes:
            if OPS[node.use].measure or found.intersection(node.inputs):
                found.add(node.name)
        return frozenset(found)

    def local(self) -> tuple[str, ...]:
        """The nodes with a fast weight before them and no finite gain for all tokens: :meth:`curvature` needs theirs."""
        behind = self.behind()
        return tuple(n.name for n in self.nodes if OPS[n.use].local is not None and behind.intersection(n.inputs))

    def local_gains(self, x: Tensor, use: Use) -> dict[str, Tensor]:
        """The gains ``[..., C]`` of the nodes of :meth:`local` at each token of ``x``; one pass of the network."""
        values, gains = self.values(x, use), {}
        for node in self.nodes:
            local = OPS[node.use].local
            if local is not None and node.name in self.local():
                gains[node.name] = local(dict(node.options), values[node.inputs[0]])
        return gains

    def curvature(self, norms: Mapping[str, Tensor], dim: int, gains: Mapping[str, Tensor]) -> Tensor:
        """A bound of the squared length of the Jacobian of the output by all fast weights, for an input of length 1.

        ``norms`` holds an upper bound of each weight's norm by :meth:`measures`, ``gains`` those of :meth:`local`; all
        broadcast against each other, and so does the result. Forward, every node gets an upper bound of its length;
        backward, one of the gain from it to the output. A use of a weight contributes (length that goes in * gain after);
        the uses of one weight are summed before they are squared, and the squares are summed over the weights.
        """
        sizes, behind = self.sizes(dim), self.behind()
        one = next(iter(norms.values()))
        one = one.new_ones(one.shape)
        lengths, places = {INPUT: one}, {}
        for node in self.nodes:
            norm = norms[node.weight] if OPS[node.use].measure else one
            inputs = [lengths[name] for name in node.inputs]
            at = At(inputs, norm, gains.get(node.name, one), sizes[node.name], dict(node.options))
            places[node.name], lengths[node.name] = at, OPS[node.use].length(at)
        after: dict[str, Tensor] = {self.output: one}
        shares: dict[str, Tensor] = {}
        for node in reversed(self.nodes):
            if node.name not in behind:
                continue
            op, at, gain = OPS[node.use], places[node.name], after[node.name]
            if op.share is not None:
                part = op.share(at) * gain
                shares[node.weight] = shares[node.weight] + part if node.weight in shares else part
            for name, slope in zip(node.inputs, op.gains(at), strict=True):
                if name in behind:
                    after[name] = after[name] + gain * slope if name in after else gain * slope
        total = None
        for share in shares.values():
            total = share.square() if total is None else total + share.square()
        return cast("Tensor", total)

    def initialise(self, name: str, shape: tuple[int, ...], generator: Generator | None = None) -> Tensor:
        """Initial values of one fast weight, float32.

        Matrices are normal with deviation 1/sqrt(in): outputs keep the size of unit-variance inputs, and the product of
        gains in the curvature bound starts near one per layer. A ``fast.bias`` starts at 0, a ``fast.gain`` at 1.
        """
        import torch

        if len(shape) == 1:
            start = next((OPS[node.use].start for node in self.nodes if OPS[node.use].measure and node.weight == name), 0.0)
            return torch.full(shape, start)
        return torch.randn(shape, generator=generator) / math.sqrt(shape[0])

    def description(self) -> Any:
        """The network as plain data, complete; :func:`parse_network` reads it."""
        if self.short:
            return json.loads(self.short) if self.short.startswith("{") else self.short
        return {"nodes": {node.name: _node_description(node) for node in self.nodes}, "output": self.output}

    def text(self) -> str:
        """The canonical description: ``linear``, or JSON such as ``{"mlp": {...}}``; :func:`parse_network` reads it."""
        return self.short or json.dumps(self.description())


def _node_description(node: Node) -> dict[str, Any]:
    known = OPS[node.use].options
    given = {key: value for key, value in node.options if known[key].required or value != known[key].default}
    return {"use": node.use, "in": node.inputs[0] if len(node.inputs) == 1 else list(node.inputs), **given}
