"""The public names for docs/api.md: signatures and first sentences, as the code says them."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import titans_graph as tg
from titans_graph.kernels.memory import KERNELS, READS

FUNCTIONS = {
    "Specs and graphs": ("load", "check", "graph", "build", "parse", "compilation", "register"),
    "One memory as a function": ("neural_memory", "neural_memory_packed", "fast_weights", "register_objective"),
    "Looking inside": ("doctor",),
}
CLASSES = (
    *("Model", "Compiled", "State", "Builder", "Graph", "MemoryState", "NetworkBuilder", "Diagnostic"),
    *("TitansGraphError", "SpecError", "InputError", "StateError"),
)
SHOWN = ("__call__",)
"""Special methods that are part of the interface."""
READ = {
    "after": "each token is answered with the weights after its own update (the default)",
    "before": "with the weights from before its own update",
    "chunk": "with the weights its chunk began with",
}
KERNEL = {
    "auto": "`triton` on a GPU where it can, else `portable` (the default)",
    "reference": "token by token, as the equations stand; also under `torch.func` and forward-mode gradients",
    "chunk": "chunks in parallel, in plain PyTorch",
    "compiled": "chunk bodies compiled once per shape; the fastest on a CPU",
    "portable": "`compiled` inside `torch.compile`, `chunk` outside",
    "triton": "the Triton kernels; an error where they do not know the memory",
}


def api() -> str:
    """Everything in ``titans_graph.__all__``, once."""
    listed = [*(name for names in FUNCTIONS.values() for name in names), *CLASSES]
    assert sorted(listed) == sorted(tg.__all__), "give every public name its place in tests/api.py"
    assert (*READ,) == READS, "say in tests/api.py what each way to read means"
    assert (*KERNEL,) == KERNELS, "say in tests/api.py what each kernel is"
    parts: list[str] = []
    for title, names in FUNCTIONS.items():
        parts += [f"## {title}", "", *(line(f"tg.{name}", getattr(tg, name)) for name in names), ""]
        if "neural_memory" in names:
            parts += [*choices("read", READ), "", *choices("kernel", KERNEL), ""]
    for name in CLASSES:
        parts += described(name, getattr(tg, name))
    return "\n".join(parts)


def choices(word: str, meanings: dict[str, str]) -> Iterator[str]:
    """The values of an argument of ``neural_memory``."""
    yield f"`{word}=` of `neural_memory` is one of"
    yield ""
    yield from (f"- `{value!r}`: {meaning}".replace("'", '"') for value, meaning in meanings.items())


def described(name: str, cls: type) -> Iterator[str]:
    """A class: what it is, its fields, its members."""
    yield f"## {name}"
    yield ""
    bases = [base.__name__ for base in cls.__bases__ if base.__name__ in tg.__all__]
    yield sentence(cls) + (f" A `{bases[0]}`." if bases else "")
    yield ""
    found = list(members(name, cls))
    if dataclasses.is_dataclass(cls):
        fields = ", ".join(f"`{f.name}: {f.type}`" for f in dataclasses.fields(cls))
        found = [f"- fields: {fields}", *found]
    if found:
        yield from (*found, "")


def members(name: str, cls: type) -> Iterator[str]:
    """The public methods and properties that a class defines itself, in the order in which they are written."""
    made = not (dataclasses.is_dataclass(cls) or issubclass(cls, Exception)) and name not in ("Model", "Compiled")
    if made:
        yield line(f"tg.{name}", cls)
    for key, raw in vars(cls).items():
        value = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw
        if key.startswith("_") and key not in SHOWN:
            continue
        if isinstance(value, property) and value.fget is not None:
            yield f"- `.{key}: {kind(inspect.signature(value.fget).return_annotation)}`: {sentence(value.fget)}"
        elif inspect.isfunction(value):
            prefix = f"tg.{name}.{key}" if isinstance(raw, staticmethod | classmethod) else f".{key}"
            shown = "model" if (name, key) == ("Model", "forward") else "()" if key == "__call__" else prefix
            yield line(shown, value, bound=not isinstance(raw, staticmethod))


def line(shown: str, value: Any, *, bound: bool = False) -> str:
    """One public name: how it is called, what it gives, and its first sentence."""
    signature = inspect.signature(value)
    parameters = list(signature.parameters.values())[1 if bound else 0 :]
    returned = kind(signature.return_annotation)
    arrow = f" -> {returned}" if returned not in ("", "None") and not inspect.isclass(value) else ""
    return f"- `{'' if shown == '()' else shown}({', '.join(arguments(parameters))}){arrow}`: {sentence(value)}"


def arguments(parameters: list[inspect.Parameter]) -> Iterator[str]:
    """Parameters as a definition writes them."""
    star = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not star:
            yield "*"
            star = True
        mark = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        hint = f": {kind(p.annotation)}" if kind(p.annotation) not in ("", "Any") else ""
        default = "" if p.default is p.empty else f" = {p.default!r}" if hint else f"={p.default!r}"
        yield f"{mark}{p.name}{hint}{default}"


def kind(annotation: Any) -> str:
    """An annotation as it is written."""
    return "" if annotation is inspect.Signature.empty else str(annotation).strip("'\"")


def sentence(value: Any) -> str:
    """The first sentence of a docstring, its code in Markdown."""
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    text = re.sub(r":\w+:`(?:~[\w.]+\.|(?:[a-z_]+\.)+)?([\w.]+)`", r"`\1`", text).replace("``", "`")
    found = re.match(r"(.*?[.])(?:\s+[A-Z`]|$)", text)
    first = found[1] if found else text
    return first if first.endswith((".", ":")) else f"{first}."
