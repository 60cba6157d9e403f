"""What must hold for every graph the language can express, each as a plain function that raises AssertionError.

Tests draw graphs and readings and call these; so may anything else that wants to know whether the code still keeps its
promises. All but one run in float64, on small sizes.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import titans_graph as tg
from tests.properties.dependence import Subject, allowed, measured
from tests.properties.leaks import judged, leaks, reason
from tests.properties.naive import Evaluation
from titans_graph.errors import CausalityLeak
from titans_graph.ir import Graph, Ref, parse
from titans_graph.passes import CHECKS, PLANS, Compilation
from titans_graph.registry import Component, Site
from titans_graph.spec import read_text, to_yaml
from titans_graph.testing.strategies import Planted, Reading

TOLERANCE = 1e-9
GRADIENT_TOLERANCE = 1e-7
SINGLE_TOLERANCE, SINGLE_GRADIENT_TOLERANCE = 1e-3, 1e-2
"""Of float32 against float64: a hundred times the largest difference seen, a tenth of what a wrong term makes."""

OPTIONAL = tuple(p for p in PLANS if p.optional)


def built(graph: Graph, disable: Collection[str] = (), seed: int = 0) -> tg.Model:
    """A model in float64 with parameters moved away from their special initial values; the same for the same seed."""
    torch.manual_seed(seed)
    model: tg.Model = tg.build(graph, disable=disable)
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative where values are large."""
    assert got.shape == want.shape, (got.shape, want.shape)
    if not want.numel():
        return 0.0
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max()) / max(1.0, float(want.abs().max()))


def same(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Outputs agree, name by name."""
    assert list(got) == list(want)
    for name, y in want.items():
        assert error(got[name], y) <= tolerance, (name, error(got[name], y))


def loss(outputs: Mapping[str, Tensor]) -> Tensor:
    """A number that every entry of every output moves differently."""
    total = torch.zeros((), dtype=torch.float64)
    for i, y in enumerate(outputs.values()):
        probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(i), dtype=y.dtype)
        total = total + (y.sin() * probe).sum()
    return total


def gradients(model: tg.Model, outputs: Mapping[str, Tensor], x: Tensor) -> list[Tensor]:
    """Of :func:`loss` by every parameter, and by the input where it has features."""
    leaves = [*([x] if x.requires_grad else []), *model.parameters()]
    total = loss(outputs)
    if not total.requires_grad:  # nothing that the outputs come from is among the leaves
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))


def alike(got: list[Tensor], want: list[Tensor], tolerance: float = GRADIENT_TOLERANCE) -> None:
    """Gradients agree."""
    for a, b in zip(got, want, strict=True):
        assert error(a, b) <= tolerance, error(a, b)


def leaf(reading: Reading) -> Reading:
    """The same reading with an input that gradients are taken of, where it has features."""
    x = reading.x.clone()
    return replace(reading, x=x.requires_grad_() if x.is_floating_point() else x)


def check_reads_back(graph: Graph) -> None:
    """A graph is sound, and text, YAML and the one through the other give the same graph."""
    assert tg.check(graph) == []
    assert parse(graph.text()) == graph
    assert read_text(to_yaml(graph)).graph == graph


def check_naive(graph: Graph, reading: Reading, *, gradient: bool = True) -> None:
    """The compiled program equals the node-by-node evaluation of the graph, in outputs and in gradients."""
    model, reading = built(graph), leaf(reading)
    got, _ = reading.read(model)
    want = evaluated(graph, model, reading)
    same(got, want)
    if gradient:
        alike(gradients(model, got, reading.x), gradients(model, want, reading.x))


def evaluated(graph: Graph, model: tg.Model, reading: Reading) -> dict[str, Tensor]:
    """The outputs of the node-by-node evaluation, with a model's tensors."""
    rows: dict[str, list[list[Tensor]]] = {name: [[] for _ in reading.x] for name in graph.main.outputs}
    for row, start, stop in reading.runs():
        for name, y in Evaluation(graph, model.body, reading.x[row, start:stop]).outputs().items():
            rows[name][row].append(y)
    return {name: torch.stack([torch.cat(parts) for parts in each]) for name, each in rows.items()}


def check_single_precision(graph: Graph, reading: Reading) -> None:
    """The program in float32 equals the evaluation in float64 as far as float32 goes, in outputs and in gradients."""
    model, single, reading = built(graph), built(graph).float(), leaf(reading)
    rounded = leaf(replace(reading, x=reading.x.detach().float() if reading.x.is_floating_point() else reading.x))
    got, _ = rounded.read(single)
    assert {y.dtype for y in got.values()} == {torch.float32}
    outputs, want = {name: y.double() for name, y in got.items()}, evaluated(graph, model, reading)
    same(outputs, want, SINGLE_TOLERANCE)
    slopes = [g.double() for g in gradients(single, outputs, rounded.x)]
    alike(slopes, gradients(model, want, reading.x), SINGLE_GRADIENT_TOLERANCE)


def check_passes(graph: Graph, reading: Reading) -> None:
    """Every optional pass preserves meaning: left out, alone or with others, it changes no output and no gradient."""
    model, reading = built(graph), leaf(reading)
    want, _ = reading.read(model)
    slopes = gradients(model, want, reading.x)
    names = [p.name for p in OPTIONAL]
    for some in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(1, len(names) + 1)):
        plain = built(graph, disable=some)
        plain.load_state_dict(model.state_dict())
        got, _ = reading.read(plain)
        same(got, want)
        if len(some) == len(names):  # the longest part of the work, once
            alike(gradients(plain, got, reading.x), slopes)


