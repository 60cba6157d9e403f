"""Pass ``schedule``: both programs make every call once, in an order in which values are made before they are read."""

from __future__ import annotations

import pytest

import titans_graph as tg
from tests.models import ALL, SMALL, parameters
from titans_graph.ir import Ref
from titans_graph.passes import Compilation, Program


def programs(name: str, disable: tuple[str, ...]) -> tuple[Compilation, tuple[Program, Program]]:
    chosen = {k: v for k, v in SMALL.items() if k in parameters(name)}
    c = tg.compilation(name, after="schedule", disable=disable, **chosen)
    assert c.whole is not None
    assert c.token is not None
    return c, (c.whole, c.token)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("disable", [(), ("hoist",)])
def test_every_call_is_made_once_and_after_what_it_reads(name: str, disable: tuple[str, ...]) -> None:
    c, both = programs(name, disable)
    calls = sorted((n, s.name) for n in c.nodes for s in c.stages(n))
    for program in both:
        steps = [step for region in program.regions for step in region.steps]
        assert sorted((s.node, s.stage.name) for s in steps) == calls
        made = {Ref(n) for n in c.inputs}
        for step in steps:
            for port in step.stage.inputs:
                assert made.issuperset(c.nodes[step.node].inputs[port]), (step.node, port)
            made.update(Ref(step.node, port) for port in step.stage.outputs)


@pytest.mark.parametrize("name", ALL)
def test_regions_name_all_that_crosses_their_borders(name: str) -> None:
    c, both = programs(name, ())
    for program in both:
        for region in program.regions:
            own = {step.node for step in region.steps}
            read = {r for s in region.steps for p in s.stage.inputs for r in c.nodes[s.node].inputs[p]}
            made = {Ref(s.node, p) for s in region.steps for p in s.stage.outputs}
            assert set(region.inputs) == read - made
            assert set(region.outputs) <= made
            assert set(region.states) == {n for n in own if c.nodes[n].component.stateful}


@pytest.mark.parametrize("name", ["mac", "ladder", "blocks/mac", "blocks/ladder"])
def test_without_hoisting_the_loop_takes_more_along(name: str) -> None:
    sizes = []
    for disable in ((), ("hoist",)):
        _, (whole, _) = programs(name, disable)
        loops = [r for r in whole.regions if r.kind == "loop"]
        assert all(r.period == SMALL["segment"] for r in loops)
        sizes.append(sum(len(r.steps) for r in loops))
    assert 0 < sizes[0] < sizes[1]


def test_a_stateful_node_stands_in_one_region() -> None:
    _, both = programs("mac", ())
    for program in both:
        states = [n for region in program.regions for n in region.states]
        assert len(states) == len(set(states)) == 2 * SMALL["layers"]
