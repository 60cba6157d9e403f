"""Text from a trained model, byte by byte, as it comes."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from titans_graph.errors import UsageError
from titans_graph.tasks.text import VOCABULARY, check_logits, check_vocabulary
from titans_graph.training.interface import LanguageModel


def generate(
    model: LanguageModel,
    prompt: str | bytes,
    *,
    tokens: int = 256,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the continuation of ``prompt`` (without it) in pieces of text, at most one a byte.

    The prompt is read in one call, then the model is called with one byte at a time and the explicit state. Bytes that
    form no UTF-8 come as U+FFFD; a character of several bytes comes when it is complete. ``temperature`` 0 takes the
    likeliest byte, ``top_k`` 0 all of them. The same arguments give the same text on the same machine. UsageError for
    values that cannot work, at the call.
    """
    if tokens < 0 or top_k < 0 or not (0 <= temperature < float("inf")):
        raise UsageError("tokens and top_k must be at least 0, temperature a finite number of at least 0")
    content = prompt.encode("utf-8", "surrogateescape") if isinstance(prompt, str) else prompt
    return _decode(_bytes(model, content or b"\n", tokens, temperature, top_k, seed))


def _decode(values: Iterator[int]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for value in values:
        if piece := decoder.decode(bytes([value])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def _bytes(model: LanguageModel, prompt: bytes, tokens: int, temperature: float, top_k: int, seed: int) -> Iterator[int]:
    device = next(model.parameters()).device
    source = torch.Generator().manual_seed(seed)
    model.eval()
    state: Any = None
    step = torch.tensor([list(prompt)], device=device)
    for _ in range(tokens):
        with torch.no_grad():
            logits, state = model(step, state)
            check_logits(logits)
        value = sample(logits[0, -1], temperature, top_k, source)
        yield value
        step = torch.tensor([[value]], device=device)


def sample(logits: Tensor, temperature: float, top_k: int, source: torch.Generator) -> int:
    """One byte from logits ``[vocabulary]``; entries past the 256 bytes are never taken. Drawn on the CPU."""
    check_vocabulary(len(logits))
    scores = logits[:VOCABULARY].detach().to("cpu", torch.float64)
    if temperature == 0:
        return int(scores.argmax())
    if 0 < top_k < VOCABULARY:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
    weights = torch.softmax((scores - scores.max()) / temperature, 0)
    return int(torch.multinomial(weights, 1, generator=source))
