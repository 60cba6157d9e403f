"""Objectives of the user: registered by name, checked, exact in every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import titans_graph as tg
from tests.kernels.test_memory_cases import assert_matches_reference, make
from tests.kernels.test_network_exact import log_cosh
from titans_graph.kernels.memory_objectives import ObjectiveError, parse_objective, register_objective


def cosine(prediction: Tensor, value: Tensor, scale: float, sharp: bool) -> Tensor:
    """One number per token: 1 - cosine, smoothed at zero."""
    dot = (prediction * value).sum(-1)
    lengths = ((prediction.square().sum(-1) + 1e-2) * (value.square().sum(-1) + 1e-2)).sqrt()
    loss = scale * (1 - dot / lengths)
    return loss.square() if sharp else loss


register_objective("test_cosine", cosine, scale=1, sharp=False)


def centred(prediction: Tensor, value: Tensor, centre: bool) -> Tensor:
    """Mixes tokens with ``centre``."""
    error = prediction - value
    return (error - error.mean(-2, keepdim=True) if centre else error).square()


register_objective("test_centred", centred, centre=False)


def fixed(prediction: Tensor, value: Tensor) -> Tensor:
    """Only for coordinates of size 4, and wrong there."""
    return ((prediction - value) @ torch.eye(4)).square().sum(-2)


register_objective("test_fixed", fixed)


def test_its_text_reads_back() -> None:
    objective = parse_objective("test_cosine")
    assert objective.text() == '{"test_cosine": {"scale": 1.0, "sharp": false}}'
    assert parse_objective(objective.text()) == objective
    assert parse_objective({"test_cosine": {"sharp": True}}) != objective
    assert parse_objective({"test_cosine": None}) == objective


@pytest.mark.parametrize("read", ["after", "before", "chunk"])
@pytest.mark.parametrize("network", ["linear", {"mlp": {"hidden": 4, "norm": True}}])
@pytest.mark.parametrize("objective", [{"test_cosine": {"scale": 2}}, {"test_cosine": {"sharp": True}}, "test_log_cosh"])
def test_it_matches_the_reference(network: Any, objective: Any, read: str) -> None:
    assert_matches_reference(make(network, objective, read))


def test_it_works_in_a_call() -> None:
    q, k, v = torch.randn(3, 1, 1, 6, 4)
    given = {"step": torch.full((1, 1, 6), 0.05), "chunk": 3}
    weights = {"w": torch.randn(1, 1, 4, 4)}
    call: Any = tg.neural_memory
    y, _ = call("linear", weights, q, k, v, objective="test_cosine", **given)
    assert y.shape == q.shape


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("test_cosin", "did you mean 'test_cosine'"),
        ("nothing_near", "others with register_objective"),
        ({"test_cosine": {"scal": 1}}, "takes 'scale', 'sharp'"),
        ({"test_cosine": {"scale": True}}, "scale must be a number"),
        ({"test_cosine": {"scale": "big"}}, "scale must be a number"),
        ({"test_cosine": {"scale": float("inf")}}, "scale must be a number"),
        ({"test_cosine": {"sharp": 1}}, "sharp must be true or false"),
    ],
)
def test_wrong_descriptions(description: Any, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        parse_objective(description)


def test_wrong_registrations() -> None:
    register_objective("test_cosine", cosine, scale=1, sharp=False)
    with pytest.raises(ObjectiveError, match="already registered"):
        register_objective("test_cosine", log_cosh, width=1.0)
    with pytest.raises(ObjectiveError, match="already registered"):
        register_objective("l2", cosine, scale=1, sharp=False)
    with pytest.raises(ObjectiveError, match="default of 'scale'"):
        tg.register_objective("test_list", cosine, scale=[1])  # type: ignore[arg-type]
    with pytest.raises(ObjectiveError, match="no name"):
        register_objective("test cosine", cosine)
    with pytest.raises(ObjectiveError, match="needs a function"):
        register_objective("test_nothing", None)  # type: ignore[arg-type]


def parabola(scale: float) -> Callable[..., Tensor]:
    """A loss as a notebook cell defines it: each call another function of the same name."""

    def loss(prediction: Tensor, value: Tensor) -> Tensor:
        return scale * (prediction - value).square()

    return loss


def written(objective: str, kernel: str) -> Tensor:
    """The weights after some tokens."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 6, 3).unbind(0)
    step = torch.full((1, 1, 6), 0.1)
    weights = {"w": torch.randn(1, 1, 3, 3)}
    _, state = tg.neural_memory("linear", weights, q, k, v, step=step, chunk=3, objective=objective, kernel=kernel)
    return state.weights["w"]


