from __future__ import annotations

from typing import Any

import pytest

from titans_graph.cli.options import count, scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64", 64),
        ("-3", -3),
        ("1e-3", 0.001),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("no", "no"),
        ("on", "on"),
        ("l2", "l2"),
        ("'64'", "64"),
        ("{mlp: 2}", {"mlp": 2}),
        ("{mlp: {depth: 2, hidden: 1e2}, kind: no}", {"mlp": {"depth": 2, "hidden": 100.0}, "kind": "no"}),
        ("[1, two, '3']", [1, "two", "3"]),
    ],
)
def test_values_read_as_in_a_spec(text: str, value: Any) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_large_numbers_for_people() -> None:
    assert [count(n) for n in (0, 1234, 1_234_567, 2.5e9)] == ["0", "1,234", "1.23 M", "2.50 G"]
