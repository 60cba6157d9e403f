"""Objectives of a neural memory: the loss whose gradient is the surprise (arXiv 2501.00663, equation 12).

Every objective is a function of one token's prediction and value, summed over tokens: then each token's delta is its own. The
table holds the project's; :func:`register_objective` adds one of the user's.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, cast

from titans_graph.errors import UsageError, shortened

if TYPE_CHECKING:
    from torch import Tensor

Plain = int | float | bool | str | None
Loss = Callable[..., "Tensor"]
Curvature = float | Callable[..., float | None] | None


class ObjectiveError(UsageError):
    """The description of a memory objective cannot be understood; the message says what is allowed.

    ``path`` leads to the place in the description: keys from the outside in.
    """

    def __init__(self, message: str, *path: str) -> None:
        super().__init__(shortened(message))
        self.path = path


@dataclass(frozen=True)
class Objective:
    """One objective: its name and its options, complete with defaults, sorted, hashable."""

    name: str
    options: tuple[tuple[str, Plain], ...] = ()

    def loss(self, prediction: Tensor, value: Tensor) -> Tensor:
        """The summed loss of ``prediction`` against ``value``, both ``[..., d]``; a scalar."""
        entry = _TABLE[self.name]
        losses = entry.loss(prediction, value, **dict(self.options))
        if not entry.own:
            _check_losses(self.name, losses, prediction)
        return losses.sum()

    def check(self, dim: int) -> None:
        """An :class:`ObjectiveError` where a loss of the user's mixes tokens of that size."""
        if not self.own:
            _check_tokens(self.name, _TABLE[self.name].loss, self.options, dim)

    @property
    def own(self) -> bool:
        """Whether it is one of the project's, which every process knows, and not registered in this one."""
        return _TABLE[self.name].own

    @property
    def curvature(self) -> float | None:
        """A bound of the second derivative of a token's loss by its prediction; None where none is known."""
        bound = _TABLE[self.name].curvature
        return bound(**dict(self.options)) if callable(bound) else bound

    def text(self) -> str:
        """The canonical description: ``l2``, ``dot``, or JSON such as ``{"huber": {"delta": 1.0}}``."""
        return json.dumps({self.name: dict(self.options)}) if self.options else self.name

    def description(self) -> Any:
        """The objective as plain data."""
        return {self.name: dict(self.options)} if self.options else self.name


def _check_losses(name: str, losses: Any, prediction: Tensor) -> None:
    """A mean or a sum over tokens would scale or mix them without a word; a number per token or coordinate cannot."""
    shape = getattr(losses, "shape", None)
    if shape is None or (shape != prediction.shape and shape != prediction.shape[:-1]):
        got = f"shape {list(shape)}" if shape is not None else f"{type(losses).__name__}"
        raise ObjectiveError(
            f"objective {name!r} gave {got} for predictions of shape {list(prediction.shape)}; it must give one number per "
            "token or coordinate, without a sum or mean over tokens",
            name,
        )


def _check_tokens(name: str, loss: Loss, options: tuple[tuple[str, Plain], ...], dim: int = 5) -> None:
    """Try the loss on sizes that all differ, tokens of ``dim``: the shape must fit, and no token's loss may depend on another
    token, on how many there are, or on something that is trained."""
    import torch

    if torch.compiler.is_compiling() or (name, loss, options, dim) in _TRIED:
        return
    for dtype in (torch.float64, torch.float32):
        with torch.inference_mode(False), torch.enable_grad():
            numbers = torch.arange(12 * dim, dtype=torch.float64, device="cpu").mul(1.7).sin().to(dtype)
            try:
                _try(name, partial(loss, **dict(options)), *numbers.view(2, 2, 3, dim))
                break
            except (ObjectiveError, NameError, AttributeError):
                raise
            except Exception:  # Made for one size, type or device: what it is used on decides.
                continue
    _TRIED.add((name, loss, options, dim))


def _try(name: str, run: Loss, prediction: Tensor, value: Tensor) -> None:
    before = run(prediction, value)
    _check_losses(name, before, prediction)
    mixed = any(not _same(run(*changed)[others], before[others]) for *changed, others in _changed(prediction, value))
    _refuse(name, mixed, before.requires_grad)
    # Fewer tokens, and those that are left at another place.
    few = run(prediction[1:, 1:2], value[1:, 1:2])
    _refuse(name, few.shape != before[1:, 1:2].shape or not _same(few, before[1:, 1:2]), False)


def _refuse(name: str, mixed: bool, trained: bool) -> None:
    if mixed:
        raise ObjectiveError(
            f"objective {name!r} mixes tokens: with one token's prediction or value changed, or some tokens left out, the "
            "losses of others change too; a loss takes no mean, sum, maximum or statistics over tokens, does not count or "
            "number them and draws nothing at random",
            name,
        )
    if trained:
        raise ObjectiveError(
            f"objective {name!r} uses a tensor that requires gradients, and would get none: the memory's kernels "
            "differentiate by prediction and value alone; detach it, or give numbers as options",
            name,
        )


