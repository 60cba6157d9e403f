"""What training minimises, as a module that wrappers can hold: the mean cross-entropy of the next byte."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from titans_graph.errors import InputError, UsageError
from titans_graph.tasks.text import check_logits
from titans_graph.training.interface import LanguageModel


@torch.no_grad()
def demand_language_model(model: LanguageModel) -> None:
    """UsageError unless a model reads ids and gives logits of bytes; it is tried on two tokens, before anything is written."""
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    model.eval()
    try:
        logits, _ = model(tokens)
    except InputError as error:
        raise UsageError(
            f"{model.name!r} is a block on a stream of features ({error}); train needs a model of token ids\n"
            "  help: take a spec with input: {tokens: [B, T]} and logits as its output, such as mac or transformer"
        ) from error
    finally:
        model.train()
    check_logits(logits)


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
