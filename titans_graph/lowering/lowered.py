"""Pass ``lower``: the plan becomes functions, one for each distinct region, and a tree of modules that hold parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from titans_graph.errors import LimitExceeded, SpecError, shortened
from titans_graph.lowering.code import input_names, local_name, lower
from titans_graph.lowering.demand import excess
from titans_graph.passes import Compilation, Pass, Region
from titans_graph.passes.compilation import FlatNode


@dataclass(frozen=True)
class Code:
    """One function: its ``fx`` module, and the ``forward`` that every equal region calls with its own parameters."""

    key: str
    module: fx.GraphModule
    forward: Callable[..., Any]
    regions: tuple[str, ...]

    @property
    def text(self) -> str:
        """The generated Python source, without the lines that only free values."""
        return re.sub(r";\s+[\w = ]+ = None", "", str(self.module.code)).strip()


@dataclass(frozen=True)
class Lowered:
    """The result of lowering: ``modules`` is the tree of components, ``codes`` the functions by key, ``whole`` and
    ``token`` the key of each region of the two programs, in order; ``row`` the bytes of state of one row."""

    modules: nn.Module
    codes: Mapping[str, Code]
    whole: tuple[str, ...]
    token: tuple[str, ...]
    row: int = 0

    def text(self) -> str:
        """All generated functions, each with the regions it serves."""
        parts = []
        for code in self.codes.values():
            body = code.text.replace("def forward(", f"def {code.key}(", 1)
            parts.append(f"# {', '.join(code.regions)}\n{body}")
        return "\n\n\n".join(parts) + "\n"


class Holder(nn.Module):
    """A level of the tree of modules: a block instance, or the whole model. Computes nothing itself."""

    def find(self, path: str) -> nn.Module:
        """The module at a dotted path; the holder itself for the empty one."""
        return self.get_submodule(path)


@dataclass(frozen=True)
class Lower(Pass):
    """Build the components, and write one function for every distinct region."""

    name = "lower"

    def check_before(self, c: Compilation) -> None:
        """There is a plan."""
        assert c.whole is not None
        assert c.token is not None

    def run(self, c: Compilation) -> Compilation:
        """Fill ``lowered``."""
        assert c.whole is not None
        assert c.token is not None
        row = _check_size(c)
        modules = build_modules(c)
        codes: dict[str, Code] = {}
        keys: dict[str, str] = {}
        whole = tuple(_code(c, r, modules, codes, keys) for r in c.whole.regions)
        token = tuple(_code(c, r, modules, codes, keys) for r in c.token.regions)
        return replace(c, lowered=Lowered(modules, codes, whole, token, row))

    def check_after(self, c: Compilation) -> None:
        """Every region has a function."""
        assert c.whole is not None
        assert c.token is not None
        assert len(c.lowered.whole) == len(c.whole.regions)
        assert len(c.lowered.token) == len(c.token.regions)


def build_modules(c: Compilation) -> Holder:
    """The components as a tree of modules that follows the paths (``layers.0.memory``), in order of declaration."""
    root = Holder()
    for name in c.nodes:
        *path, last = name.split(".")
        level: nn.Module = root
        for part in path:
            if part not in level._modules:
                level.add_module(part, Holder())
            level = level.get_submodule(part)
        level.add_module(last, _component(c, name))
    return root


def _component(c: Compilation, name: str) -> nn.Module:
    """The component of a node; SpecError where torch cannot make its tensors."""
    node = c.nodes[name]
    try:
        return node.component(c.sites[name])  # type: ignore[call-arg, return-value]
    except (RuntimeError, MemoryError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise _too_large(node, f"{node.use} of this size cannot be made ({shortened(reason, 200)})") from error


def _too_large(node: FlatNode, message: str) -> SpecError:
    help = "smaller sizes (dim, hidden, heads, layers, vocab), or a machine with more memory"
    return SpecError([LimitExceeded(message, node.span, node.declared, help)])


def _check_size(c: Compilation) -> int:
    """The bytes of state of one row; SpecError where they, or the parameters, are more than the machine has.

    Everything is made once without memory, on torch's device ``meta``: a few milliseconds, whatever the sizes.
    """
    parameters = row = 0
    with torch.device("meta"), torch.no_grad():
        for name in c.nodes:
            module: Any = _component(c, name)
            parameters += sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
            row += sum(t.nbytes for t in module.initial_state(1).values()) if c.nodes[name].component.stateful else 0
            what = f"the model {c.graph.name!r:.100} up to node {c.nodes[name].declared!r:.100}"
            problem = excess(max(parameters, row), what)
            if problem:
                raise _too_large(c.nodes[name], problem)
    return row


def _code(c: Compilation, region: Region, modules: Holder, codes: dict[str, Code], keys: dict[str, str]) -> str:
    """The key of the function for a region; written now unless an equal region came before."""
    signature = _signature(c, region) if c.share else region.name
    if signature in keys:
        code = codes[keys[signature]]
        codes[code.key] = replace(code, regions=(*code.regions, region.name))
        return code.key
    key = _key(region, codes)
    module = fx.GraphModule(modules.find(region.instance), lower(c, region), class_name=key)
    codes[key] = Code(key, module, type(module).forward, (region.name,))
    keys[signature] = key
    return key


def _key(region: Region, codes: Mapping[str, Code]) -> str:
    base = "_".join(p for p in region.name.replace(":", ".").split(".") if not p.isdigit())
    key, count = base, 2
    while key in codes:
        key, count = f"{base}_{count}", count + 1
    return key


def _signature(c: Compilation, region: Region) -> str:
    """Equal for regions that can share one function: same calls in the same wiring, same parameters, same types."""
    parts: list[object] = [region.kind, region.period, input_names(c, region)]
    sources = {ref: f"in{i}" for i, ref in enumerate(region.inputs)}
    for step in region.steps:
        local, site = local_name(region, step.node), c.sites[step.node]
        wiring = [
            (port, [sources.get(ref, local_name(region, ref.node) + "." + ref.port) for ref in c.nodes[step.node].inputs[port]])
            for port in step.stage.inputs
        ]
        types = sorted((port, values) for port, values in site.inputs.items())
        parts.append((local, step.stage, wiring, c.nodes[step.node].use, site.parameters, types, site.segment, site.dim))
        parts.append(sorted(site.used))
    parts.append([local_name(region, ref.node) + "." + ref.port for ref in region.outputs])
    return repr(parts)
