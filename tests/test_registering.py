"""Components of one's own: registered in Python, or found through entry points; what is broken says where it is from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import titans_graph as tg
from titans_graph import registry
from titans_graph.cli import main
from titans_graph.errors import PluginError, UsageError
from titans_graph.registry import Component, Port, Site, parameter
from titans_graph.shapes import Value, stream


class Double(Component, nn.Module):
    """Twice the stream, or more."""

    @dataclass(frozen=True)
    class Parameters:
        """How much."""

        by: int = parameter(2, doc="the factor", reason="the name says so", minimum=1)

    inputs = (Port("x", "the stream"),)

    @classmethod
    def infer(cls, site: Site) -> dict[str, Value]:
        return {"out": stream(site.features("x"), "out")}

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.by: int = site.parameters.by

    def forward(self, x: Tensor) -> Tensor:
        """-> ``[B, T, dim]``."""
        return self.by * x


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_REGISTERED", {})
    registry.lookup.cache_clear()
    registry._plugins.cache_clear()
    yield
    registry.lookup.cache_clear()
    registry._plugins.cache_clear()


def block(use: str, **parameters: Any) -> tg.Model:
    b = tg.Builder(dim=4)
    b.output(b.add(use, b.input("x", ["B", "T", "dim"]), name="y", **parameters))
    model: tg.Model = b.build()
    return model


def test_a_registered_component_is_used_and_checked_like_a_built_in_one(tmp_path: Path) -> None:
    assert tg.register("mine.double", Double) is Double
    x = torch.randn(1, 3, 4)
    assert torch.equal(block("mine.double", by=3)(x)[0], 3 * x)
    path = tmp_path / "spec.yaml"
    text = "titans_graph: 1\ninput: {x: [B, T, 4]}\nnodes:\n  y: {use: mine.%s, in: x, by: %s}\noutput: y\n"
    path.write_text(text % ("double", 0))
    (found,) = tg.check(path)
    assert found.message == "parameter 'by' must be at least 1, got 0"
    path.write_text(text % ("duoble", 1))
    (found,) = tg.check(path)
    assert found.help == "did you mean 'mine.double'?"


def test_a_cell_that_runs_again_registers_its_new_class(tmp_path: Path) -> None:
    tg.register("mine.double", Double)
    old: Any = block("mine.double")
    again = type("Double", (Double,), {"__qualname__": Double.__qualname__, "__module__": Double.__module__})
    tg.register("mine.double", again)
    assert registry.lookup("mine.double") is again
    new: Any = block("mine.double")
    assert type(new.body.y) is again
    assert type(old.body.y) is Double


def test_another_class_is_refused_unless_it_shall_replace() -> None:
    tg.register("mine.double", Double)
    other = type("Other", (Double,), {})
    with pytest.raises(UsageError, match=r"is registered as .*Double; choose another id, or give replace=True"):
        tg.register("mine.double", other)
    tg.register("mine.double", other, replace=True)
    assert registry.lookup("mine.double") is other


@pytest.mark.parametrize("name", ["", "Mine", "mine.", "a b", ".x", 3, None])
def test_an_id_is_words_joined_by_dots(name: Any) -> None:
    with pytest.raises(UsageError, match="is no id for a component"):
        tg.register(name, Double)


def test_a_built_in_component_is_not_replaced() -> None:
    with pytest.raises(UsageError, match=r"'add' is a built-in component; choose another id, such as 'mine.add'"):
        tg.register("add", Double, replace=True)


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"Parameters": None}, "Parameters must be a dataclass"),
        ({"inputs": ["x"]}, "must be tuples of titans_graph.registry.Port"),
        ({"outputs": ()}, "outputs is empty"),
        ({"inputs": (Port("by", "x"),)}, "the name 'by' of a port or parameter of Odd is taken"),
        ({"inputs": (Port("in", "x"),)}, "the name 'in' of a port"),
        ({"infer": Component.infer}, r"has no infer\(cls, site\)"),
        ({"forward": None}, "has no forward"),
    ],
)
def test_a_class_that_lacks_part_of_the_contract_is_refused(attributes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        tg.register("mine.odd", type("Odd", (Double,), attributes))
    assert not registry.known("mine.odd")


@pytest.mark.parametrize("odd", [nn.Linear, Double.Parameters(), "mod:Class"])
def test_what_is_no_component_is_refused(odd: Any) -> None:
    with pytest.raises(UsageError, match=r"is not a class under titans_graph\.registry\.Component"):
        tg.register("mine.odd", odd)


def install(folder: Path, *entries: str) -> None:
    """A distribution with entry points, as an installer leaves it."""
    info = folder / "mine-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("\n".join(["[titans_graph.components]", *entries, ""]))


BROKEN = {
    "nowhere_mod:X": "cannot be imported: ModuleNotFoundError: No module named 'nowhere_mod'",
    "titans_graph.shapes:Nothing": "cannot be imported: AttributeError: module 'titans_graph.shapes' has no attribute",
    "titans_graph.shapes:Value": "is no component: <class 'titans_graph.shapes.Value'> is not a class under",
    "mine_raises:X": "cannot be imported: ZeroDivisionError",
}


@pytest.mark.parametrize("target", BROKEN)
def test_a_broken_entry_point_is_named_with_its_distribution(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine_raises.py").write_text("1 / 0\n")
    install(tmp_path, f"mine.gone = {target}")
    monkeypatch.syspath_prepend(tmp_path)
    spec = tmp_path / "spec.yaml"
    spec.write_text("titans_graph: 1\ninput: {x: [B, T, 4]}\nnodes:\n  y: {use: mine.gone, in: x}\noutput: y\n")
    for call in (tg.check, tg.load):
        with pytest.raises(PluginError) as caught:
            call(spec)
    text = str(caught.value)
    assert f"the entry point 'mine.gone = {target}' of the distribution mine 1.5" in text
    assert BROKEN[target] in text
    assert "help: correct the entry point or what it imports and install mine again, or uninstall mine" in text
    assert main(["check", str(spec)]) == 1
    assert capsys.readouterr().err == f"error: {text}\n"
    assert main(["check", "blocks/lmm"]) == 0  # what does not use it is not touched by it


def test_an_installed_component_is_found_and_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, f"mine.double = {__name__}:Double")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, __name__, __import__("types").SimpleNamespace(Double=Double))
    x = torch.randn(1, 2, 4)
    assert torch.equal(block("mine.double")(x)[0], 2 * x)
    with pytest.raises(UsageError, match=r"of the distribution mine 1\.5; choose another id"):
        tg.register("mine.double", Double)