def check_idempotent(graph: Graph) -> None:
    """A pass that runs again changes nothing: every optional one, and every one whose result the next passes read."""
    c: Compilation = tg.compilation(graph, after="find-feedback")
    for p in (*CHECKS, *PLANS):
        c = p.run(c)
        again = p.run(c)
        for field in fields(c):
            assert getattr(again, field.name) == getattr(c, field.name), (p.name, field.name)


def check_streaming(graph: Graph, reading: Reading) -> None:
    """Any way to cut the tokens into calls gives what one call gives; so do single tokens."""
    model = built(graph)
    calls = replace(reading, resets=tuple(() for _ in reading.parts))
    tokens = reading.x.shape[1]
    single = Reading(reading.x, reading.document, (1,) * tokens, ((),) * tokens)
    with torch.no_grad():
        want, _ = reading.whole().read(model)
        same(calls.read(model)[0], want)
        same(single.read(model)[0], want)


def check_split_gradients(graph: Graph, reading: Reading) -> None:
    """Gradients through a chain of calls equal those of one call."""
    model, reading = built(graph), leaf(reading)
    calls = replace(reading, resets=tuple(() for _ in reading.parts))
    found = [gradients(model, how.read(model)[0], reading.x) for how in (reading.whole(), calls)]
    alike(found[1], found[0])


def other_tokens(x: Tensor, seed: int = 1) -> Tensor:
    """Tokens of the same kind as ``x``, other ones wherever there is a choice."""
    if x.is_floating_point():
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    return x.max() - x


def check_no_leak(graph: Graph, reading: Reading, cut: int) -> None:
    """Tokens from ``cut`` on change no output before them, in one call and in several."""
    model = built(graph)
    changed = replace(reading, x=torch.cat([reading.x[:, :cut], other_tokens(reading.x)[:, cut:]], 1))
    with torch.no_grad():
        for how, other in ((reading, changed), (reading.whole(), changed.whole())):
            got, want = other.read(model)[0], how.read(model)[0]
            same({n: y[:, :cut] for n, y in got.items()}, {n: y[:, :cut] for n, y in want.items()})


