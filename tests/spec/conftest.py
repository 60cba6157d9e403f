from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ir import fakes


@pytest.fixture(autouse=True)
def _fake_components() -> Iterator[None]:
    with fakes.installed():
        yield
