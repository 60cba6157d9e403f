"""The paper's blocks as plain loops over tokens (arXiv 2501.00663), one row, from a model's own parameters.

Independent of passes, schedule, grid, state and kernels: it shares only the bound on the step with them. Written to be read
beside the paper; causal as a language model must be (see docs/paper.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_graph.kernels.memory_bound import step_bound
from titans_graph.kernels.networks import parse_network

Weights = dict[str, Tensor]


def rms(x: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


class Memory:
    """Equations 8-15 for one row: call :meth:`write` once per token, :meth:`read` with the weights of a moment."""

    def __init__(self, component: nn.Module, heads: int, chunk: int, max_momentum: float) -> None:
        self.c, self.heads, self.chunk, self.max_momentum = component, heads, chunk, max_momentum
        self.names = list(component.initial.keys())  # type: ignore[operator,union-attr]
        self.weights: list[Weights] = [{n: component.initial[n][h] for n in self.names} for h in range(heads)]  # type: ignore[index]
        self.momenta: list[Weights] = [{n: torch.zeros_like(w) for n, w in head.items()} for head in self.weights]
        self.anchor = self.weights
        self.keys: list[list[Tensor]] = [[] for _ in range(heads)]
        self.streams: dict[str, list[Tensor]] = {}
        self.count = 0

    def project(self, stream: str, kind: str, x: Tensor) -> Tensor:
        """Linear, causal depthwise convolution over this stream so far, SiLU, heads (section 4.4): ``[H, d]``."""
        seen = self.streams.setdefault(stream, [])
        seen.append(getattr(self.c, kind)(x))
        taps = self.c.taps[kind]  # type: ignore[index]
        mixed = sum(taps[:, j] * seen[-1 - j] for j in range(min(taps.shape[1], len(seen))))
        return F.silu(mixed).reshape(self.heads, -1)  # type: ignore[arg-type]

    def network(self, weights: Weights, x: Tensor) -> Tensor:
        """An MLP of two layers without bias: ``silu(x W1) W2``."""
        return F.silu(x @ weights["w1"]) @ weights["w2"]

    def write(self, x: Tensor) -> None:
        """One token: surprise (eq. 8, 12), momentum (eq. 10), forgetting (eq. 13), gradient at the chunk's start (eq. 16)."""
        if self.count % self.chunk == 0:
            self.anchor, self.keys = self.weights, [[] for _ in range(self.heads)]
        k = F.normalize(self.project("key", "key", x), dim=-1)
        v = self.project("value", "value", x)
        theta, eta, keep = self.c.controls(x).reshape(3, self.heads).sigmoid()  # type: ignore[operator]
        weights, momenta = [], []
        for h in range(self.heads):
            self.keys[h].append(k[h].detach())
            r = sum((o @ k[h].detach()).abs() for o in self.keys[h]).clamp(min=1.0)  # type: ignore[union-attr]
            cap = (1 - self.max_momentum) / (3 * r * (1 + r.log()))
            first = {n: w[None] for n, w in self.anchor[h].items()}
            bound = step_bound(parse_network('{"mlp": {"depth": 2}}'), first, k[h][None, None]).flatten()[0]
            # The gradient is with respect to these weights alone: k and v may depend on earlier reads of the same ones.
            at = {n: w.clone() for n, w in self.anchor[h].items()}
            loss = (self.network(at, k[h]) - v[h]).square().sum()
            gradient = dict(
                zip(self.names, torch.autograd.grad(loss, [at[n] for n in self.names], create_graph=True), strict=True)
            )
            s = {n: self.max_momentum * eta[h] * self.momenta[h][n] - theta[h] * cap / bound * gradient[n] for n in self.names}
            weights.append({n: keep[h] * self.weights[h][n] + s[n] for n in self.names})
            momenta.append(s)
        self.weights, self.momenta = weights, momenta
        self.count += 1

    def read(self, weights: Sequence[Weights], stream: str, x: Tensor) -> Tensor:
        """``M(q)``, then norm, gate and output projection (eq. 15 and section 4.4)."""
        q = F.normalize(self.project(stream, "query", x), dim=-1)
        y = torch.stack([self.network(w, q[h]) for h, w in enumerate(weights)])
        y = rms(y, torch.ones_like(y)).reshape(-1) * self.c.norm  # type: ignore[operator]
        out: Tensor = self.c.output(y * self.c.gate(x).sigmoid())  # type: ignore[operator]
        return out


def rotate(x: Tensor, position: int) -> Tensor:
    half = x.shape[-1] // 2
    angle = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