def check_rows_apart(graph: Graph, reading: Reading) -> None:
    """A row's outputs are the same whatever stands in the other rows, and when it is alone."""
    model = built(graph)
    rows = reading.x.shape[0]
    with torch.no_grad():
        want, _ = reading.read(model)
        for row in range(rows):
            keep = torch.arange(rows)[:, None, None] == row if reading.x.dim() == 3 else torch.arange(rows)[:, None] == row
            beside = replace(reading, x=torch.where(keep, reading.x, other_tokens(reading.x)))
            ids = None if reading.document is None else reading.document[row : row + 1]
            resets = tuple((0,) if row in reset else () for reset in reading.resets)
            alone = Reading(reading.x[row : row + 1], ids, reading.parts, resets)
            own = {name: y[row : row + 1] for name, y in want.items()}
            same({name: y[row : row + 1] for name, y in beside.read(model)[0].items()}, own)
            same(alone.read(model)[0], own)


def check_documents_apart(graph: Graph, reading: Reading) -> None:
    """Documents packed in a row, and tokens after a reset, give what they give in a call of their own."""
    model = built(graph)
    with torch.no_grad():
        packed, _ = reading.read(model)
        for row, start, stop in reading.runs():
            apart = Reading(reading.x[row : row + 1, start:stop], None, (stop - start,), ((),))
            same(apart.read(model)[0], {name: y[row : row + 1, start:stop] for name, y in packed.items()})


def check_shapes(graph: Graph, reading: Reading) -> None:
    """What a node gives at run time has the type that was inferred for it, in both programs."""
    model = built(graph)
    c = model.compilation
    seen: set[Ref] = set()
    handles = [
        model.body.get_submodule(name).register_forward_hook(_shape_hook(c, name, seen), with_kwargs=True) for name in c.nodes
    ]
    tokens = reading.x.shape[1]
    lone = replace(reading.whole(), parts=(1,) * tokens, resets=((),) * tokens)
    with torch.no_grad():
        for how in (reading.whole(), lone):
            for name, y in how.read(model)[0].items():
                dim = c.types[c.outputs[name]].dim
                assert list(y.shape) == [*reading.x.shape[:2], *([] if dim is None else [dim])]
    for handle in handles:
        handle.remove()
    wanted = {Ref(name, port) for name in c.nodes for stage in c.stages(name) for port in stage.outputs}
    assert seen == wanted, wanted - seen


