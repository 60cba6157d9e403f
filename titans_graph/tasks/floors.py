"""What text costs without a neural network: the floors that a trained model must beat.

All figures are bits per byte of one and the same stretch of validation text. For the two counting models the first
byte is context only, as it is for a model under test; the counts come from the training part. Compressors see the
stretch alone, headers included, and nothing of the training part: on a short stretch they are weak floors.

- unigram: ``p1(b) = (count(b) + 1) / (n + 256)``: add-one smoothing;
- bigram: ``p2(b | a) = (count(a, b) + p1(b)) / (count(a) + 1)``: the pair counts with the unigram as a prior of
  weight one;
- gzip, bzip2, xz: ``8 * compressed / original`` bytes at each tool's highest level.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_graph.errors import DataError
from titans_graph.tasks.text import VOCABULARY

_BLOCK = 1 << 22


@dataclass(frozen=True)
class Floors:
    """Bits per byte of the validation stretch under models that anybody has at hand."""

    unigram: float
    bigram: float
    gzip: float
    bzip2: float
    xz: float

    def rows(self) -> list[tuple[str, float]]:
        """``(name, bits per byte)`` from the weakest to the strongest model."""
        return sorted(vars(self).items(), key=lambda row: -row[1])


def floors(train: Tensor, validation: Tensor) -> Floors:
    """All floors of a validation stretch; ``train`` and ``validation`` are uint8 ``[n]``. DataError below two bytes."""
    if len(train) < 2 or len(validation) < 2:
        raise DataError("floors need at least two bytes of training and of validation text")
    single, pairs = _unigram(train), _bigram(train)
    target = validation[1:].long()
    before = validation[:-1].long()
    raw = validation.numpy().tobytes()
    return Floors(
        unigram=-single.log2()[target].mean().item(),
        bigram=-pairs.log2()[before, target].mean().item(),
        gzip=8 * len(gzip.compress(raw, 9, mtime=0)) / len(raw),
        bzip2=8 * len(bz2.compress(raw, 9)) / len(raw),
        xz=8 * len(lzma.compress(raw, preset=9)) / len(raw),
    )


def _unigram(train: Tensor) -> Tensor:
    """``[256]`` probabilities, float64."""
    counts = torch.zeros(VOCABULARY, dtype=torch.float64)
    for part in torch.split(train, _BLOCK):
        counts += torch.bincount(part.long(), minlength=VOCABULARY)
    return (counts + 1) / (counts.sum() + VOCABULARY)


def _bigram(train: Tensor) -> Tensor:
    """``[256, 256]`` probabilities of the second byte given the first, float64; each row sums to one."""
    size = VOCABULARY * VOCABULARY
    counts = torch.zeros(size, dtype=torch.float64)
    for start in range(0, len(train) - 1, _BLOCK):
        part = train[start : start + _BLOCK + 1].long()
        counts += torch.bincount(part[:-1] * VOCABULARY + part[1:], minlength=size)
    table = counts.view(VOCABULARY, VOCABULARY)
    return (table + _unigram(train)) / (table.sum(1, keepdim=True) + 1)
