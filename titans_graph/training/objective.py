"""What training minimises, as a module that wrappers can hold: the mean cross-entropy of the next byte."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from titans_graph.tasks.text import check_logits
from titans_graph.training.interface import LanguageModel


class LossModule(nn.Module):
    """Mean cross-entropy (nats per byte) of windows ``[B, T + 1]``, as a module, for wrappers to see the whole step."""

    def __init__(self, model: LanguageModel, compile: bool) -> None:
        super().__init__()
        self.model = model
        self._calls = [model.compile() if compile else model]  # in a list: not registered a second time

    def forward(self, windows: Tensor) -> Tensor:
        """The scalar loss."""
        logits, _ = self._calls[0](windows[:, :-1])
        check_logits(logits)
        return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
