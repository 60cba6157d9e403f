"""The doctor: what the memories of a model do while it reads, and which node gave the first NaN. Part of the runtime.

It looks on through module hooks on the eager program, and takes gates, keys and weights from the memory's own methods,
chunk by chunk; nothing that the model computes is changed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from titans_graph.components.memory_neural import NeuralMemory
from titans_graph.errors import UsageError
from titans_graph.ir import Ref
from titans_graph.kernels.memory_bound import bounded_step
from titans_graph.kernels.memory_crowding import crowding, step_cap
from titans_graph.kernels.memory_objectives import parse_objective
from titans_graph.kernels.networks import NetworkError, PlainUse, parse_network
from titans_graph.runtime.findings import Examination, Head, Memory, NotFinite, Spread
from titans_graph.runtime.layout import pieces
from titans_graph.runtime.model import Model
from titans_graph.runtime.runner import Eager
from titans_graph.shapes import Clock

TOKENS_AT_ONCE = 64
"""Tokens whose gradients by all fast weights are held at the same time."""


def doctor(model: Model, x: Tensor) -> Examination:
    """Let a model read ``x`` (ids ``[B, T]`` or ``[B, T, dim]``) from a fresh state, and report what its memories did.

    A model without memories gets the check for NaN and infinity alone. Raises InputError where x does not fit the model,
    UsageError where it is empty.
    """
    model._check_input(x, None)
    if x.numel() == 0:
        raise UsageError("there is nothing to read: give at least one row and one token")
    look = _Look(model, x.shape[1])
    with torch.no_grad(), look.hooked():
        look.eager()(x)
    parameters = tuple(n for n, t in model.named_parameters() if not bool(t.isfinite().all()))
    given = _first(x, x.shape[1]) if x.is_floating_point() else None
    return Examination(
        model=model.name,
        rows=x.shape[0],
        tokens=x.shape[1],
        parameters=parameters,
        input=given,
        first=look.first,
        memories=tuple(log.result() for log in look.logs.values()),
    )


def sample(model: Model, rows: int, tokens: int, seed: int = 0) -> Tensor:
    """Something to read: a stream of normal numbers ``[B, T, dim]``, or ids ``[B, T]`` of a made-up text of few words."""
    g = torch.Generator().manual_seed(seed)
    (kind,) = model.compilation.inputs.values()
    if kind.dim is not None:
        reference = next(model.parameters(), torch.zeros(()))
        return torch.randn(rows, tokens, kind.dim, generator=g).to(reference)
    vocabulary = model._vocabulary() or 2
    low, letters, gap = (97, 26, 32) if vocabulary > 122 else (min(1, vocabulary - 1), max(1, vocabulary - 1), 0)
    words = [low + torch.randint(letters, (1 + n % 8,), generator=g) for n in range(256)]
    often = 1.0 / torch.arange(1, 257)
    text = []
    for _ in range(rows):
        drawn = torch.multinomial(often, tokens, replacement=True, generator=g).tolist()
        text.append(torch.cat([part for w in drawn for part in (words[w], torch.tensor([gap]))])[:tokens])
    return torch.stack(text).to(model.device)


class _Look:
    """Hooks on all components of a model for one call, and what they saw."""

    def __init__(self, model: Model, tokens: int) -> None:
        self.model, self.tokens = model, tokens
        self.c = model.compilation
        self.first: NotFinite | None = None
        self.read: dict[tuple[str, str], int] = {}
        """Slots that a stage of a node has read so far: a loop calls it once a segment."""
        modules = {name: model.body.get_submodule(name) for name in self.c.nodes}
        self.logs = {name: _Log(name, m) for name, m in modules.items() if isinstance(m, NeuralMemory)}

    def eager(self) -> Model:
        """The model, sharing everything, with the eager program: in compiled code no hook would be called."""
        twin = Model.__new__(Model)
        twin.__dict__ = {**self.model.__dict__, "_runner": Eager(self.c.lowered)}
        return twin

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While entered, every component's call is looked at."""
        handles = []
        for name in self.c.nodes:
            module = self.model.body.get_submodule(name)
            handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        mine = threading.get_ident()

        def hook(module: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any], result: Any) -> None:
            if threading.get_ident() == mine:  # others may use the model meanwhile
                self._see(name, given, result)

        return hook

    def _see(self, name: str, given: Mapping[str, Any], result: Any) -> None:
        """One call of one node: its outputs, and a memory's writes."""
        stages = {s.name: s for s in self.c.stages(name)}
        stage = stages[given["stage"]] if "stage" in given else next(iter(stages.values()))
        outputs, state = result if stage.updates else (result, {})
        before = self.read.get((name, stage.name), 0)
        values = (outputs,) if len(stage.outputs) == 1 else outputs
        slots = 0
        for port, value in zip(stage.outputs, values, strict=True):
            slots = max(slots, self._check(name, port, value, before))
        self.read[name, stage.name] = before + slots
        for key, tensor in state.items():
            if self.first is None and not bool(tensor.isfinite().all()):
                last = min(before + slots, self.tokens) - 1
                self.first = NotFinite(name, f"state {key}", last)
        if stage.updates and name in self.logs:
            self.logs[name].write(given)

    def _check(self, name: str, port: str, value: Any, before: int) -> int:
        """Note the first NaN or infinity of an output; the number of its slots (0 where it belongs to no token)."""
        kind = self.c.types[Ref(name, port)]
        parts = (value,) if len(kind.pieces) == 1 else value
        slots = 0
        for piece, tensor in zip(kind.pieces, parts, strict=True):
            if not piece.timed:
                if self.first is None and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    self.first = NotFinite(name, port, None)
                continue
            slots = tensor.shape[1]
            # The state was fresh, so slot t holds token t; slots past the last token hold anything.
            at = _first(tensor, self.tokens - before) if tensor.is_floating_point() else None
            if self.first is None and at is not None:
                self.first = NotFinite(name, port, before + at, self._until(name, port, before + at))
        return slots

    def _until(self, name: str, port: str, at: int) -> int | None:
        """The last token of the chunk that a memory answers as one: one bad token spoils those before it too.

        A memory's masked products multiply what a token does not see by 0, and 0 * inf is NaN. A chunk whose first tokens
        are finite was not spoiled, and ``recalled`` has no such products: None, the token itself is meant.
        """
        chunk = self.logs[name].memory.p.chunk if name in self.logs and port == "recall" else 1
        until: int = min(at + chunk, self.tokens) - 1
        return until if at % chunk == 0 and until > at else None