@pytest.mark.parametrize(
    "kernel", ["reference", "chunk", pytest.param("compiled", marks=[pytest.mark.compile, pytest.mark.nightly])]
)
def test_a_cell_that_runs_again_gives_its_new_loss(kernel: str) -> None:
    register_objective("test_cell", parabola(3.0), curvature=6.0)
    before = written("test_cell", kernel)
    register_objective("test_cell", parabola(1.0), curvature=2.0)
    assert torch.allclose(written("test_cell", kernel), written("l2", "reference"), atol=1e-5)
    assert not torch.allclose(written("test_cell", kernel), before, atol=1e-2)
    assert parse_objective("test_cell").curvature == 2.0


def test_another_loss_takes_a_name_only_when_asked() -> None:
    register_objective("test_taken", parabola(1.0))
    with pytest.raises(ObjectiveError, match="choose another name, or give replace=True"):
        register_objective("test_taken", lambda p, v: (p - v).square())
    register_objective("test_taken", lambda p, v: (p - v).square(), replace=True, curvature=2.0)
    with pytest.raises(ObjectiveError, match="already registered"):
        register_objective("test_taken", lambda p, v: (p - v).abs())
    with pytest.raises(ObjectiveError, match=r"'l2' is already registered; choose another name$"):
        register_objective("l2", parabola(1.0), replace=True)
    register_objective("test_taken", log_cosh, replace=True, width=1.0)
    assert parse_objective("test_taken").options == (("width", 1.0),)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, v: (p - v).square().mean(),
        lambda p, v: (p - v).square().sum(-2),
        lambda p, v: (p - v).square().mean(0),
        lambda p, v: 1.0,
    ],
)
def test_a_loss_of_the_wrong_shape_is_refused(loss: Any) -> None:
    with pytest.raises(ObjectiveError, match="one number per token or coordinate"):
        register_objective("test_shape", loss)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, v: (p - v - (p - v).mean(-2, keepdim=True)).square(),
        lambda p, v: (p - v).square() / (p - v).abs().max(),
        lambda p, v: (p - v).square() * (p - v).abs().min(),
        lambda p, v: (p - v).square().cumsum(-2),
        lambda p, v: (p - v).square().sum(-1).flip(0),
        lambda p, v: (p - v).square().sum(-1) * torch.rand(2, 3),
        lambda p, v: (p - v + v.mean(-2, keepdim=True)).square(),
        lambda p, v: (p - v).square() * v.flip(-2),
        lambda p, v: (p - v).square() / p.shape[-2],
        lambda p, v: (p - v).square() / len(p),
        lambda p, v: (p - v).square() * torch.arange(1, p.shape[-2] + 1)[:, None],
    ],
)
def test_a_loss_that_mixes_tokens_is_refused(loss: Any) -> None:
    with pytest.raises(ObjectiveError, match="mixes tokens"):
        register_objective("test_mixing", loss)


def test_it_is_tried_with_every_choice_of_options() -> None:
    parse_objective("test_centred")
    for _ in range(2):
        with pytest.raises(ObjectiveError, match="mixes tokens"):
            parse_objective({"test_centred": {"centre": True}})


def test_a_loss_for_one_size_is_tried_at_that_size() -> None:
    """By a call and by a component, whatever it raises at another size."""

    def mixing(p: Tensor, v: Tensor) -> Tensor:
        if p.shape[-1] != 4:
            raise ValueError("four numbers a token")
        return (p - v).softmax(-2).square()

    register_objective("test_one_size", mixing)
    x, weights = torch.zeros(1, 1, 3, 4), {"w": torch.zeros(1, 1, 4, 4)}
    with pytest.raises(ObjectiveError, match="mixes tokens"):
        tg.neural_memory("linear", weights, x, x, x, step=torch.zeros(1, 1, 3), objective="test_one_size")
    b = tg.Builder(dim=8)
    memory = b.add("memory.neural", write=b.input("x", ["B", "T", "dim"]), heads=2, objective="test_one_size")
    b.output(memory.recall)
    with pytest.raises(tg.SpecError, match=r"for keys of size 4: objective 'test_one_size' mixes tokens"):
        b.build()


