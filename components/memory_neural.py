"""The neural memory: a network whose weights are trained while the model reads (arXiv 2501.00663, section 3).

Several timings of one state: ``write`` gives keys and values; ``ask`` is answered by ``recall`` with the weights of the
token itself; ``opening`` is answered by ``recalled`` with the weights from before the segment, which breaks feedback loops.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_graph.errors import MissingInput, SegmentProblem, UsageError, WrongType
from titans_graph.kernels import native_convolution
from titans_graph.kernels.convolution import by_heads, near_identity, short_convolution
from titans_graph.kernels.memory import memory_read, memory_scan, memory_step
from titans_graph.kernels.memory_crowding import crowding, step_cap
from titans_graph.kernels.memory_decode import decode_kernel
from titans_graph.kernels.memory_lazy import lazy_step
from titans_graph.kernels.memory_objectives import ObjectiveError, parse_objective
from titans_graph.kernels.memory_ops import form_of
from titans_graph.kernels.memory_prebuild import kinds, prebuild
from titans_graph.kernels.memory_state import free_names, lazy_of, listed, named, named_ring, opening_weights, settled, stepping
from titans_graph.kernels.networks import NetworkError, parse_network
from titans_graph.kernels.precision import running
from titans_graph.kernels.timeline import extend, last
from titans_graph.registry import Component, Port, Site, SiteError, parameter
from titans_graph.shapes import Clock, Dependence, Stage, Value, stream

State = Mapping[str, Tensor]


class NeuralMemory(Component, nn.Module):
    """``S_t = eta_t S_(t-1) - theta_t grad l(M_chunk; x_t)``, ``M_t = (1 - alpha_t) M_(t-1) + S_t`` (eq. 8-14, 16).

    Per head and batch row, with ``theta``, ``eta``, ``alpha`` from the token; keys and queries of unit length after a
    depthwise convolution and SiLU (section 4.4). The step is bounded (``cap``): gradients of a whole chunk are taken at
    its first weights, so the step that is stable (for l2) shrinks with the chunk and with 1 / (1 - momentum); unbounded,
    the popular settings diverge at initialisation. The bound reads only the configured chunk and maximum momentum, the
    chunk's first weights, and keys at or before the token, so that it is causal and the same in streaming.
    """

    @dataclass(frozen=True)
    class Parameters:
        """The memory's network, its update rule, and the projections around it."""

        heads: int = parameter(4, doc="memories side by side", reason="heads of 32-64 keep the state small", minimum=1)
        head_dim: int | None = parameter(
            None, doc="key size of a head; null = dim / heads", reason="as in attention", minimum=1
        )
        network: str | Mapping[str, Any] = parameter(
            '{"mlp": {"depth": 2}}',
            doc="the network that is trained: linear, {mlp: {depth, hidden, activation, residual, norm, output_norm, bias}}, "
            "{swiglu: {hidden}}, {lowrank: {rank}}, or a graph {nodes: {name: {use, in, ...}}, output} (see memory.md)",
            reason="the paper finds depth 2 and more better than 1 (figure 7)",
        )
        objective: str | Mapping[str, Any] = parameter(
            "l2", doc="l2, dot, {huber: {delta}}, {lp: {p}}, or one of register_objective", reason="equation 12"
        )
        chunk: int = parameter(
            64,
            doc="tokens that share the weights at which gradients are taken; part of the model, not a speed knob",
            reason="64 keeps the chunk's matrices square with heads of 64",
            minimum=1,
            maximum=4096,
        )
        read: str = parameter(
            "after",
            doc="weights that answer `ask`: after the token's own write, before it, or the chunk's first",
            reason="equation 15 reads M after the update; `after` is causal because only earlier tokens and itself wrote",
            choices=("after", "before", "chunk"),
        )
        momentum: bool = parameter(True, doc="past surprise carries on (eta)", reason="equation 10; +2 perplexity without")
        forget: bool = parameter(True, doc="weights decay (alpha)", reason="equation 13; +2 perplexity without")
        max_momentum: float = parameter(
            0.9,
            doc="eta = max_momentum * sigmoid(.)",
            reason="the paper gives no bound; the stable step shrinks with 1 - max_momentum",
            minimum=0.0,
            maximum=0.99,
        )
        max_step: float = parameter(
            1.0,
            doc="theta = max_step * sigmoid(.), times the cap where there is one",
            reason="the paper gives no bound; 1 reaches the cap",
            minimum=0.0,
        )
        cap: str = parameter(
            "keys",
            doc="keys: the step is bounded by what is stable for l2, the chunk's keys and weights; none: used as it is",
            reason="unbounded steps diverge at chunk 64 (a linear map with eigenvalue C theta / (1 - eta))",
            choices=("keys", "none"),
        )
        conv: int = parameter(
            4, doc="taps of the convolution on q, k and v; 0 = none", reason="section 4.4, tap count as in Mamba", minimum=0
        )
        output_gate: bool = parameter(True, doc="sigmoid gate before the output projection", reason="section 4.4")
        forget_bias: float = parameter(
            6.0, doc="1 - alpha starts near sigmoid(this)", reason="0.9975 a token: a memory of some 400 tokens to start with"
        )
        kernel: str = parameter(
            "auto",
            doc="which implementation computes the memory; auto = triton on a GPU where there is such a kernel, else chunk",
            reason="chunk runs everywhere; reference is the token-by-token truth, slow and never compiled",
            choices=("auto", "triton", "chunk", "reference"),
        )

        def __post_init__(self) -> None:
            if self.conv == 1:
                raise SiteError("parameter 'conv' must be 0 (none) or at least 2", kind=WrongType, key="conv")
            if not self.momentum and self.max_momentum != 0.9:
                raise SiteError("'max_momentum' has no effect without momentum", kind=WrongType, key="max_momentum")
            if not self.forget and self.forget_bias != 6.0:
                raise SiteError("'forget_bias' has no effect without forget", kind=WrongType, key="forget_bias")
            for key in ("network", "objective"):
                value = getattr(self, key)
                object.__setattr__(self, key, value if isinstance(value, str) else json.dumps(value))
            _canonical(self)

    inputs = (
        Port("write", "what is memorised: keys, values and gates come from here"),
        Port("ask", "what `recall` answers; `write` where not connected", required=False),
        Port("opening", "what `recalled` answers, with the weights from before the segment", required=False),
    )
    outputs = (
        Port("recall", "the answer to `ask`, with the weights of the token"),
        Port("recalled", "the answer to `opening`, with the weights from before the segment"),
    )
    stateful = True
    partial = True
    precise = ("anchor.", "weights.", "momenta.", "opening.", "ring.")
    default_kernel = "by device"

    @classmethod
    def infer(cls, site: Site) -> dict[str, Value]:
        """Streams of the inputs' common feature size."""
        dims = {port: site.features(port) for port in site.inputs}
        if len(set(dims.values())) > 1:
            raise SiteError("inputs of a memory differ in their feature size")
        if not dims:
            raise SiteError("a memory needs its input 'write'", kind=MissingInput)
        dim = next(iter(dims.values()))
        p = site.parameters
        if p.head_dim is None and dim % p.heads:
            raise SiteError(f"heads {p.heads} do not divide the feature size {dim}", key="heads", kind=WrongType)
        cls._check(p, p.head_dim or dim // p.heads)
        if site.connected("opening") and site.segment is None:
            raise SiteError(
                "'opening' needs an enclosing segment: it reads the weights from before it",
                kind=SegmentProblem,
                key="opening",
                help="give the block a segment",
            )
        if site.segment is not None and site.segment % p.chunk:
            raise SiteError(
                f"segment {site.segment} is not a multiple of chunk {p.chunk}",
                kind=SegmentProblem,
                key="chunk",
                help="choose a chunk that divides the segment",
            )
        if "recalled" in site.used and "opening" not in site.inputs:
            raise SiteError("'recalled' is read, but 'opening' is not connected", kind=MissingInput)
        return {"recall": stream(dim, "recall"), "recalled": stream(dim, "recalled")}

    @staticmethod
    def _check(p: Any, size: int) -> None:
        """Network and objective go with keys of ``size``."""
        try:
            parse_network(p.network).weights(size)
            parse_objective(p.objective).check(size)
        except (NetworkError, ObjectiveError) as error:
            key = "network" if isinstance(error, NetworkError) else "objective"
            raise SiteError(f"for keys of size {size}: {error}", kind=WrongType, key="/".join((key, *error.path))) from error

    @classmethod
    def dependences(cls, site: Site) -> tuple[Dependence, ...]:
        """Reading is pointwise in the question (a window with convolution); writing is causal, or through state."""
        p = site.parameters
        near = ("window", p.conv) if p.conv else ("pointwise", 0)
        own = "ask" if site.connected("ask") else "write"
        found = [Dependence("write", "recall", "causal", 0 if p.read == "after" or own == "write" else 1)]
        if own == "ask":
            found.append(Dependence("ask", "recall", *near))
        if site.connected("opening"):
            found += [Dependence("opening", "recalled", *near), Dependence("write", "recalled", "state")]
        return tuple(found)

    @classmethod
    def stages(cls, site: Site) -> tuple[Stage, ...]:
        """``open`` reads with the weights from before the segment, ``advance`` writes and reads on."""
        ports = tuple(p.name for p in cls.inputs if site.connected(p.name))
        if not site.connected("opening"):
            return (Stage("advance", ports, ("recall",), updates=True),)
        return (Stage("open", ("opening",), ("recalled",)), Stage("advance", ports, ("recall",), updates=True))

    @classmethod
    def periods(cls, site: Site) -> tuple[int, ...]:
        """The chunk."""
        return (int(site.parameters.chunk),)

    @classmethod
    def flops(cls, site: Site) -> float:
        """Projections, and ``12 P - 2 P1 + 2 C io + 2 C^2`` per head for the chunk-parallel update and reading."""
        p, dim = site.parameters, site.features("write")
        size = p.head_dim or dim // p.heads
        network = parse_network(p.network)
        known = network.weights(size)
        shapes = [known[name] for name in network.uses(size) if len(known[name]) == 2]
        total, io = sum(a * b for a, b in shapes), sum(a + b for a, b in shapes)
        first = math.prod(shapes[0]) if shapes else 0
        head = 12 * total - 2 * first + 2 * p.chunk * io + 2 * p.chunk**2
        reads = 2 if site.connected("opening") else 1
        projections = 2 * dim * (p.heads * size * (2 + reads * (2 + p.output_gate)) + 3 * p.heads)
        return float(p.heads * (head + (reads - 1) * 2 * total) + projections)

    def __init__(self, site: Site) -> None:
        super().__init__()
        p = self.p = site.parameters
        self.kernel = {"by device": "auto", "chunk": "portable"}.get(p.kernel, p.kernel)
        self.compiles = p.kernel != "reference"  # a loop over tokens: tracing it would write out every token
        self.dim = dim = site.features("write")
        self.size = p.head_dim or dim // p.heads
        inner = p.heads * self.size
        self.opens, self.segment = site.connected("opening"), site.segment or p.chunk
        self.query, self.key, self.value = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.output = nn.Linear(inner, dim, bias=False)
        self.norm = nn.Parameter(torch.ones(inner))
        self.gate = nn.Linear(dim, inner, bias=False) if p.output_gate else None
        self.controls = nn.Linear(dim, p.heads * (1 + p.momentum + p.forget))
        self.taps = nn.ParameterDict({s: near_identity(inner, p.conv) for s in ("query", "key", "value")} if p.conv else {})
        self.curvature = parse_objective(p.objective).curvature
        self.log_momentum = math.log(p.max_momentum) if p.max_momentum else -math.inf
        network = parse_network(p.network)
        self.names = free_names(list(shapes := network.weights(self.size)))
        starts = [torch.stack([network.initialise(n, shape) for _ in range(p.heads)]) for n, shape in shapes.items()]
        self.initial = nn.ParameterDict({n: nn.Parameter(start) for n, start in zip(self.names, starts, strict=True)})
        self._start(dim)

    def _start(self, dim: int) -> None:
        """Gates start almost constant: step half open, momentum half its maximum, forgetting slow."""
        with torch.no_grad():
            self.controls.weight.mul_(0.1)
            self.controls.bias.zero_()
            if self.p.forget:
                self.controls.bias[-self.p.heads :] = self.p.forget_bias

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        """Per weight: ``anchor`` (chunk-start), ``weights`` M and ``momenta`` S ``[B, H, *shape]``, ``opening``
        (segment-start) where something opens; the chunk's keys; a convolution tail per stream."""
        state: dict[str, Tensor] = {}
        for name in self.names:
            start = running(self.initial[name].detach()).expand(batch, *self.initial[name].shape)
            for kind in ("anchor", "weights", *(("opening",) if self.opens else ())):
                state[f"{kind}.{name}"] = start.clone()
            state[f"momenta.{name}"] = torch.zeros_like(start)
        zeros = self.norm.new_zeros
        if self.p.cap == "keys":
            state["keys"] = zeros(batch, self.p.chunk, self.p.heads, self.size)
        if self.p.conv:
            state |= {f"tail.{s}": zeros(batch, self.p.conv - 1, self.norm.shape[0]) for s in ("query", "key", "value")}
            if self.opens:
                state["tail.opening"] = zeros(batch, self.p.conv - 1, self.dim)
        return state

    def stepping(self, state: State, position: Tensor) -> State:
        """With a ring of the last tokens' updates; weights are written when it is full (``kernel: reference``: as it is)."""
        if (p := self.p).kernel == "reference":
            return state
        form = p.network, self.names, p.chunk, self.segment, p.cap == "keys"
        return stepping(*form, state, self._first_weights(), position, self._decodes(state), self.norm.dtype)

    def settled(self, state: State) -> State:
        """Without the ring."""
        return settled(self.p.network, self.names, state, self._decodes(state))

    def _decodes(self, state: State) -> str:
        """What reads single tokens with a ring: ``triton`` or ``portable``."""
        p, w = self.p, state[f"weights.{self.names[0]}"]
        found: str = decode_kernel(self.kernel, p.network, p.objective, p.read, self.size, w.dtype, w.device.type)
        return found

    def prebuild(self, batch: int, training: bool) -> None:
        """Begin to build the bodies of the chunks."""
        p, weight = self.p, self.norm
        if weight.device.type == "cpu" and p.kernel in ("by device", "chunk"):
            form = form_of(p.network, p.objective, p.read, p.cap == "keys")
            if p.conv:
                native_convolution.prepare()
            needed = kinds(training=training, several=not self.opens or self.segment > p.chunk)
            prebuild(form, needed, batch * p.heads, p.chunk, self.size, running(weight).dtype)

    def forward(
        self,
        write: Tensor | None = None,
        ask: Tensor | None = None,
        opening: Tensor | None = None,
        *,
        state: State,
        clock: Clock,
        stage: str = "advance",
    ) -> Any:
        """``open``: opening ``[B, G, dim]`` -> ``[B, G, dim]``; ``advance``: (``[B, G, dim]``, new state)."""
        if stage == "open":
            assert opening is not None
            return self._open(opening, state, clock)
        assert write is not None
        return self._advance(write, write if ask is None else ask, opening, state, clock)

    def _open(self, opening: Tensor, state: State, clock: Clock) -> Tensor:
        tail = self.query(state["tail.opening"]) if self.p.conv else None
        q, _ = self._convolved("query", self.query(opening), tail, clock)
        weights = self._opening_weights(state, clock)
        return self._finish(memory_read(self.p.network, weights, q), opening)

    def _advance(self, write: Tensor, ask: Tensor, opening: Tensor | None, state: State, clock: Clock) -> Any:
        new: dict[str, Tensor] = {}
        q = self._stream("query", self.query(ask), state, new, clock)
        k = self._stream("key", self.key(write), state, new, clock)
        v = self._stream("value", self.value(write), state, new, clock)
        step, log_momentum, log_keep = self._controls(write)
        if self.p.cap == "keys":
            r, new["keys"] = crowding(k, state["keys"], clock.valid, clock.position, clock.lead, clock.end)
            step = step * step_cap(r, self.p.max_momentum if self.p.momentum else 0.0, self.curvature)
        y, after = self._scan(q, k, v, step, log_momentum, log_keep, state, clock)
        new |= after
        if opening is not None and "ring.shares" not in state:
            opened = self._opening_weights(state, clock)
            new |= {f"opening.{n}": w for n, w in zip(self.names, opened, strict=True)}
        if opening is not None and self.p.conv:
            new["tail.opening"] = last(extend(state["tail.opening"], opening, clock.lead), clock.end, self.p.conv - 1)
        return self._finish(y, ask), new

    def _scan(
        self, q: Tensor, k: Tensor, v: Tensor, step: Tensor, log_momentum: Tensor, log_keep: Tensor, state: State, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        p, batch = self.p, q.shape[0]
        form, tokens = (p.network, p.objective, p.read), (q, k, v, step, log_momentum, log_keep)
        lazy = lazy_of(state, self.names)
        if lazy is not None:
            y, lazy = lazy_step(*form, p.cap == "keys", lazy, *tokens, kernel=self._decodes(state))
            return y, named_ring(lazy)
        start = [w.expand(batch, *w.shape) for w in self._first_weights()]
        rest = [torch.zeros_like(w) for w in start]
        given = (*form, p.chunk, p.cap == "keys", *listed(state, self.names), start, rest, *tokens, clock.valid, clock.position)
        y, *ends = memory_step(*given) if q.shape[2] == 1 else memory_scan(*given, kernel=self.kernel)
        return y, named(self.names, *ends)

    def _opening_weights(self, state: State, clock: Clock) -> list[Tensor]:
        return opening_weights(self.names, self.segment, state, self._first_weights(), clock.valid, clock.position)

    def _first_weights(self) -> list[Tensor]:
        return [running(self.initial[n]) for n in self.names]

    def _stream(self, name: str, x: Tensor, state: State, new: dict[str, Tensor], clock: Clock) -> Tensor:
        y, tail = self._convolved(name, x, state.get(f"tail.{name}"), clock)
        if tail is not None:
            new[f"tail.{name}"] = tail
        return y

    def _convolved(self, name: str, x: Tensor, tail: Tensor | None, clock: Clock) -> tuple[Tensor, Tensor | None]:
        """Convolution, SiLU, and for queries and keys unit norm: ``[B, G, H * d]`` -> ``[B, H, G, d]`` and the new tail."""
        heads, unit = self.p.heads, name != "value"
        if tail is None:
            return by_heads(x, heads, activated=True, unit=unit), None
        return short_convolution(x, tail, self.taps[name], None, clock, heads=heads, activated=True, unit=unit)

    def _controls(self, write: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``theta``, ``log eta`` and ``log (1 - alpha)``, each ``[B, H, G]``."""
        parts = torch.unflatten(running(self.controls(write)), -1, (-1, self.p.heads)).movedim(1, -1).unbind(1)
        step = self.p.max_step * parts[0].sigmoid()
        log_momentum = torch.full_like(step, -torch.inf)
        if self.p.momentum:
            log_momentum = F.logsigmoid(parts[1]) + self.log_momentum
        log_keep = F.logsigmoid(parts[-1]) if self.p.forget else torch.zeros_like(step)
        return step, log_momentum, log_keep

    def _finish(self, y: Tensor, source: Tensor) -> Tensor:
        """Normalise, gate, project: ``[B, H, G, d]`` -> ``[B, G, dim]`` (section 4.4)."""
        y = F.rms_norm(y.transpose(1, 2), (self.size,), eps=1e-6).flatten(2) * self.norm
        if self.gate is not None:
            y = y * self.gate(source).sigmoid()
        out: Tensor = self.output(y)
        return out


def _canonical(p: Any) -> None:
    """Write network and objective in their canonical form; a SiteError where they cannot be understood."""
    for key, parse in (("network", parse_network), ("objective", parse_objective)):
        try:
            object.__setattr__(p, key, parse(getattr(p, key)).text())
        except UsageError as error:
            place = "/".join((key, *getattr(error, "path", ())))
            raise SiteError(str(error), kind=WrongType, key=place) from error