def _first(x: Tensor, tokens: int) -> int | None:
    """The first of ``tokens`` slots of ``[B, G, ...]`` that holds a NaN or infinity in any row."""
    bad = ~x[:, : max(tokens, 0)].isfinite().flatten(2).all(2).all(0)
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


class _Log:
    """What one memory did, token by token and chunk by chunk; heads last, ``[n, H]`` each."""

    def __init__(self, name: str, memory: NeuralMemory) -> None:
        self.name, self.memory = name, memory
        self.network, self.objective = parse_network(memory.p.network), parse_objective(memory.p.objective)
        self.tokens: dict[str, list[Tensor]] = {}
        self.chunks: dict[str, list[Tensor]] = {}
        self.start: dict[str, Tensor] = {}
        self.end: dict[str, Tensor] = {}

    def write(self, given: Mapping[str, Any]) -> None:
        """One ``advance`` of the memory, read again a chunk at a time."""
        size, clock = self.memory.p.chunk, given["clock"]
        write, state = given["write"], dict(given["state"])
        last = int(clock.end.max())
        parts = [clock] if write.shape[1] == 1 else pieces(clock, size, last)
        for n, part in enumerate(parts):
            if not bool(part.valid.any()):
                continue
            x = write[:, n * size : (n + 1) * size]
            # Its own forward, not a call: hooks look at what the model does, and the answers to questions do not matter.
            _, new = self.memory.forward(write=x, state=state, clock=part)
            state_after = {**state, **new}
            self._note(x, state, self.memory.settled(state_after), part)
            state = state_after

    def _note(self, x: Tensor, state: Mapping[str, Tensor], new: Mapping[str, Tensor], clock: Clock) -> None:
        memory, p = self.memory, self.memory.p
        k, v = (memory._stream(s, getattr(memory, s)(x), state, {}, clock) for s in ("key", "value"))
        asked, log_momentum, log_keep = memory._controls(x)
        ring = k.new_zeros(k.shape[0], p.chunk, p.heads, memory.size)  # chunks are read whole: nothing is left of them
        r, _ = crowding(k, ring, clock.valid, clock.position, clock.lead, clock.end)
        anchor = {n: new[f"anchor.{n}"] for n in memory.names}
        limit = self._bounded(anchor, k, step_cap(r, p.max_momentum if p.momentum else 0.0, memory.curvature))
        step = asked * limit if p.cap == "keys" else asked
        surprise = self._surprise(anchor, k, v)
        stable = torch.full_like(limit, torch.nan) if memory.curvature is None else limit
        seen = {"asked": asked, "step": step, "limit": stable, "momentum": log_momentum.exp(), "keep": log_keep.exp()}
        for key, value in {**seen, "surprise": surprise, "crowding": r}.items():
            self.tokens.setdefault(key, []).append(value.movedim(1, -1)[clock.valid].double().cpu())
        for n in memory.names:
            after, before = new[f"weights.{n}"].double(), anchor[n].double()
            self.chunks.setdefault(n, []).append(_norm(after - before))
            self.start.setdefault(n, _norm(before))
            self.end[n] = _norm(after)

    def _bounded(self, anchor: Mapping[str, Tensor], k: Tensor, cap: Tensor) -> Tensor:
        """The cap ``[B, H, G]`` divided by the network's curvature; infinite where no bound of it is known."""
        flat = {n: w.flatten(0, 1) for n, w in anchor.items()}
        try:
            return bounded_step(self.network, flat, k.flatten(0, 1), cap.flatten(0, 1)).view_as(cap)
        except NetworkError:
            return torch.full_like(cap, torch.inf)

    def _surprise(self, anchor: Mapping[str, Tensor], k: Tensor, v: Tensor) -> Tensor:
        """The norm over all fast weights of each token's gradient at the chunk's first weights, ``[B, H, G]``."""

        def of_token(k: Tensor, v: Tensor) -> Tensor:
            def loss(weights: dict[str, Tensor]) -> Tensor:
                return self.objective.loss(self.network.apply(k.unsqueeze(-2), PlainUse(weights)), v.unsqueeze(-2))

            gradient = torch.func.grad(loss)(dict(anchor))
            return torch.stack([g.flatten(2).square().sum(-1) for g in gradient.values()]).sum(0).sqrt()

        dtype = next(iter(anchor.values())).dtype
        every: Tensor = torch.func.vmap(of_token, 2, 2, chunk_size=TOKENS_AT_ONCE)(k.to(dtype), v.to(dtype))
        return every

    def result(self) -> Memory:
        """What was seen, head by head."""
        p = self.memory.p
        heads = tuple(self._head(h) for h in range(p.heads))
        return Memory(self.name, p.network, p.objective, p.chunk, p.cap, self.memory.curvature, heads)

    def _head(self, h: int) -> Head:
        tokens = {key: torch.cat(values)[:, h] for key, values in self.tokens.items()}
        above = tokens["step"] > tokens["limit"] * (1 + 1e-4)
        return Head(
            head=h,
            **{key: Spread.of(values) for key, values in tokens.items()},
            writes={n: Spread.of(torch.cat(values)[:, h]) for n, values in self.chunks.items()},
            start={n: float(x[:, h].max()) for n, x in self.start.items()},
            end={n: float(x[:, h].max()) for n, x in self.end.items()},
            above=int(above.sum()),
        )


def _norm(x: Tensor) -> Tensor:
    """Frobenius norms of ``[B, H, *shape]``: ``[B, H]``."""
    length: Tensor = torch.linalg.vector_norm(x.flatten(2), dim=2).cpu()
    return length
