"""What the trainer asks of a model. ``titans_graph.Model`` fulfils it; so does any small module in a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Parameter


class Summary(Protocol):
    """Sizes of a model."""

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of one batch row."""

    @property
    def flops(self) -> float:
        """Floating-point operations per token of a forward pass."""

    @property
    def grows(self) -> bool:
        """Whether the state grows with the number of tokens read."""


class LanguageModel(Protocol):
    """A ``torch.nn.Module`` from tokens ``[B, T]`` int64 to ``(logits [B, T, vocabulary], state)``."""

    @property
    def name(self) -> str:
        """The spec's name."""

    @property
    def spec(self) -> str:
        """The resolved spec as text: enough to build the same model again."""

    @property
    def fingerprint(self) -> str:
        """A hash of the resolved spec."""

    def __call__(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits and the state after the last token."""

    def compile(self) -> Callable[..., tuple[Tensor, Any]]:
        """The same model, compiled, sharing parameters."""

    def summary(self) -> Summary:
        """Sizes."""

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """As in ``torch.nn.Module``."""

    def parameters(self) -> Iterator[Parameter]:
        """As in ``torch.nn.Module``."""

    def state_dict(self) -> dict[str, Tensor]:
        """As in ``torch.nn.Module``."""

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> Any:
        """As in ``torch.nn.Module``."""

    def to(self, device: Any) -> Any:
        """As in ``torch.nn.Module``."""

    def train(self, mode: bool = True) -> Any:
        """As in ``torch.nn.Module``."""

    def eval(self) -> Any:
        """As in ``torch.nn.Module``."""


Build = Callable[[str], LanguageModel]
"""From the path of a spec file to a model: ``titans_graph.load``."""