class Attention:
    """Softmax attention of one query over an explicit list of visible elements."""

    def __init__(self, component: nn.Module, heads: int) -> None:
        self.c, self.heads = component, heads

    def __call__(self, query: Tensor, place: int, visible: Sequence[tuple[Tensor, int | None]]) -> Tensor:
        """``visible``: elements with their positions (None: no position, as for persistent tokens)."""
        q = rotate(self.c.query(query).reshape(self.heads, -1), place)  # type: ignore[operator]
        keys, values = [], []
        for element, position in visible:
            k, v = self.c.key_value(element).reshape(2, self.heads, -1)  # type: ignore[operator]
            keys.append(k if position is None else rotate(k, position))
            values.append(v)
        scores = torch.stack([(q * k).sum(-1) for k in keys]) / math.sqrt(q.shape[-1])
        out = (scores.softmax(0)[..., None] * torch.stack(values)).sum(0)
        projected: Tensor = self.c.project(out.reshape(-1))  # type: ignore[operator]
        return projected


def product_gate(component: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """The gate of section 4.2: both branches normalised with learned vectors, a nonlinearity, their product."""
    return F.silu(rms(a, component.gain_a)) * F.silu(rms(b, component.gain_b))  # type: ignore[arg-type]


def parts(body: nn.Module, sizes: dict[str, int]) -> tuple[Memory, Attention, Tensor]:
    """What all three designs are made of: the memory, attention, and the persistent tokens ``[N_p, dim]``."""
    n = body.get_submodule
    attention = Attention(n("attended"), sizes["heads"])
    return Memory(n("memory"), sizes["heads"], sizes["chunk"], 0.9), attention, next(n("prefix").parameters())


def mac(body: nn.Module, x: Tensor, sizes: dict[str, int]) -> Tensor:
    """Equations 21-25, ``[T, dim]``."""
    n = body.get_submodule
    memory, attention, persistent = parts(body, sizes)
    out: list[Tensor] = []
    h: list[tuple[Tensor, int | None]] = []
    s: list[tuple[Tensor, int | None]] = []
    opening = memory.weights
    for t, token in enumerate(x):
        place = t % sizes["segment"]
        if place == 0:
            opening, h, s = memory.weights, [], []
        normed = rms(token, n("normed").gain)  # type: ignore[arg-type]
        h.append((memory.read(opening, "opening", normed), place))  # eq. 21
        s.append((normed, place))
        context = [(p, None) for p in persistent] + h + s  # eq. 22, causal: nothing of later tokens is in it
        y = attention(normed, place, context)  # eq. 23
        memory.write(y)  # eq. 24
        o = product_gate(n("mixed"), y, memory.read(memory.weights, "ask", y))  # eq. 25
        out.append(token + o)
    return torch.stack(out)


def window(t: int, size: int, seen: list[Tensor], persistent: Tensor) -> list[tuple[Tensor, int | None]]:
    """Persistent tokens and the last ``size`` tokens (section 4.2, figure 3b)."""
    near = range(max(0, t - size + 1), t + 1)
    return [*((p, None) for p in persistent), *((seen[i], i) for i in near)]


def mag(body: nn.Module, x: Tensor, sizes: dict[str, int]) -> Tensor:
    """Equations 26-28, ``[T, dim]``."""
    n = body.get_submodule
    memory, attention, persistent = parts(body, sizes)
    out: list[Tensor] = []
    seen: list[Tensor] = []
    for t, token in enumerate(x):
        seen.append(rms(token, n("normed").gain))  # type: ignore[arg-type]
        y = attention(seen[t], t, window(t, sizes["window"], seen, persistent))  # eq. 27
        memory.write(seen[t])
        out.append(token + product_gate(n("mixed"), y, memory.read(memory.weights, "ask", seen[t])))  # eq. 28
    return torch.stack(out)


def mal(body: nn.Module, x: Tensor, sizes: dict[str, int]) -> Tensor:
    """Equations 29-31, ``[T, dim]``."""
    n = body.get_submodule
    memory, attention, persistent = parts(body, sizes)
    out: list[Tensor] = []
    seen: list[Tensor] = []
    for t, token in enumerate(x):
        normed = rms(token, n("normed").gain)  # type: ignore[arg-type]
        memory.write(normed)
        remembered = token + memory.read(memory.weights, "ask", normed)  # eq. 30
        seen.append(rms(remembered, n("between").gain))  # type: ignore[arg-type]
        out.append(remembered + attention(seen[t], t, window(t, sizes["window"], seen, persistent)))  # eq. 31
    return torch.stack(out)
