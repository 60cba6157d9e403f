from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ir import fakes
from titans_graph import registry


@pytest.fixture(autouse=True)
def _fake_components(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "TABLE", dict(fakes.TARGETS))
    monkeypatch.setattr(registry, "_plugins", dict)
    registry.lookup.cache_clear()
    yield
    registry.lookup.cache_clear()
