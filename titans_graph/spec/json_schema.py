"""A JSON Schema of the spec language, from the registry: for editors that complete and check YAML while one types.

It is looser than the loader where a schema cannot follow: references are any text, and every value may be a formula.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from titans_graph import registry
from titans_graph.ir.limits import MAX_REPEAT
from titans_graph.spec.load import VERSION

_FORMULA = {"type": "string", "pattern": r"\$", "description": "a formula: $name, $name * 4"}
_REFERENCE = {"type": "string", "description": "name or name.port"}
_MANY = {"anyOf": [_REFERENCE, {"type": "array", "items": _REFERENCE}]}
_WORDS: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def schema() -> dict[str, Any]:
    """The schema (draft 2020-12): one branch per registered component, which are all imported."""
    frame = {
        "parameters": {"type": "object", "description": "parameters with their defaults"},
        "input": {"type": "object", "additionalProperties": {"$ref": "#/$defs/axes"}},
        "segment": {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}, _FORMULA]},
        "nodes": {"type": "object", "additionalProperties": {"$ref": "#/$defs/node"}},
        "output": {"anyOf": [_REFERENCE, {"type": "object", "additionalProperties": _REFERENCE}]},
    }
    needed = ["input", "nodes", "output"]
    block = {"type": "object", "properties": frame, "required": needed, "additionalProperties": False}
    top = {
        "titans_graph": {"const": VERSION, "description": "version of the language"},
        "name": {"type": "string"},
        **frame,
        "blocks": {"type": "object", "additionalProperties": {"$ref": "#/$defs/block"}},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "titans_graph spec",
        "type": "object",
        "properties": top,
        "required": ["titans_graph", *needed],
        "additionalProperties": False,
        "$defs": {
            "axes": {"type": "array", "items": {"type": ["integer", "string"]}, "minItems": 2, "maxItems": 3},
            "block": block,
            "node": _node(),
        },
    }


def _node() -> dict[str, Any]:
    """A node: the branch of its component, or anything for a block."""
    names = registry.names()
    branches: list[dict[str, Any]] = [
        {"if": {"properties": {"use": {"const": name}}}, "then": {"$ref": f"#/$defs/node/$defs/{name}"}} for name in names
    ]
    return {
        "type": "object",
        "properties": {"use": {"type": "string", "examples": names}},
        "required": ["use"],
        "allOf": branches,
        "$defs": {name: _component(name) for name in names},
    }


def _component(name: str) -> dict[str, Any]:
    """The keys a node that uses the component may have."""
    found = registry.lookup(name)
    hints = registry.parameter_types(found.Parameters)
    repeat = {"anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_REPEAT}, _FORMULA]}
    keys: dict[str, Any] = {"use": {"const": name}, "repeat": {**repeat, "description": "copies, one after the other"}}
    if found.inputs:
        keys["in"] = {**_MANY, "description": found.inputs[0].doc}
    keys.update({port.name: {**_MANY, "description": port.doc} for port in found.inputs})
    fields = dataclasses.fields(found.Parameters)
    keys.update({field.name: _parameter(field, hints[field.name]) for field in fields})
    needed = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    described = {"description": (found.__doc__ or name).split("\n", 1)[0]}
    return {**described, "type": "object", "properties": keys, "required": needed, "additionalProperties": False}


def _parameter(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """A parameter: its type, range, choices, default and what it means; or a formula."""
    meta = field.metadata
    rules: dict[str, Any] = {"anyOf": [*({"type": word} for word in _types(hint)), _FORMULA]} if _types(hint) else {}
    if meta.get("choices"):
        rules = {"anyOf": [{"enum": list(meta["choices"])}, _FORMULA]}
    rules.update({key: meta[key] for key in ("minimum", "maximum") if meta.get(key) is not None})
    if field.default is not dataclasses.MISSING:
        rules["default"] = field.default
    return {**rules, "description": " ".join(filter(None, (meta.get("doc", ""), meta.get("reason", ""))))}


def _types(hint: Any) -> list[str]:
    """JSON's words for an annotated type; none where anything goes."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = [_types(option) for option in typing.get_args(hint)]
        return [word for words in options for word in words] if all(options) else []
    if typing.get_origin(hint) in (Mapping, dict):
        return ["object"]
    return [_WORDS[hint]] if hint in _WORDS else []
