"""The recipes of the project's own components, each with every parameter and every wiring it is used with.

Nothing that a component can be told is left out without a reason: a setting that is never drawn is never tested.
"""

from __future__ import annotations

from typing import Any

from titans_graph.ir import Ref
from titans_graph.testing.strategies.draft import RECIPES, Draft, recipe, recipe_of
from titans_graph.testing.strategies.networks import memory_networks


def _extras(d: Draft, **options: tuple[Any, ...]) -> dict[str, Any]:
    """Some of the parameters, each with one of its values; with none of them a component keeps its defaults."""
    return {key: d.choose(*values) for key, values in options.items() if d.flag()}


def _repeat(d: Draft) -> int:
    return d.choose(1, 1, 1, 2, 3)


@recipe("norm.rms")
def _norm(d: Draft) -> None:
    d.offer(d.add("norm.rms", _extras(d, eps=(1e-3,)), _repeat(d), x=d.pick()))


@recipe("linear")
def _linear(d: Draft) -> None:
    size = d.choose(d.dim, d.dim, d.dim + 1, 1)
    shown = {} if size == d.dim else {"dim": size}
    d.offer(d.back(d.add("linear", {**shown, **_extras(d, bias=(True, False))}, x=d.pick()), size))


@recipe("mlp.swiglu")
def _mlp(d: Draft) -> None:
    d.offer(d.add("mlp.swiglu", {"hidden": d.number(1, 4)}, _repeat(d), x=d.pick()))


@recipe("conv.causal")
def _conv(d: Draft) -> None:
    p = {"kernel": d.number(2, 5), **_extras(d, activation=("silu", "none"), bias=(True,), std=(0.5,))}
    d.offer(d.add("conv.causal", p, _repeat(d), x=d.pick()))


@recipe("add")
def _add(d: Draft) -> None:
    d.offer(d.add("add", x=[d.pick() for _ in range(d.number(2, 3))]))


@recipe("gate.product")
def _product(d: Draft) -> None:
    p = _extras(d, nonlinearity=("sigmoid", "tanh", "none", "silu"), eps=(1e-3,))
    d.offer(d.add("gate.product", p, x=[d.pick(), d.pick()]))


@recipe("gate.residual")
def _residual(d: Draft) -> None:
    d.offer(d.add("gate.residual", _extras(d, initial=(0.5,)), x=[d.pick(), d.pick()]))


@recipe("gate.sigmoid")
def _sigmoid(d: Draft) -> None:
    d.offer(d.add("gate.sigmoid", _extras(d, bias=(1.0,)), x=[d.pick(), d.pick()]))


@recipe("head.linear")
def _head(d: Draft) -> None:
    size = d.vocab or d.number(1, 5)
    d.offer(d.back(d.add("head.linear", {"vocab": size}, x=d.pick()), size))


@recipe("head.tied")
def _tied(d: Draft) -> None:
    """A table is what an embedding gives, or any fixed piece."""
    if d.ids is not None and d.flag():
        size = d.vocab
        table = Ref(_embedding(d).node, "table")
    else:
        size = d.number(1, 4)
        table = d.add("tokens.persistent", {"count": size, "dim": d.dim})
    d.offer(d.back(d.add("head.tied", _extras(d, scale=(0.5,)), x=d.pick(), table=table), size))


def _embedding(d: Draft) -> Ref:
    assert d.ids is not None
    p = {"vocab": d.vocab, "dim": d.dim, "std": 1.0, **_extras(d, scale=(2.0,))}
    ref = d.add("embedding", p, x=d.ids)
    d.offer(ref)
    return ref


@recipe("embedding", ids=True, alone=True)
def _embed(d: Draft) -> None:
    _embedding(d)


def _persistent(d: Draft) -> Ref:
    shown = {"dim": d.dim} if d.ids is not None or d.flag() else {}
    return d.add("tokens.persistent", {"count": d.number(0, 3), **shown, **_extras(d, std=(0.5,))})


@recipe("tokens.persistent", alone=True)
def _tokens(d: Draft) -> None:
    with_prefix(d, _persistent(d))


def with_prefix(d: Draft, prefix: Ref) -> None:
    """A fixed piece in front of a stream, seen by attention."""
    joined = d.add("sequence.concat", x=[prefix, d.pick()])
    d.offer(_attention(d, joined, d.choose("attention.window", "attention.full", "attention.segment")))


def _sequence(d: Draft) -> tuple[Ref, str, bool]:
    """A sequence of pieces, fixed and timed, the name of a timed one, and whether there are others of that kind.

    It is joined in one step or two, and something may work on all its pieces alike.
    """
    own = d.add("norm.rms", x=d.pick())
    pieces = [own]
    several = d.flag()
    if several:
        pieces.insert(0, d.add("linear", x=d.pick()))
    if not d.loop and d.flag():
        pieces.insert(0, _persistent(d))
    if len(pieces) == 3 and d.flag():
        pieces = [d.add("sequence.concat", x=pieces[:2]), own]
    joined = d.add("sequence.concat", x=pieces)
    use = d.choose("", "linear", "mlp.swiglu", "norm.rms")
    if use:
        joined = d.add(use, {"hidden": 2} if use == "mlp.swiglu" else {}, x=joined)
    return joined, own.node if len(pieces) > 1 else joined.node, several


