"""What a training run is: its settings, their reasons, and the learning rate of every step."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from titans_graph.errors import UsageError, suggest


def setting(
    default: Any,
    *,
    doc: str,
    reason: str,
    minimum: float | None = None,
    choices: tuple[str, ...] = (),
    free: bool = False,
) -> Any:
    """A field of :class:`TrainConfig`. ``free`` settings do not touch the weights: they may change on a resume."""
    metadata = {"doc": doc, "reason": reason, "minimum": minimum, "choices": choices, "free": free}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; each default has its reason in the field's metadata. UsageError where a value cannot work."""

    steps: int = setting(2000, doc="optimizer steps", reason="a small model on one machine, in minutes to hours", minimum=1)
    batch: int = setting(
        16, doc="windows in a step, over all processes", reason="8k bytes a step with the default length", minimum=1
    )
    length: int = setting(
        512,
        doc="bytes in a window; two at least, for one byte to come after another",
        reason="several chunks and segments of the shipped specs",
        minimum=2,
    )
    learning_rate: float = setting(
        1e-3, doc="peak learning rate", reason="usual for AdamW below about 50M parameters", minimum=0.0
    )
    warmup: int = setting(100, doc="steps of linear warm-up", reason="AdamW's second moments need about this many", minimum=0)
    floor: float = setting(
        0.1, doc="last learning rate, as a fraction of the peak", reason="the usual end of a cosine", minimum=0.0
    )
    weight_decay: float = setting(
        0.1,
        doc="decoupled decay of parameters with two or more axes",
        reason="usual; vectors and scalars scale, they do not overfit",
        minimum=0.0,
    )
    beta1: float = setting(0.9, doc="AdamW's first-moment decay", reason="usual", minimum=0.0)
    beta2: float = setting(
        0.95,
        doc="AdamW's second-moment decay",
        reason="forgets spikes faster than 0.999; usual for language models",
        minimum=0.0,
    )
    clip: float = setting(
        1.0, doc="largest gradient norm; 0: no limit", reason="one bad batch must not undo many good ones", minimum=0.0
    )
    seed: int = setting(0, doc="seed of weights and batches", reason="any fixed number", minimum=0)
    precision: str = setting(
        "auto",
        doc="auto, no (float32) or bf16",
        reason="auto: bf16 where a GPU has it, float32 elsewhere",
        choices=("auto", "no", "bf16"),
    )
    device: str = setting("auto", doc="auto or cpu", reason="auto: the accelerator if there is one", choices=("auto", "cpu"))
    compile: bool = setting(
        False, doc="train through model.compile()", reason="compiling takes about a minute; long runs earn it back"
    )
    eval_every: int = setting(
        200,
        doc="steps between validations; 0: only at the end",
        reason="a tenth of the default run",
        minimum=0,
        free=True,
    )
    eval_bytes: int = setting(
        65536,
        doc="bytes of the validation stretch; 0: all of it",
        reason="a few seconds on a CPU",
        minimum=0,
        free=True,
    )
    eval_restart: int = setting(
        -1,
        doc="validation restarts the state every so many bytes; 0: never; -1: never, unless the state grows",
        reason="a constant state is made to be carried on; a growing one restarts at the length it is trained at",
        minimum=-1,
        free=True,
    )
    checkpoint_every: int = setting(
        200, doc="steps between checkpoints; 0: only at the end", reason="as validations", minimum=0, free=True
    )
    keep: int = setting(2, doc="checkpoints kept", reason="the last, and one to fall back to", minimum=1, free=True)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        if self.floor > 1 or self.beta1 >= 1 or self.beta2 >= 1:
            raise UsageError("floor must be at most 1, beta1 and beta2 below 1")

    def plain(self) -> dict[str, Any]:
        """Name to value, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of :meth:`plain`; UsageError on unknown names."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise UsageError(f"unknown training setting {name!r}; {suggest(name, known)}")
        return cls(**values)

    def identity(self) -> dict[str, Any]:
        """The settings that decide which weights come out."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata["free"]}


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    minimum, choices = field.metadata["minimum"], field.metadata["choices"]
    if choices and value not in choices:
        raise UsageError(f"{field.name}: {value!r:.60} is none of {', '.join(choices)}")
    if minimum is None:
        return
    if isinstance(value, bool) or not isinstance(value, int if isinstance(field.default, int) else (int, float)):
        raise UsageError(f"{field.name}: expected a number ({field.metadata['doc']}), got {value!r:.60}")
    if not minimum <= value < 1e300:
        raise UsageError(f"{field.name}: {value!r:.60} is out of range, at least {minimum} ({field.metadata['doc']})")


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of optimizer step ``step`` (0-based): linear up over ``warmup`` steps, then a cosine down to the floor.

    The first step has ``peak / warmup`` (never 0), step ``warmup - 1`` the peak, the last step ``floor * peak``.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    span = max(1, config.steps - 1 - config.warmup)
    progress = min(1.0, (step - config.warmup) / span)
    fraction = config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * fraction
