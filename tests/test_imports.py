"""The import order of the house, checked on the source: a module imports only from its left.

    errors -> shapes -> parameters -> registry -> ir -> spec -> builder -> passes -> lowering -> runtime
        -> { training, tasks, viz, hf, testing } -> cli
    kernels: torch, triton, errors           components: registry, shapes, errors, kernels, torch; never each other

Imports inside functions and under ``TYPE_CHECKING`` count for the order too; only the ban on torch looks at what runs
when a module is imported.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "titans_graph"

# Modules of one row may import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("shapes",),
    ("parameters",),
    ("registry",),
    ("ir",),
    ("spec",),
    ("builder",),
    ("passes",),
    ("lowering",),
    ("runtime",),
    ("training", "tasks", "viz", "hf", "testing", "bench"),
    ("loading",),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
# Mistakes of syntax and names print at once: these modules, and the package itself, do not wait for torch.
WITHOUT_TORCH = ("", *(name for row in LAYERS[: RANK["passes"] + 1] for name in row))
HEAVY = ("torch", "triton", f"{PACKAGE}.components", f"{PACKAGE}.kernels")
# What the two folders beside the package may import besides the standard library.
KERNELS_MAY = ("torch", "triton", *(f"{PACKAGE}.{name}" for name in ("errors", "shapes", "kernels")))
COMPONENTS_MAY = ("torch", *(f"{PACKAGE}.{name}" for name in ("registry", "shapes", "errors", "kernels")))


@dataclass(frozen=True)
class Import:
    """One imported module: its line, its full name, and whether it is imported when the importing module is."""

    line: int
    name: str
    at_import: bool


def imports(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[Import]:
    """Every import of a module with relative names resolved; ``from a import b`` gives ``a.b``."""

    def walk(nodes: list[ast.stmt], at_import: bool) -> Iterator[Import]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (Import(node.lineno, alias.name, at_import) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = absolute(node, module, is_package=is_package)
                yield from (Import(node.lineno, f"{base}.{alias.name}", at_import) for alias in node.names)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from walk(node.body, False)
                yield from walk(node.orelse, at_import)
            else:
                inside = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                yield from walk(statements_in(node), inside)

    yield from walk(tree.body, True)


def statements_in(node: ast.AST) -> list[ast.stmt]:
    """The statements directly inside a node, through handlers and cases."""
    found: list[ast.stmt] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            found.append(child)
        elif isinstance(child, ast.ExceptHandler | ast.match_case):
            found += statements_in(child)
    return found


def absolute(node: ast.ImportFrom, module: str, *, is_package: bool) -> str:
    """The module a ``from`` statement names, without leading dots."""
    if node.level == 0:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*base, *([node.module] if node.module else [])])


def layer_of(name: str) -> str:
    """The part after the package's name; empty for the package itself."""
    return name.split(".")[1] if "." in name else ""