def _same(a: Tensor, b: Tensor) -> bool:
    import torch

    # A loss may compute in float32 whatever it is given, where other shapes differ in the last bits.
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def _changed(prediction: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Predictions and values with one token's prediction or value far from the other, or at it; and which tokens are others."""
    for token in range(prediction[..., 0].numel()):
        for far in (0.0, 10.0):
            changed, target = prediction.clone(), value.clone()
            changed.flatten(0, -2)[token] = value.flatten(0, -2)[token] + far
            target.flatten(0, -2)[token] = prediction.flatten(0, -2)[token] - far
            others = (changed == prediction).all(-1)
            yield changed, value, others
            yield prediction, target, others


_TRIED: set[tuple[str, Loss, tuple[tuple[str, Plain], ...], int]] = set()
"""Losses of users, with options and a size, that were found to keep tokens apart, or could not be tried."""


@dataclass(frozen=True)
class _Entry:
    """``curvature`` as in :func:`register_objective`; ``least`` bounds each option from below; ``own``: the project's."""

    loss: Loss
    options: Mapping[str, Plain]
    curvature: Curvature
    least: float = -sys.float_info.max
    own: bool = True


def _l2(prediction: Tensor, value: Tensor) -> Tensor:
    return (prediction - value).square()


def _dot(prediction: Tensor, value: Tensor) -> Tensor:
    return -prediction * value


def _huber(prediction: Tensor, value: Tensor, delta: float) -> Tensor:
    """e^2 / 2 up to ``delta``, then delta * (|e| - delta / 2). Written with a clamp: one formula on both sides."""
    error = prediction - value
    near = error.clamp(-delta, delta)
    return near * (error - near / 2)


def _lp(prediction: Tensor, value: Tensor, p: float) -> Tensor:
    error = prediction - value
    # The second derivative of the power of a size is 0 at 0, as it should be above p = 2; there it is 2.
    return error.square() if p == 2.0 else error.abs().pow(p)


_TABLE: dict[str, _Entry] = {
    "l2": _Entry(_l2, {}, 2.0),
    "dot": _Entry(_dot, {}, 0.0),
    "huber": _Entry(_huber, {"delta": 1.0}, 1.0, 1e-6),
    # Below p = 2 the curvature is infinite where the error is zero, so gradients through the memory would not exist.
    # Above it the curvature grows with the error, without bound.
    "lp": _Entry(_lp, {"p": 3.0}, lambda p: 2.0 if p == 2.0 else None, 2.0),
}


REPLACED: list[Callable[[], None]] = []
"""What to call when an objective takes another's place: whoever keeps something made from a loss forgets it."""


def register_objective(name: str, loss: Loss, *, curvature: Curvature = None, replace: bool = False, **options: Plain) -> None:
    """Make ``loss`` an objective that specs call ``name``.

    ``loss(prediction, value, **options)`` gets tensors ``[..., d]`` and gives ``[..., d]`` or ``[...]``; what is left is
    summed. Tokens stand on the axes before the last and must not be mixed: no mean, no sum, no statistics over them.
    ``options`` are its options with their defaults, whose types a spec must keep; ``{name: {option: value}}`` sets them.

    Training differentiates through the memory's own gradients, so the loss is differentiated twice: where its second
    derivative does not exist or is infinite (``abs().sqrt()`` at 0, a norm without an epsilon), gradients are NaN; where it
    is zero everywhere (``abs``, hinges), they do not see the prediction. Smooth such a loss, as ``huber`` does. It is
    traced for chunks of any content: no branches on values, no ``.item()``.

    ``curvature`` bounds the second derivative of a token's loss by its prediction, for every prediction and value: the
    largest size of an eigenvalue of the matrix of second derivatives, for a loss per coordinate of the largest one. It is a
    number, or a function of the options that gives a number or None. ``l2`` has 2 and the step cap is derived for it: above
    2 the cap is multiplied by 2 / curvature, below it stays as it is. None: no bound is known; the cap is that of ``l2``, and
    the doctor does not judge the step.

    The same name may be registered again by a function of the same module and name (a notebook cell that runs twice), by
    another one with ``replace``, never that of one of the project's. Models then take the new loss, except those that went
    through ``model.compile()`` before: compile them again.

    Raises :class:`ObjectiveError` where the name is taken by another function, an option has no plain finite default, the
    loss cannot be called with them, mixes tokens (it is tried on a few numbers: here, with each choice of options, and at
    the size that it is used with), or uses a tensor that requires gradients, which the kernels do not give. The memory of other
    processes does not know it: register it where a module is imported that they import too.
    """
    _check_registration(name, loss, curvature, options)
    defaults = {key: _coerced(default, default) for key, default in sorted(options.items())}
    entry = _Entry(loss, defaults, curvature, own=False)
    old = _TABLE.get(name, entry)
    if old.own or not (replace or old == entry or _same_place(old.loss, loss)):
        mend = "choose another name" if old.own else "choose another name, or give replace=True"
        raise ObjectiveError(f"objective {name!r} is already registered; {mend}")
    _check_curvature(name, entry, tuple(defaults.items()))
    _check_tokens(name, loss, tuple(defaults.items()))
    _TABLE[name] = entry
    if old != entry:
        for forget in (_parse_text.cache_clear, *REPLACED):
            forget()


def _same_place(old: Any, new: Any) -> bool:
    """Whether two functions are one that was defined twice; lambdas have no name to tell."""
    places = [(getattr(f, "__module__", None), getattr(f, "__qualname__", "<lambda>")) for f in (old, new)]
    return places[0] == places[1] and "<lambda>" not in places[0][1]


def _check_registration(name: Any, loss: Any, curvature: Any, options: Mapping[str, Any]) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise ObjectiveError(f"{name!r} is no name for an objective: a word of letters, digits and '_', a letter first")
    for key, default in options.items():
        if not isinstance(default, int | float | bool | str):
            raise ObjectiveError(f"objective {name!r}: the default of {key!r} must be a number, a word, true or false")
        if isinstance(default, int | float) and not math.isfinite(default):
            raise ObjectiveError(f"objective {name!r}: the default of {key!r} must be finite, not {default}")
    if not callable(loss):
        raise ObjectiveError(f"objective {name!r} needs a function loss(prediction, value), not {loss!r:.60}")
    for function, given in ((loss, (None, None)), (curvature, ())):
        try:
            inspect.signature(function).bind(*given, **options) if callable(function) else None
        except ValueError:
            continue  # a function of C without a signature
        except TypeError as problem:
            what = "loss(prediction, value, **options)" if function is loss else "curvature(**options)"
            raise ObjectiveError(
                f"objective {name!r}: {what} cannot be called so, {problem}; give every option with its default"
            ) from None


def _check_curvature(name: str, entry: _Entry, options: tuple[tuple[str, Plain], ...]) -> None:
    bound: Any = entry.curvature(**dict(options)) if callable(entry.curvature) else entry.curvature
    number = isinstance(bound, int | float) and not isinstance(bound, bool)
    if bound is not None and not (number and 0 <= bound < math.inf):
        raise ObjectiveError(f"objective {name!r}: curvature must be a finite number of at least 0, or None, not {bound!r:.60}")


def parse_objective(description: str | Mapping[str, Any] | Objective) -> Objective:
    """An objective from ``"l2"``, ``"dot"``, ``{"huber": {"delta": 1.0}}``, ``{"lp": {"p": 3}}``, or their JSON text.

    Raises :class:`ObjectiveError` for unknown names and options and for values out of range.
    """
    if isinstance(description, Objective):
        return description
    if isinstance(description, str):
        return _parse_text(description)
    return _parse(description)


@lru_cache(maxsize=64)
def _parse_text(text: str) -> Objective:
    if not text.lstrip().startswith("{"):
        return _parse({text.strip().strip('"'): {}})
    try:
        return _parse(json.loads(text))
    except (ValueError, RecursionError) as problem:
        raise ObjectiveError(f"objective {text!r:.200} is not JSON: {problem}") from None


def _parse(description: Any) -> Objective:
    if not isinstance(description, Mapping) or len(description) != 1:
        raise ObjectiveError(f"an objective is a name or one {{name: options}}, not {description!r:.200}")
    name, given = next(iter(description.items()))
    if name not in _TABLE:
        close = difflib.get_close_matches(str(name), _TABLE, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        message = f"unknown objective {name!r:.60}{meant}; known here: {', '.join(_TABLE)}; others with register_objective"
        raise ObjectiveError(message, str(name))
    entry = _TABLE[name]
    given = {} if given is None else given
    if not isinstance(given, Mapping) or set(given) - set(entry.options):
        allowed = ", ".join(map(repr, entry.options)) or "no option"
        raise ObjectiveError(f"objective {name!r} takes {allowed}, not {given!r:.200}", name)
    options = tuple((key, _value(name, key, entry, given)) for key in entry.options)
    if not entry.own:
        _check_curvature(name, entry, options)
        _check_tokens(name, entry.loss, options)
    return Objective(name, options)


def _value(name: str, key: str, entry: _Entry, given: Mapping[str, Any]) -> Plain:
    default = entry.options[key]
    value = _coerced(given.get(key, default), default)
    inside = entry.least <= value < math.inf if isinstance(value, float) else True
    if type(value) is not type(default) or not inside:
        wanted = {bool: "true or false", str: "a word"}.get(type(default), "a number")
        bound = f" of at least {entry.least:g}" if entry.own else ""
        raise ObjectiveError(f"{name}: {key} must be {wanted}{bound}, not {given[key]!r:.60}", name, key)
    return value


def _coerced(value: Any, default: Plain) -> Plain:
    """Numbers as floats where the default is one; true and false are no numbers."""
    if isinstance(default, bool) or isinstance(value, bool) or not isinstance(value, int | float):
        return cast(Plain, value)
    return float(value)