@recipe("sequence.concat")
def _concat(d: Draft) -> None:
    _attended(d, d.choose("attention.window", "attention.full", "attention.segment"))


@recipe("sequence.slice")
def _slice(d: Draft) -> None:
    if not d.loop and d.flag():  # a fixed piece, which goes back into a sequence
        prefix = _persistent(d)
        joined = d.add("sequence.concat", x=[prefix, d.pick()])
        kept = d.add("sequence.slice", {"keep": prefix.node}, x=joined)
        d.offer(_attention(d, d.add("sequence.concat", x=[kept, d.pick()]), "attention.window"))
        return
    joined, keep, _ = _sequence(d)
    d.offer(d.add("sequence.slice", {"keep": keep}, x=joined))


def _attention(d: Draft, source: Ref, use: str, keep: str = "") -> Ref:
    """Attention with every switch drawn."""
    heads = d.heads()
    size = d.choose(d.dim // heads, 2, 4)
    p: dict[str, Any] = {"heads": heads}
    if size * heads != d.dim:
        p["head_dim"] = size
    if size % 2 or d.flag():
        p["rotary"] = None
    elif d.flag():
        p["rotary"] = 100.0
    if heads > 1 and d.flag():
        p["kv_heads"] = 1
    if d.flag():
        p["qk_norm"] = True
    if use == "attention.window":
        p["window"] = d.number(1, 6)
    if use == "attention.segment" and (d.segment is None or d.flag()):
        p["segment"] = d.period(4, 6, 3, 2, 1, free=True)
    elif use == "attention.segment":
        assert d.segment is not None
        d.periods.add(d.segment)
    return d.add(use, p | ({"keep": keep} if keep else {}), x=source)


def _attended(d: Draft, use: str) -> None:
    """Attention over several pieces; `keep` may be left out where one piece alone is timed."""
    joined, keep, several = _sequence(d)
    d.offer(_attention(d, joined, use, keep if several or d.flag() else ""))


def _attends(use: str) -> None:
    @recipe(use)
    def build(d: Draft) -> None:
        if d.flag():
            d.offer(_attention(d, d.pick(), use))
        else:
            _attended(d, use)


for _use in ("attention.full", "attention.window", "attention.segment"):
    _attends(_use)


def memory_parameters(d: Draft) -> dict[str, Any]:
    """Every switch of a neural memory."""
    heads = d.heads()
    size = d.choose(d.dim // heads, 2, 3)
    p: dict[str, Any] = {"heads": heads, "chunk": d.period(4, 2, 3, 1, 5, 8), "network": d.draw(memory_networks(size))}
    if size * heads != d.dim:
        p["head_dim"] = size
    p |= {key: d.flag() for key in ("momentum", "forget", "output_gate")}
    p |= _extras(d, read=("before", "chunk", "after"), conv=(0, 2, 3))
    p |= _extras(d, objective=({"huber": {"delta": 0.5}}, "dot", {"lp": {"p": 2.5}}, "l2"), kernel=("reference",))
    if d.flag():
        p |= {"cap": "none", "max_step": 0.01}
    if p["momentum"]:
        p |= _extras(d, max_momentum=(0.5, 0.0))
    if p["forget"]:
        p |= _extras(d, forget_bias=(1.0,))
    return p


@recipe("memory.neural", weight=6)
def _memory(d: Draft) -> None:
    """A memory beside the stream, or one in a feedback loop where the block has a segment."""
    if d.segment is not None and d.flag():
        _loop(d)
        return
    inputs: dict[str, Any] = {"write": d.pick()} | ({"ask": d.pick()} if d.flag() else {})
    d.offer(d.add("memory.neural", memory_parameters(d), **inputs))


_INSIDE = (
    "attention.segment",
    "add",
    "gate.sigmoid",
    "conv.causal",
    "linear",
    "attention.window",
    "attention.full",
    "memory.neural",
    "sequence.concat",
    "sequence.slice",
)
"""What is drawn between what a memory recalled and what it writes."""


def _loop(d: Draft) -> None:
    """Memory as context and its kin: the memory opens the segment, and learns what others made of what it recalled."""
    assert d.segment is not None
    outside, d.loop = d.loop, d.segment
    own = d.add("norm.rms", x=d.pick())
    memory = d.add("memory.neural", memory_parameters(d), opening=own)
    recalled = Ref(memory.node, "recalled")
    kept = d.streams, d.unread
    d.streams, d.unread = [own, recalled], {recalled: None}
    for _ in range(d.number(0 if outside else 1, 2)):
        recipe_of(d.choose(*_INSIDE)).build(d)
    ends = list(d.unread) or [recalled]
    source = d.add("add", x=ends) if len(ends) > 1 else ends[0]
    asks = {"ask": d.choose(source, own, recalled)} if d.flag() else {}
    d.connect(memory, write=source, **asks)
    d.streams, d.unread = kept
    d.offer(memory)
    if d.flag():
        d.offer(source)
    d.loop = outside


assert set(_INSIDE) <= set(RECIPES)
