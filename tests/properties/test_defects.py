"""Every deliberate defect is caught by a law, and the product without defects keeps them all.

``caught.json`` holds, for every defect, the laws that catch it and on which graph. Each defect is tried with the first of
them here; all defects with all laws under ``make nightly``, which compares with the file. To write it anew:

    pytest tests/properties/test_defects.py -m nightly --update-golden
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Callable

import pytest

from tests.properties import defects, fixed, laws
from tests.properties.mutations import Defect, MutationError, caught, defect, find, injected
from tests.properties.probes import PROBES
from tests.properties.table import FILE, known

CAUGHT = known()


# A defect may warn of anything.
pytestmark = pytest.mark.filterwarnings("ignore")

FIRST = sorted({next(iter(laws.items())) for laws in CAUGHT.values()})
"""The laws, each with a graph, that the defects are tried with here."""


@pytest.mark.parametrize(("law", "graph"), FIRST)
def test_without_a_defect_the_law_holds(law: str, graph: str) -> None:
    PROBES[law].check(graph)


@pytest.mark.nightly
@pytest.mark.parametrize("law", PROBES)
def test_without_a_defect_every_law_holds(law: str) -> None:
    for graph in PROBES[law].graphs:
        PROBES[law].check(graph)


@pytest.mark.parametrize("one", defects.ALL, ids=lambda one: one.name)
def test_a_defect_is_caught(one: Defect) -> None:
    law, graph = next(iter(CAUGHT[one.name].items()))
    assert caught(one, functools.partial(PROBES[law].check, graph)) is True


def touched(one: Defect) -> set[str]:
    """The fixed graphs that reach a defect when they are built, run and differentiated, which is quickly found out."""
    found = set()
    for name in fixed.NAMES:
        with injected(one) as reached, contextlib.suppress(Exception):
            model, reading = laws.built(fixed.graph(name)), fixed.reading(name)
            laws.gradients(model, reading.read(model)[0], reading.x)
        if reached:
            found.add(name)
    return found or set(fixed.NAMES)


def by(one: Defect) -> dict[str, str]:
    """The laws that catch a defect, each with the first graph on which it does; an error where an edit is never reached."""
    found, reached, elsewhere = dict[str, str](), set[str](), set(fixed.NAMES) - touched(one)
    for law, (check, graphs) in PROBES.items():
        for graph in (g for g in graphs if g not in elsewhere):
            if caught(one, functools.partial(check, graph), reached):
                found[law] = graph
                break
    lost = {edit.place for edit in one.edits} - reached
    if lost:
        raise MutationError(f"{one.name!r}: no law reaches {', '.join(sorted(lost))}")
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("one", defects.ALL, ids=lambda one: one.name)
def test_all_laws_that_catch_a_defect_are_known(one: Defect, request: pytest.FixtureRequest) -> None:
    found = by(one)
    assert found, f"{one.name}: a law is missing"
    if request.config.getoption("--update-golden"):
        CAUGHT.update({**known(), one.name: found})
        ordered = {d.name: CAUGHT[d.name] for d in defects.ALL if d.name in CAUGHT}
        FILE.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    assert CAUGHT.get(one.name) == found


def test_the_list_is_current() -> None:
    names = [one.name for one in defects.ALL]
    assert names == list(CAUGHT)
    assert len(set(names)) == len(names)


def test_a_defect_is_undone() -> None:
    one = defects.PASSES[0]
    function = find(one.edits[0].place)
    code, space = function.__code__, dict(function.__globals__)
    with injected(one):
        assert function.__code__ is not code
    assert function.__code__ is code
    assert space.items() <= function.__globals__.items()
    assert inspect.getsource(function)


def law_of_leaks() -> None:
    from titans_graph.shapes import Dependence

    assert Dependence("x", "out", "segment").leaks


@pytest.mark.parametrize(
    ("edit", "law", "outcome"),
    [
        (("shapes:Dependence.leaks", "in (", "not in ("), law_of_leaks, True),
        (("shapes:Dependence.leaks", "self.kind in", "self.kind  in"), law_of_leaks, False),
        (("shapes:Dependence.delayed", '== "state"', '!= "state"'), law_of_leaks, None),
    ],
)
def test_caught_missed_or_not_reached(edit: tuple[str, str, str], law: Callable[[], None], outcome: bool | None) -> None:
    assert caught(defect("one", "wrong", edit), law) is outcome


def test_an_edit_that_fits_nothing_is_an_error() -> None:
    with pytest.raises(MutationError, match="0 times"), injected(defect("one", "wrong", ("shapes:stream", "no such", ""))):
        pass
    with pytest.raises(NameError):
        caught(defect("one", "wrong", ("shapes:Dependence.leaks", "self.kind", "nothing")), law_of_leaks)
    with pytest.raises(MutationError, match="is no function"):
        find("shapes:Dependence")


def test_a_law_that_fails_by_itself_catches_nothing() -> None:
    def broken() -> None:
        raise AssertionError("always")

    with pytest.raises(AssertionError, match="always"):
        caught(defect("one", "wrong", ("shapes:Dependence.delayed", '== "state"', '!= "state"')), broken)
