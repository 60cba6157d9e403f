"""One neural memory as a function: any length, any split, with its state as a value (arXiv 2501.00663, section 3).

What a component does around it (projections, convolution, step cap, output gate) is left to the caller; the step in
particular is used as given.

Shapes: ``B`` batch, ``H`` heads, ``T`` tokens, ``d`` key and value size; fast weights ``{name: [B, H, *shape]}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

from titans_graph.errors import UsageError
from titans_graph.kernels.memory import check_choices, memory_scan
from titans_graph.kernels.memory_objectives import Objective, parse_objective
from titans_graph.kernels.networks import Network, parse_network
from titans_graph.kernels.precision import running

Named = Mapping[str, Tensor]
Description = str | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class MemoryState:
    """Where a memory stands after some tokens; everything a later call needs to go on exactly.

    ``weights`` M_t and ``momenta`` S_t after the last token, ``anchor``: the weights the current chunk began with, at
    which its gradients are taken; each ``{name: [B, H, *shape]}``. ``phase``: tokens of the current chunk that have been
    read (0: the next token begins one); ``chunk``: its size, None before the first call. A pytree.
    """

    weights: Named
    momenta: Named
    anchor: Named
    phase: int = 0
    chunk: int | None = None

    @classmethod
    def initial(cls, weights: Named, momenta: Named | None = None) -> MemoryState:
        """The state before the first token: ``weights`` M_0, ``{name: [B, H, *shape]}``, and ``momenta`` S_0 (else zero).

        Raises :class:`UsageError` for what is no mapping of tensors, and for momenta of other names or shapes.
        """
        check_named("weights", weights)
        if momenta is None:
            momenta = {name: torch.zeros_like(w) for name, w in weights.items()}
        check_named("momenta", momenta)
        if {n: w.shape for n, w in weights.items()} != {n: s.shape for n, s in momenta.items()}:
            raise UsageError("momenta must have the names and shapes of the weights")
        return cls(dict(weights), dict(momenta), dict(weights))

    def detach(self) -> MemoryState:
        """The same state, cut from the graph of gradients (truncated backpropagation)."""
        return self._map(Tensor.detach)

    def reorder(self, rows: Tensor) -> MemoryState:
        """The state of other rows: ``rows`` int64 ``[B']`` picks from the batch (beam search, dropping rows)."""
        return self._map(lambda x: x.index_select(0, rows))

    def to(self, *args: Any, **kwargs: Any) -> MemoryState:
        """The state on another device or in another type; arguments of :meth:`torch.Tensor.to`."""
        return self._map(lambda x: x.to(*args, **kwargs))

    def _map(self, change: Callable[[Tensor], Tensor]) -> MemoryState:
        weights, momenta, anchor = (
            {n: change(x) for n, x in named.items()} for named in (self.weights, self.momenta, self.anchor)
        )
        return MemoryState(weights, momenta, anchor, self.phase, self.chunk)


_PARTS = ("weights", "momenta", "anchor")

_pytree.register_pytree_node(
    MemoryState,
    lambda s: ([dict(getattr(s, part)) for part in _PARTS], (s.phase, s.chunk)),
    lambda parts, rest: MemoryState(*parts, *rest),
    serialized_type_name="titans_graph.MemoryState",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=lambda s: (
        [(_pytree.GetAttrKey(part), dict(getattr(s, part))) for part in _PARTS],
        (s.phase, s.chunk),
    ),
)


def fast_weights(network: Description | Network, dim: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a memory network's fast weights for keys and values of size ``dim``.

    ``(in, out)`` for a matrix, applied as ``u @ w``; ``(size,)`` for a vector. An MLP has ``w1`` ... ``wL`` in the order
    of use, SwiGLU ``gate``, ``up``, ``down``, a linear memory ``w``, a declared network its own names.
    """
    if type(dim) is not int or dim < 1:
        raise UsageError(f"dim must be a whole number of at least 1, not {dim!r}")
    return dict(parse_network(network).weights(dim))


def neural_memory(
    network: Description | Network,
    weights: Named | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    step: Tensor,
    log_momentum: Tensor | None = None,
    log_keep: Tensor | None = None,
    chunk: int = 64,
    objective: Description | Objective = "l2",
    read: str = "after",
    state: MemoryState | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, MemoryState]:
    """Memorise ``k -> v`` token by token and answer ``q``: equations 8-15, exact, in chunk-parallel form.

        S_t = eta_t S_(t-1) - theta_t grad l(M_chunk; k_t, v_t)      M_t = (1 - alpha_t) M_(t-1) + S_t      y_t = M_t(q_t)

    with the gradient taken at the weights the token's chunk began with (``chunk`` is part of the model, not a speed knob).

    network: ``"linear"``, ``{"mlp": {...}}``, ``{"swiglu": {...}}``, any declared network; see :func:`fast_weights`.
    weights: M_0, ``{name: [B, H, *shape]}``; not looked at where a ``state`` is given. q, k, v: ``[B, H, T, d]``, any T.
    step theta, log_momentum log eta, log_keep log(1 - alpha): ``[B, H, T]``; the logarithms are at most 0, -inf allowed.
    Without log_momentum there is none (eta = 0), without log_keep nothing is forgotten. The step is used as given; with
    gradients at chunk starts the stable step shrinks with the chunk and with 1 / (1 - eta) (docs/mathematics.md).
    objective: ``"l2"`` ||f(k) - v||^2, ``"dot"`` -<f(k), v>, ``{"huber": {"delta": 1.0}}``, ``{"lp": {"p": 3}}``, or one
    of :func:`~titans_graph.register_objective`. read: weights that answer: ``"after"`` the token's own update,
    ``"before"`` it, or those of the ``"chunk"``'s start.
    state: from an earlier call, or :meth:`MemoryState.initial`; any split of a sequence gives the same numbers.
    kernel: ``reference`` (token by token), ``chunk``, ``compiled`` (chunk bodies compiled once per shape, the
    fastest on a CPU), ``triton`` (docs/kernels.md says for which memories), ``auto``: ``triton`` on a GPU where it can,
    else ``portable``: ``compiled`` inside ``torch.compile``, ``chunk`` outside.

    Returns y ``[B, H, T, d]`` and the state after the last token, in float32 where weights were of half precision, which
    would lose what single tokens write. Gradients reach q, k, v, the gates, and the weights or the
    state's weights, momenta and anchor, in reverse and once; transforms of ``torch.func`` and forward-mode gradients take
    ``kernel="reference"``. A token that is not finite spoils its whole chunk. ``compiled`` and ``triton`` work on whole
    chunks, so that a short call costs as much as one of ``chunk`` tokens. Raises :class:`UsageError` where shapes, names or
    settings do not fit.
    """
    check_tensors(q=q, k=k, v=v, step=step, log_momentum=log_momentum, log_keep=log_keep)
    text, goal, shapes = described(network, objective, q.shape[-1])
    if state is None:
        if weights is None:
            raise UsageError("neural_memory needs weights, or a state")
        state = MemoryState.initial(weights)
    if not isinstance(state, MemoryState):
        raise UsageError(
            f"state must be a MemoryState, from an earlier call or MemoryState.initial, not a {type(state).__name__}"
        )
    state = state._map(running)
    step, log_momentum, log_keep = complete_gates(step, log_momentum, log_keep)
    kinds = {part: getattr(state, part) for part in _PARTS}
    check_call(text, dict(shapes), kinds, q.shape[0], (q, k, v), (step, log_momentum, log_keep), chunk)
    _check_phase(state, chunk)
    check_choices(read, kernel)
    state = replace(state, chunk=chunk)
    tokens = q.shape[2]
    if tokens == 0:
        return torch.zeros_like(q), state
    names = [name for name, _ in shapes]
    lead = state.phase
    # A call within one chunk needs no more slots than that; compiled bodies would be built for every length.
    fixed = kernel in ("compiled", "triton") or q.is_cuda or torch.compiler.is_compiling()
    size = chunk if fixed else min(chunk, lead + tokens)
    slots = -(-(lead + tokens) // size) * size
    q, k, v, step, log_momentum, log_keep = (_spread(x, lead, slots) for x in (q, k, v, step, log_momentum, log_keep))
    place = torch.arange(slots, device=q.device)
    valid = ((place >= lead) & (place < lead + tokens)).expand(q.shape[0], slots)
    # Past the first chunk, because position 0 would restart the row.
    position = (place + size).expand(q.shape[0], slots)
    at, before, moving = ([named[n] for n in names] for named in (state.anchor, state.weights, state.momenta))
    form = text, goal, read, size, False
    y, *ends = memory_scan(
        *form, at, before, moving, before, moving, q, k, v, step, log_momentum, log_keep, valid, position, kernel=kernel,
        resumed=lead > 0,
    )  # fmt: skip
    anchor, now, momenta = (dict(zip(names, end, strict=True)) for end in ends)
    phase = (lead + tokens) % chunk
    y = y if slots == tokens else y[:, :, lead : lead + tokens]
    return y, MemoryState(now, momenta, now if phase == 0 else anchor, phase, chunk)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def described(
    network: Description | Network, objective: Description | Objective, dim: int
) -> tuple[str, str, tuple[tuple[str, tuple[int, ...]], ...]]:
    """Canonical texts of network and objective, names and shapes of the weights: constants, which tracing may bring back."""
    net, goal = parse_network(network), parse_objective(objective)
    goal.check(dim)
    return net.text(), goal.text(), tuple(net.weights(dim).items())


def check_named(kind: str, named: object) -> None:
    """A :class:`UsageError` for what is no mapping of tensors."""
    if not isinstance(named, Mapping):
        raise UsageError(f"{kind} must be a mapping of names to tensors [B, H, *shape], not a {type(named).__name__}")
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise UsageError(f"{kind}[{name!r}] must be a tensor [B, H, *shape], not {x!r:.60}")


def check_tensors(q: object, **others: object) -> None:
    """A :class:`UsageError` for what is no tensor, with the shape that is wanted; gates may be left out."""
    if not isinstance(q, Tensor) or q.dim() != 4:
        got = f"of shape {list(q.shape)}" if isinstance(q, Tensor) else f"a {type(q).__name__}"
        raise UsageError(f"q must be a tensor [B, H, T, d], not {got}")
    for name, given in others.items():
        gate = name in ("step", "log_momentum", "log_keep")
        if isinstance(given, Tensor) or (given is None and gate and name != "step"):
            continue
        shape = list(q.shape[: 3 if gate else 4])
        help = f", for example torch.full({tuple(shape)}, {given})" if isinstance(given, int | float) else ""
        raise UsageError(f"{name} must be a tensor {shape}{help}, not {given!r:.60}")


def complete_gates(step: Tensor, log_momentum: Tensor | None, log_keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """All three gates: without log_momentum there is none, without log_keep nothing is forgotten."""
    if log_momentum is None:
        log_momentum = torch.full_like(step, -torch.inf)
    return step, log_momentum, torch.zeros_like(step) if log_keep is None else log_keep


def _spread(x: Tensor, lead: int, slots: int) -> Tensor:
    """``[B, H, T, ...]`` in the slots from ``lead`` on, zero elsewhere."""
    after = slots - lead - x.shape[2]
    return x if lead == after == 0 else F.pad(x, (*[0] * (2 * (x.dim() - 3)), lead, after))


def check_call(
    text: str,
    shapes: Mapping[str, tuple[int, ...]],
    state: Mapping[str, Named],
    rows: int,
    streams: tuple[Tensor, ...],
    gates: tuple[Tensor, ...],
    chunk: int,
) -> None:
    """A :class:`UsageError` for tensors that do not fit each other; ``rows``: the first size of what ``state`` names."""
    q = streams[0]
    if q.dim() != 4 or any(x.shape != q.shape for x in streams):
        raise UsageError(f"q, k and v must have one shape [B, H, T, d]; got {_list(streams)}")
    if any(x.shape != q.shape[:3] for x in gates):
        raise UsageError(
            f"step, log_momentum and log_keep must have the shape {list(q.shape[:3])} of q without d; got {_list(gates)}"
        )
    expected = {n: (rows, q.shape[1], *shape) for n, shape in shapes.items()}
    for kind, named in state.items():
        found = {n: tuple(w.shape) for n, w in named.items()}
        if found != expected:
            raise UsageError(f"{kind} of {text} must be {_shapes(expected)}; got {_shapes(found)}")
    fast = [w for named in state.values() for w in named.values()]
    devices = {x.device for x in (*fast, *streams, *gates)}
    if len(devices) > 1:
        raise UsageError(f"all tensors must be on one device; got {', '.join(sorted(map(str, devices)))}")
    kinds = {w.dtype for w in fast}
    if len(kinds) > 1 or not all(x.is_floating_point() for x in (*fast, *streams, *gates)):
        raise UsageError("tensors must be floating point, and the state's all of one type")
    if type(chunk) is not int or chunk < 1:
        raise UsageError(f"chunk must be a whole number of at least 1, not {chunk!r}")


def _check_phase(state: MemoryState, chunk: int) -> None:
    if state.phase and state.chunk != chunk:
        raise UsageError(f"the state stands inside a chunk of {state.chunk} tokens and cannot go on with chunks of {chunk}")
    if not 0 <= state.phase < chunk:
        raise UsageError(f"a state's phase counts tokens of a chunk of {chunk}; got {state.phase}")


def _list(tensors: tuple[Tensor, ...]) -> str:
    return ", ".join(str(list(x.shape)) for x in tensors)


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return "{" + ", ".join(f"{n}: {list(s)}" for n, s in shapes.items()) + "}"
