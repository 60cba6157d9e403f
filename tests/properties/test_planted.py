"""A spec with one mistake gets one diagnostic: of the right class, on the right line, whatever stands around it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from tests.properties import laws
from titans_graph import errors
from titans_graph.testing import strategies as tgs

# Some mistakes need a graph of a kind, so that many drawn graphs have no room for them.
PATIENT = settings(max_examples=max(10, settings().max_examples // 10), suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("mistake", tgs.MISTAKES)
@PATIENT
@given(data=st.data())
def test_a_planted_mistake_is_reported_on_its_line(mistake: str, data: st.DataObject) -> None:
    laws.check_planted(data.draw(tgs.near_valid_specs(mistake), "planted"))


@given(planted=tgs.near_valid_specs())
def test_some_planted_mistake_is_reported_on_its_line(planted: tgs.Planted) -> None:
    laws.check_planted(planted)


def kinds(root: type[errors.Diagnostic]) -> set[type[errors.Diagnostic]]:
    return {kind for one in root.__subclasses__() for kind in {one, *kinds(one)}}


def test_every_class_of_the_catalogue_is_planted() -> None:
    """A class of errors that nobody plants is one whose places nobody checks."""
    once = settings(max_examples=100, phases=[Phase.generate], derandomize=True, database=None)
    planted = {find(tgs.near_valid_specs(mistake), lambda _: True, settings=once).error for mistake in tgs.MISTAKES}
    assert planted == {kind for kind in kinds(errors.Diagnostic) if kind.__module__.startswith("titans_graph.")}


def test_unknown_mistakes_are_refused() -> None:
    with pytest.raises(errors.UsageError, match="did you mean 'leak'"):
        tgs.near_valid_specs("leek")
