"""The neural memory at one token, as the equations of arXiv 2501.00663 have it. See naive.py.

Gradients come from autograd on one token, never from a parallel form; the bound on the step is written out anew, from
singular values and by following every path of the network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tests.properties.naive import Place, Value

Weights = dict[str, Tensor]


class Memory:
    """Equations 8-16 for one row: states are remembered by token, and asked for in any order."""

    def __init__(self, place: Place) -> None:
        self.place, self.w = place, place.weights
        self.p: Any = place.parameters
        self.heads: int = self.p.heads
        self.network = Net(self.p.network)
        self.objective = json.loads(self.p.objective) if self.p.objective.startswith("{") else {self.p.objective: {}}
        start = [
            {n.removeprefix("initial."): w[h] for n, w in self.w.items() if n.startswith("initial.")} for h in range(self.heads)
        ]
        self.states: dict[int, tuple[list[Weights], list[Weights]]] = {
            -1: (start, [{n: torch.zeros_like(w) for n, w in head.items()} for head in start])
        }
        self.streams: dict[tuple[str, str, int], Tensor] = {}

    def out(self, port: str, t: int) -> Value:
        """``recall``: the answer to ``ask`` with the weights of the token; ``recalled``: to ``opening``, of the segment."""
        from tests.properties.naive import Piece

        if port == "recalled":
            assert self.place.segment is not None
            return (Piece("", True, self.answer(self.weights(t - t % self.place.segment - 1), "opening", t)),)
        ask = "ask" if "ask" in self.place.ports else "write"
        moment = {"after": t, "before": t - 1, "chunk": t - t % self.p.chunk - 1}[self.p.read]
        return (Piece("", True, self.answer(self.weights(moment), ask, t)),)

    def weights(self, t: int) -> list[Weights]:
        """M after token t, for every head."""
        return self.state(t)[0]

    def answer(self, weights: list[Weights], port: str, t: int) -> Tensor:
        """``M(q)`` (eq. 15), then norm, gate and output projection (section 4.4)."""
        q = F.normalize(self.project("query", port, t), dim=-1)
        y = torch.stack([self.network(head, q[h]) for h, head in enumerate(weights)])
        y = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(-1) * self.w["norm"]
        if self.p.output_gate:
            y = y * (self.place.stream(port, t) @ self.w["gate.weight"].T).sigmoid()
        return y @ self.w["output.weight"].T

    def project(self, kind: str, port: str, t: int) -> Tensor:
        """A linear map, a depthwise convolution over the tokens so far, SiLU, heads: ``[H, d]`` (section 4.4)."""
        key = (kind, port, t)
        if key not in self.streams:
            near = range(min(max(self.p.conv, 1), t + 1))
            parts = [self.place.stream(port, t - j) @ self.w[f"{kind}.weight"].T for j in near]
            if self.p.conv:
                parts = [self.w[f"taps.{kind}"][:, j] * part for j, part in enumerate(parts)]
            self.streams[key] = F.silu(torch.stack(parts).sum(0)).reshape(self.heads, -1)
        return self.streams[key]

    def key(self, t: int) -> Tensor:
        """Unit keys ``[H, d]``."""
        return F.normalize(self.project("key", "write", t), dim=-1)

    def state(self, t: int) -> tuple[list[Weights], list[Weights]]:
        """M and S after token t: equations 10, 13 and 14, with the gradient at the chunk's first weights (eq. 16)."""
        if t not in self.states:
            before, momenta = self.state(t - 1)
            anchor = self.weights(t - t % self.p.chunk - 1)
            step, momentum, keep = self.controls(t)
            weights, surprises = [], []
            for h in range(self.heads):
                surprise = self.surprise(anchor[h], self.key(t)[h], self.project("value", "write", t)[h])
                theta = step[h] * self.cap(anchor[h], h, t)
                new = {n: momentum[h] * momenta[h][n] - theta * surprise[n] for n in surprise}
                surprises.append(new)
                weights.append({n: keep[h] * before[h][n] + new[n] for n in new})
            self.states[t] = weights, surprises
        return self.states[t]

    def controls(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """theta before its cap, eta and 1 - alpha, each ``[H]``."""
        raw = (self.place.stream("write", t) @ self.w["controls.weight"].T + self.w["controls.bias"]).reshape(-1, self.heads)
        gates = list(raw.sigmoid())
        step = self.p.max_step * gates.pop(0)
        momentum = self.p.max_momentum * gates.pop(0) if self.p.momentum else torch.zeros_like(step)
        return step, momentum, gates.pop(0) if self.p.forget else torch.ones_like(step)

    def cap(self, anchor: Weights, head: int, t: int) -> Tensor | float:
        """What is stable for the chunk's keys and weights; a control, so no gradient flows through it."""
        if self.p.cap == "none":
            return 1.0
        own = self.key(t)[head].detach()
        r = sum((self.key(s)[head].detach() @ own).abs() for s in range(t - t % self.p.chunk, t + 1))
        r = torch.as_tensor(r).clamp(min=1.0)
        most = self.p.max_momentum if self.p.momentum else 0.0
        return (1 - most) / (3 * r * (1 + r.log())) / self.network.bound({n: w.detach() for n, w in anchor.items()}, own)

    def surprise(self, anchor: Weights, k: Tensor, v: Tensor) -> Weights:
        """The gradient of the loss (eq. 12) by the weights alone: k and v may depend on earlier reads of the same ones."""
        at = {n: w.clone() for n, w in anchor.items()}
        if not any(w.requires_grad for w in at.values()):
            at = {n: w.requires_grad_() for n, w in at.items()}
        with torch.enable_grad():
            loss = self.loss(self.network(at, k), v)
            grads = torch.autograd.grad(loss, list(at.values()), create_graph=True, allow_unused=True, materialize_grads=True)
        return dict(zip(at, grads, strict=True))

    def loss(self, y: Tensor, v: Tensor) -> Tensor:
        """One token's loss."""
        ((name, options),) = self.objective.items()
        e = y - v
        if name == "l2":
            return e.square().sum()
        if name == "dot":
            return -(y * v).sum()
        if name == "lp":
            return e.abs().pow(options["p"]).sum()
        delta = options["delta"]
        return torch.where(e.abs() <= delta, e.square() / 2, delta * (e.abs() - delta / 2)).sum()


class Net:
    """A memory network from its description: a graph of operations, short names written out."""

    def __init__(self, description: str) -> None:
        found: Any = json.loads(description) if description.startswith(("{", '"')) else description
        nodes, output = written_out({found: {}} if isinstance(found, str) else found)
        self.nodes: dict[str, dict[str, Any]] = nodes
        self.output: str = output
        self.chunks: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def __call__(self, weights: Weights, x: Tensor) -> Tensor:
        """The output for one input ``[d]``."""
        return self.values(weights, x)[self.output]

    def inputs(self, name: str) -> list[str]:
        """What a node reads: as written, else the node before it."""
        given = self.nodes[name].get("in")
        if given is None:
            return [(["x", *self.nodes])[list(self.nodes).index(name)]]
        return [given] if isinstance(given, str) else list(given)

    def fast(self, name: str) -> str:
        """The name of a node's fast weight."""
        return str(self.nodes[name].get("weight") or name)

    def values(self, weights: Weights, x: Tensor) -> dict[str, Tensor]:
        """Every node's value; a node is computed when something asks for it."""
        found = {"x": x}

        def value(name: str) -> Tensor:
            if name not in found:
                found[name] = self.apply(name, weights, [value(n) for n in self.inputs(name)])
            return found[name]

        value(self.output)
        return found

    def apply(self, name: str, weights: Weights, u: list[Tensor]) -> Any:
        """One operation on vectors."""
        node = self.nodes[name]
        use, a = node["use"], u[0]
        if use in ("norm.rms", "norm.layer"):
            a = a - a.mean() if use == "norm.layer" else a
            return a / (a.square().mean() + node.get("eps", 1e-6)).sqrt()
        if use.startswith("fast."):
            w = tensor(weights, self.fast(name))
            return {"fast.linear": lambda: (a[:, None] * w).sum(0), "fast.bias": lambda: a + w, "fast.gain": lambda: a * w}[
                use
            ]()
        if use == "residual":
            return a + u[1] if a.shape == u[1].shape else u[1]
        if use in ("add", "product"):
            for other in u[1:]:
                a = a + other if use == "add" else a * other
            return a
        if use == "scale":
            return a * node["by"]
        activations: dict[str, Callable[[], Tensor]] = {
            "silu": lambda: a / (1 + (-a).exp()),
            "gelu": lambda: a * (1 + torch.erf(a / math.sqrt(2))) / 2,
            "relu2": lambda: a.clamp(min=0).square(),
            "tanh": lambda: (a.exp() - (-a).exp()) / (a.exp() + (-a).exp()),
            "sigmoid": lambda: 1 / (1 + (-a).exp()),
        }
        return activations[use]()

    def bound(self, weights: Weights, key: Tensor) -> Tensor:
        """An upper bound of the squared length of the output's Jacobian by all fast weights, at least 1.

        Of each fast weight: the sum over its uses of (length that goes in) * (gains along every path to the output).
        """
        values = self.values(weights, key)
        nothing = torch.zeros((), dtype=torch.float64)
        totals: dict[str, Tensor] = {}
        for name in self.nodes:
            if self.nodes[name]["use"].startswith("fast."):
                own = self.length(weights, values, self.inputs(name)[0]) if self.nodes[name]["use"] != "fast.bias" else 1.0
                part = own * self.after(weights, values, name)
                totals[self.fast(name)] = totals.get(self.fast(name), nothing) + part
        return sum((total.square() for total in totals.values()), nothing).clamp(min=1.0)

    def length(self, weights: Weights, values: Mapping[str, Tensor], name: str) -> Any:
        """An upper bound of a value's length for keys of length 1."""
        if name == "x":
            return 1.0
        node, size = self.nodes[name], values[name].shape[0]
        before = [self.length(weights, values, n) for n in self.inputs(name)]
        use, a = node["use"], before[0]
        if use.startswith("fast."):
            norm = measure(use, tensor(weights, self.fast(name)))
            return a + norm if use == "fast.bias" else a * norm
        if use in ("add", "residual"):
            return sum(before)
        if use == "product":
            return math.prod(before)
        lengths: dict[str, Callable[[], Any]] = {
            "norm.rms": lambda: math.sqrt(size),
            "norm.layer": lambda: math.sqrt(size),
            "tanh": lambda: torch.as_tensor(a, dtype=torch.float64).clamp(max=math.sqrt(size)),
            "sigmoid": lambda: torch.as_tensor(a / 4 + math.sqrt(size) / 2, dtype=torch.float64).clamp(max=math.sqrt(size)),
            "relu2": lambda: a * a,
            "scale": lambda: a * abs(node.get("by", 1.0)),
        }
        return lengths.get(use, lambda: a)()

    def after(self, weights: Weights, values: Mapping[str, Tensor], name: str) -> Any:
        """An upper bound of the gain from a node to the output, over all paths."""
        total: Any = 1.0 if name == self.output else 0.0
        for reader in self.nodes:
            for i, source in enumerate(self.inputs(reader)):
                if source == name:
                    total = total + self.gain(weights, values, reader, i) * self.after(weights, values, reader)
        return total

    def gain(self, weights: Weights, values: Mapping[str, Tensor], name: str, index: int) -> Any:
        """An upper bound of how much a node lengthens a change of one of its inputs."""
        node, sources = self.nodes[name], self.inputs(name)
        use = node["use"]
        if use in ("fast.linear", "fast.gain"):
            return measure(use, tensor(weights, self.fast(name)))
        if use in ("norm.rms", "norm.layer"):
            z = values[sources[0]]
            z = z - z.mean() if use == "norm.layer" else z
            return 1 / (z.square().mean() + node.get("eps", 1e-6)).sqrt()
        if use == "product":
            return math.prod(self.length(weights, values, n) for i, n in enumerate(sources) if i != index)
        if use == "relu2":
            return 2 * self.length(weights, values, sources[0])
        if use == "scale":
            return abs(node.get("by", 1.0))
        return {"silu": 1.0999, "gelu": 1.1290, "sigmoid": 0.25}.get(use, 1.0)


def tensor(weights: Weights, name: str) -> Tensor:
    """A fast weight, whose name in the module may end in ``_`` where torch has an attribute of that name."""
    return next(weights[n] for n in (name, name + "_", name + "__") if n in weights)


def measure(use: str, weight: Tensor) -> Tensor:
    """The norm of a fast weight that bounds are made of; of a matrix the 32-norm of its singular values."""
    if use == "fast.linear":
        norm: Tensor = torch.linalg.vector_norm(torch.linalg.svdvals(weight), ord=32)
        return norm
    return weight.abs().amax() if use == "fast.gain" else weight.square().sum().sqrt()


def written_out(description: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Nodes and output of a description; short names as docs/components.md explains them, in sizes-free form."""
    if "nodes" in description:
        nodes = dict(description["nodes"])
        return nodes, str(description.get("output", list(nodes)[-1]))
    ((name, options),) = description.items()
    if name == "linear":
        return {"w": {"use": "fast.linear", "in": "x"}}, "w"
    if name == "lowrank":
        return {"down": {"use": "fast.linear", "in": "x"}, "up": {"use": "fast.linear", "in": "down"}}, "up"
    if name == "swiglu":
        return {
            "gate": {"use": "fast.linear", "in": "x"},
            "up": {"use": "fast.linear", "in": "x"},
            "open": {"use": "silu", "in": "gate"},
            "both": {"use": "product", "in": ["open", "up"]},
            "down": {"use": "fast.linear", "in": "both"},
        }, "down"
    return _mlp(options)


def _mlp(options: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Layers of [norm], matrix, [bias], activation (not after the last), [residual]; then [norm]."""
    nodes: dict[str, Any] = {}
    at = "x"
    for layer in range(1, options["depth"] + 1):
        start = at
        chain = [
            (options.get("norm"), f"n{layer}", "norm.rms"),
            (True, f"w{layer}", "fast.linear"),
            (options.get("bias"), f"b{layer}", "fast.bias"),
            (layer < options["depth"], f"a{layer}", options.get("activation", "silu")),
        ]
        for wanted, name, use in chain:
            if wanted:
                nodes[name] = {"use": use, "in": at}
                at = name
        if options.get("residual"):
            nodes[f"h{layer}"] = {"use": "residual", "in": [start, at]}
            at = f"h{layer}"
    if options.get("output_norm"):
        nodes["y"] = {"use": "norm.rms", "in": at}
        at = "y"
    return nodes, at
