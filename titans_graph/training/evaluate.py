"""Bits per byte of a model on a stretch of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from titans_graph.errors import DataError
from titans_graph.tasks.text import check_logits

PIECE = 4096
"""Bytes read in one call; the result does not depend on it."""

Forward = Callable[..., tuple[Tensor, Any]]


@torch.no_grad()
def bits_per_byte(
    forward: Forward,
    text: Tensor,
    *,
    restart: int = 0,
    piece: int = PIECE,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] = lambda scored: None,
) -> float:
    """Mean of ``-log2 p(byte)`` over a stretch, uint8 ``[n]``; its first byte is context only.

    ``restart`` 0: the model reads the text as **one long stream**, piece by piece, its state carried along,
    so every byte is predicted from all bytes before it. Otherwise the state starts afresh every ``restart`` bytes, as
    in training windows, and those windows are read side by side. ``progress`` is told after each call how many more bytes
    are scored, ``n - 1`` in all. DataError below two bytes.
    """
    if len(text) < 2:
        raise DataError(f"the validation stretch has {len(text)} bytes; at least two are needed")
    calls = _windows(text, restart, piece) if restart else _stream(text, piece)
    total = 0.0
    state: Any = None
    for tokens, carried in calls:
        tokens = tokens.to(device).long()
        logits, state = forward(tokens[:, :-1], state if carried else None)
        check_logits(logits)
        total += cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
        progress(tokens.shape[0] * (tokens.shape[1] - 1))
    return total / (len(text) - 1) / math.log(2)


def restart_of(setting: int, length: int, grows: bool) -> int:
    """What ``eval_restart`` means: -1 is never, except every ``length`` bytes where the state grows."""
    if setting >= 0:
        return setting
    return length if grows else 0


def _stream(text: Tensor, piece: int) -> Iterator[tuple[Tensor, bool]]:
    """Inputs-and-targets ``[1, <= piece + 1]`` and whether the state is carried into them."""
    for start in range(0, len(text) - 1, piece):
        yield text[start : start + piece + 1].unsqueeze(0), start > 0


def _windows(text: Tensor, restart: int, piece: int) -> Iterator[tuple[Tensor, bool]]:
    """Whole windows in batches of about ``piece`` bytes, then the shorter last one."""
    whole = (len(text) - 1) // restart
    if whole:
        windows = text[: whole * restart + 1].unfold(0, restart + 1, restart)
        for rows in torch.split(windows, max(1, piece // restart)):
            yield rows, False
    if (len(text) - 1) % restart:
        yield text[whole * restart :].unsqueeze(0), False
