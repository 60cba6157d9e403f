from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import yaml

from tests.spec.test_read import MAC, changed
from titans_graph.spec import schema


def check(text: str) -> list[str]:
    # JSON's own types, so that YAML 1.1's reading of scalars stays out of it.
    loaded: Any = json.loads(json.dumps(yaml.safe_load(text)))
    return [error.message for error in jsonschema.Draft202012Validator(schema()).iter_errors(loaded)]


def test_the_schema_is_one_and_takes_a_sound_spec() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert check(MAC.replace("1e-3", "0.001")) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("output: logits\n", ""),
        ("titans_graph: 1", "titans_graph: 2"),
        ("name: mac", "nmae: mac"),
        ("eps: 1e-3", "esp: 0.001"),
        ("eps: 1e-3", "eps: -1.0"),
        ("opening: normed", "opnening: normed"),
        (", dim: $dim}", "}"),
    ],
)
def test_the_schema_refuses_mistakes(old: str, new: str) -> None:
    assert check(changed(old, new).replace("1e-3", "0.001"))


def test_parameters_are_described() -> None:
    eps = schema()["$defs"]["node"]["$defs"]["norm.fake"]["properties"]["eps"]
    assert (eps["default"], eps["description"], eps["minimum"]) == (1e-6, "added to the mean square", 0.0)