def test_a_loss_that_computes_in_float32_is_none_that_mixes() -> None:
    """Other shapes differ in its last bits, whatever type it gives."""
    register_objective("test_single", lambda p, v: torch.nn.functional.softplus((p - v).float()).to(p.dtype))
    for dim in range(1, 70):
        parse_objective("test_single").check(dim)


def test_a_misspelt_loss_says_so() -> None:
    with pytest.raises(AttributeError, match="nosuch"):
        register_objective("test_misspelt", lambda p, v: torch.nosuch(p - v))  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_loss_that_knows_one_type_is_tried_in_it(mode: Any) -> None:
    matrix = torch.eye(5)
    with pytest.raises(ObjectiveError, match="mixes tokens"), mode():
        register_objective("test_one_type", lambda p, v: ((p - v) @ matrix).softmax(-2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_loss_would_not_train_is_refused(mode: Any) -> None:
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    with pytest.raises(ObjectiveError, match="requires gradients, and would get none"), mode():
        register_objective("test_trained", lambda p, v: scale * (p - v).square())


def test_lp_of_2_is_l2_where_an_error_is_zero_too() -> None:
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    found = []
    for objective in ("l2", {"lp": {"p": 2}}):
        given = [torch.zeros_like(one).requires_grad_() for _ in range(2)]
        y, _ = tg.neural_memory("linear", {"w": given[0]}, one, one, given[1], step=one[..., 0] / 10, objective=objective)
        found.append(torch.autograd.grad(y.sum(), given))
    assert [x.item() for x in found[0]] == pytest.approx([0.8, 0.2])
    assert found[0] == found[1]


def test_a_loss_for_one_size_is_checked_in_use() -> None:
    with pytest.raises(ObjectiveError, match="one number per token or coordinate"):
        parse_objective("test_fixed").loss(torch.zeros(2, 5, 4), torch.zeros(2, 5, 4))


@pytest.mark.parametrize(
    ("name", "loss", "given", "message"),
    [
        (3, log_cosh, {"width": 1.0}, "no name"),
        ("test_wrong", log_cosh, {"width": float("nan")}, "default of 'width' must be finite"),
        ("test_wrong", log_cosh, {"width": float("inf")}, "default of 'width' must be finite"),
        ("test_wrong", log_cosh, {}, "'width'; give every option with its default"),
        ("test_wrong", log_cosh, {"width": 1.0, "with": 2}, "'with'"),
        ("test_wrong", lambda p: p, {}, "cannot be called so"),
        ("test_wrong", log_cosh, {"width": 1.0, "curvature": -1.0}, "curvature must be"),
        ("test_wrong", log_cosh, {"width": 1.0, "curvature": float("nan")}, "curvature must be"),
        ("test_wrong", log_cosh, {"width": 1.0, "curvature": True}, "curvature must be"),
        ("test_wrong", log_cosh, {"width": 1.0, "curvature": lambda: 1.0}, "cannot be called so"),
        ("test_wrong", log_cosh, {"width": 1.0, "curvature": lambda width: "big"}, "curvature must be"),
    ],
)
def test_registrations_that_would_fail_later(name: Any, loss: Any, given: Any, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        register_objective(name, loss, **given)


def test_curvature() -> None:
    register_objective("test_curved", log_cosh, width=1.0, curvature=lambda width: 1 / width**2)
    register_objective("test_fixed_curve", log_cosh, width=1.0, curvature=7)
    found: list[Any] = [
        "l2",
        "dot",
        "huber",
        "lp",
        {"lp": {"p": 2}},
        "test_cosine",
        {"test_curved": {"width": 0.5}},
        "test_fixed_curve",
    ]
    assert [parse_objective(d).curvature for d in found] == [2, 0, 1, None, 2, None, 4, 7]
    error = torch.linspace(-3, 3, 101, dtype=torch.float64, requires_grad=True)
    for description in ("l2", "dot", "huber", {"test_curved": {"width": 0.5}}):
        objective = parse_objective(description)
        (first,) = torch.autograd.grad(objective.loss(error, torch.zeros(101).double()), error, create_graph=True)
        second = torch.autograd.grad(first.sum(), error)[0] if first.requires_grad else torch.zeros(1)
        assert objective.curvature is not None
        assert second.abs().max() == pytest.approx(objective.curvature, abs=1e-9)