def within(name: str, roots: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the roots or lies under one."""
    return any(name == root or name.startswith(root + ".") for root in roots)


def violations(source: str, module: str, path: str, *, is_package: bool = False) -> list[str]:
    """What a module imports and must not, as ``path:line: why``."""
    layer = layer_of(module)
    check: Callable[[str, Import], str]
    if layer == "kernels":
        check = kernel_problem
    elif layer == "components":
        check = component_problem
    elif layer == "" or layer in RANK:
        check = layer_problem
    else:
        return [f"{path}:1: {layer!r} has no place in the import order: add it to LAYERS in tests/test_imports.py"]
    found = []
    for item in imports(ast.parse(source), module, is_package=is_package):
        bare = within(item.name, ("components", "kernels", "specs"))
        why = f"import {item.name} as {PACKAGE}.{item.name}" if bare else check(layer, item)
        if why:
            found.append(f"{path}:{item.line}: {why}")
    return found


def kernel_problem(_: str, item: Import) -> str:
    """Kernels stand alone."""
    if within(item.name, KERNELS_MAY) or item.name.split(".")[0] in sys.stdlib_module_names:
        return ""
    return f"a kernel must not import {item.name}"


def component_problem(_: str, item: Import) -> str:
    """Components know their registry and the kernels, not each other and not the graph they are used in."""
    if within(item.name, COMPONENTS_MAY) or item.name.split(".")[0] in sys.stdlib_module_names:
        return ""
    if within(item.name, (f"{PACKAGE}.components",)):
        return f"a component must not import another ({item.name}): shared arithmetic belongs into kernels"
    return f"a component must not import {item.name}"


def layer_problem(layer: str, item: Import) -> str:
    """Modules of the package import from their left, and the early ones do not import torch."""
    if item.at_import and layer in WITHOUT_TORCH and within(item.name, HEAVY):
        return f"{layer or PACKAGE} must not import {item.name} when it is imported itself"
    if not within(item.name, (PACKAGE,)) or layer == "":
        return ""
    target = layer_of(item.name)
    if target in (layer, "components", "kernels", "specs", "__version__") or target in RANK:
        return f"{layer} must not import {item.name}, which comes later" if RANK.get(target, -1) > RANK[layer] else ""
    if RANK[layer] >= RANK["training"]:
        return ""  # the last rows may use the public namespace
    return f"import {target!r} from the module that defines it, not from {PACKAGE}"


def sources() -> Iterator[tuple[Path, str]]:
    """Every source file with its module name; the links into the package are not followed."""
    for top in (PACKAGE, "components", "kernels"):
        for folder, _, names in os.walk(ROOT / top, followlinks=False):
            for name in sorted(n for n in names if n.endswith(".py")):
                path = Path(folder, name)
                parts = list(path.relative_to(ROOT).with_suffix("").parts)
                if parts[0] != PACKAGE:
                    parts.insert(0, PACKAGE)
                if parts[-1] == "__init__":
                    parts.pop()
                yield path, ".".join(parts)


def test_every_module_imports_only_from_its_left() -> None:
    found: list[str] = []
    for path, module in sources():
        name = str(path.relative_to(ROOT))
        found += violations(path.read_text(encoding="utf-8"), module, name, is_package=path.name == "__init__.py")
    assert not found, "\n" + "\n".join(found)


def test_early_modules_do_not_bring_torch() -> None:
    """The same through everything they import, third parties too."""
    early = [m for _, m in sources() if layer_of(m) in WITHOUT_TORCH]
    program = "import importlib, sys\n[importlib.import_module(m) for m in sys.argv[1:]]\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, *early], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False", f"one of {early} imports torch"


@pytest.mark.parametrize(
    ("module", "source", "line"),
    [
        ("titans_graph.shapes", "from titans_graph import ir", 1),
        ("titans_graph.shapes", "from titans_graph.ir.model import Graph", 1),
        ("titans_graph.registry", "def f():\n    import titans_graph.ir", 2),
        ("titans_graph.spec.loader", "from ..passes import run", 1),
        ("titans_graph.spec.loader", "from . import x\ntry:\n    pass\nexcept E:\n    from .. import runtime", 5),
        ("titans_graph.runtime.model", "import titans_graph.cli", 1),
        ("titans_graph.passes.shape", "import torch", 1),
        ("titans_graph.passes.shape", "class A:\n    from torch import Tensor", 2),
        ("titans_graph.passes.shape", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch", 4),
        ("titans_graph.passes.shape", "from titans_graph.kernels import scan", 1),
        ("titans_graph", "import torch.nn", 1),
        ("titans_graph.ir.model", "from titans_graph import Graph", 1),
        ("titans_graph.stray", "", 1),
        ("titans_graph.runtime.model", "import kernels.scan", 1),
        ("titans_graph.kernels.scan", "from titans_graph.registry import Site", 1),
        ("titans_graph.kernels.scan", "import numpy", 1),
        ("titans_graph.components.gate", "from titans_graph.components import memory", 1),
        ("titans_graph.components.gate", "from titans_graph.ir import Graph", 1),
        ("titans_graph.components.gate", "from . import memory", 1),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str, line: int) -> None:
    (found,) = violations(source, module, "some.py")
    assert found.startswith(f"some.py:{line}: ")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("titans_graph.shapes", "if TYPE_CHECKING:\n    from torch import Tensor"),
        ("titans_graph.registry", "def f():\n    import titans_graph.components.gate"),
        ("titans_graph.spec.loader", "from ..errors import suggest\nfrom . import limits\nimport yaml"),
        ("titans_graph.passes.shape", "def f():\n    import torch"),
        ("titans_graph.lowering.torch", "import torch\nfrom titans_graph.kernels import scan"),
        ("titans_graph.training.loop", "from titans_graph.tasks import text"),
        ("titans_graph.cli.demo", "from titans_graph import compile_graph, __version__"),
        ("titans_graph.kernels.scan", "import math, triton.language as tl\nfrom titans_graph.errors import InputError"),
        ("titans_graph.kernels.scan", "from titans_graph.kernels import timeline\nfrom . import timeline"),
        (
            "titans_graph.components.gate",
            "from titans_graph.kernels import timeline\nfrom titans_graph.shapes import Value",
        ),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert violations(source, module, "some.py") == []