def _shape_hook(c: Compilation, name: str, seen: set[Ref]) -> Any:
    """Compare what a component gives with the types of its ports."""

    def hook(module: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        stages = c.stages(name)
        stage = next(s for s in stages if len(stages) == 1 or s.name == kwargs["stage"])
        given = result[0] if stage.updates else result
        for port, value in zip(stage.outputs, (given,) if len(stage.outputs) == 1 else given, strict=True):
            kind = c.types[Ref(name, port)]
            parts = (value,) if len(kind.pieces) == 1 else value
            assert isinstance(parts, tuple)
            for piece, tensor in zip(kind.pieces, parts, strict=True):
                own = list(tensor.shape[2:]) if piece.timed else list(tensor.shape)
                want = [] if kind.dim is None else [kind.dim]
                assert own == (want if piece.timed else [piece.length, *want]), (name, port, kind.text(), list(tensor.shape))
                assert not piece.timed or tensor.dim() == 2 + len(want)
            seen.add(Ref(name, port))

    return hook


def check_saved(graph: Graph, reading: Reading, folder: Path) -> None:
    """Spec, weights and state written to files and read back are the same bit for bit, and so is what follows."""
    model = built(graph)
    (folder / "spec.yaml").write_text(model.spec, encoding="utf-8")
    weights = {name: w.contiguous() for name, w in model.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    twin: tg.Model = tg.load(folder / "spec.yaml").double()
    twin.load_state_dict(load_file(folder / "weights.safetensors"))
    assert twin.graph == graph
    assert twin.fingerprint == model.fingerprint
    with torch.no_grad():
        _, state = reading.read(model)
        state.save(folder / "state.safetensors")
        again = tg.State.load(twin, folder / "state.safetensors")
        _identical(again, state)
        # What single tokens put off is done before the state is written, which rounds elsewhere.
        settled = replace(state, nodes={name: dict(tensors) for name, tensors in state.nodes.items()})
        (got, after), (want, wanted) = reading.read(twin, again), reading.read(model, settled)
        assert all(torch.equal(got[name], y) for name, y in want.items())
        _identical(after, wanted)
        same(got, reading.read(model, state)[0])


def _identical(one: tg.State, other: tg.State) -> None:
    assert torch.equal(one.position, other.position)
    assert torch.equal(one.document, other.document)
    assert {n: set(ts) for n, ts in one.nodes.items()} == {n: set(ts) for n, ts in other.nodes.items()}
    assert all(torch.equal(one.nodes[n][k], t) for n, ts in other.nodes.items() for k, t in ts.items())


def check_seed(graph: Graph, reading: Reading) -> None:
    """Under one seed everything is the same bit for bit: parameters, outputs, gradients, state. Another seed differs."""
    runs = []
    for seed in (0, 0, 1):
        model, here = built(graph, seed=seed), leaf(reading)
        outputs, state = here.read(model)
        tensors = [t for tensors in state.nodes.values() for t in tensors.values()]
        runs.append([*model.parameters(), *outputs.values(), *gradients(model, outputs, here.x), *tensors])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not list(built(graph).parameters()) or not all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


def check_compiled(graph: Graph, reading: Reading) -> None:
    """The compiled model gives what the eager one gives, in outputs and gradients."""
    torch._dynamo.reset()
    model, reading = built(graph), leaf(reading)
    fast = model.compile()
    want, _ = reading.read(model)
    got, _ = reading.read(fast)
    same(got, want)
    alike(gradients(fast, got, reading.x), gradients(model, want, reading.x))
    with torch.no_grad():
        same(reading.read(fast)[0], reading.read(model)[0])


def check_planted(planted: Planted) -> None:
    """A planted mistake gives one diagnostic, of its class and on its line; the model is built only where that is a warning."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.yaml"
        path.write_text(planted.text, encoding="utf-8")
        found = tg.check(path, **planted.overrides)
        got = [(type(d), d.span.line if d.span else None) for d in found]
        shown = "\n".join(d.render() for d in found)
        assert got == [(planted.error, planted.line)], f"expected {planted.error.__name__} on line {planted.line}:\n{shown}"
        with contextlib.nullcontext() if planted.error.severity == "warning" else pytest.raises(tg.SpecError):
            tg.load(path, **planted.overrides)


def check_dependences(component: type[Component], site: Site, tokens: int, *, tight: bool = False) -> None:
    """No output token depends on an input token that the component's declaration excludes.

    ``tight``: and for every lag that it allows, some output token depends on an input token at that lag.
    """
    subject = Subject(component, site, tokens)
    segment = getattr(site.parameters, "segment", None) or site.segment or 64
    lag = torch.arange(tokens)[:, None] - torch.arange(tokens)
    for (source, target), real in measured(subject).items():
        declared = [d for d in component.dependences(site) if (d.source, d.target) == (source, target)]
        may = allowed(declared, tokens, segment)
        assert not bool((real & ~may).any()), (source, target, declared, (real & ~may).nonzero().tolist())
        idle = sorted({int(n) for n in lag[may]} - {int(n) for n in lag[real]})
        assert not (tight and idle), f"{target} never depends on {source} at lags {idle}: {declared}"


def check_judgement(graph: Graph) -> None:
    """A graph judged causal does not leak; one refused that does not leak is refused for a known reason."""
    c = judged(graph)
    refused = any(isinstance(d, CausalityLeak) for d in c.diagnostics)
    assert refused or c.sound, c.diagnostics
    leaking = leaks(graph, c)
    assert refused or not leaking, "judged causal, and leaks"
    assert not refused or leaking or reason(c) is not None, "refused, does not leak, and no known reason explains it"
