from __future__ import annotations

import bz2
import math

import pytest
import torch

from titans_graph.errors import DataError
from titans_graph.tasks.floors import floors


def tensor(content: bytes) -> torch.Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


def test_floors_of_a_known_text_by_hand() -> None:
    found = floors(tensor(b"abab"), tensor(b"aba"))
    p_a = p_b = 3 / 260
    assert found.unigram == pytest.approx(-math.log2(p_a))
    b_after_a = (2 + p_b) / (2 + 1)  # "a" stands twice before another byte, both times before "b"
    a_after_b = (1 + p_a) / (1 + 1)
    assert found.bigram == pytest.approx(-(math.log2(b_after_a) + math.log2(a_after_b)) / 2)
    assert found.bzip2 == 8 * len(bz2.compress(b"aba", 9)) / 3


def test_a_byte_never_seen_costs_much_and_not_infinitely_much() -> None:
    found = floors(tensor(b"a" * 1000), tensor(b"zz"))
    assert found.unigram == pytest.approx(math.log2(1256))
    assert 8 < found.bigram < 12


def test_random_bytes_cost_eight_bits() -> None:
    noise = torch.randint(0, 256, (200_000,), dtype=torch.uint8)
    found = floors(noise[:100_000], noise[100_000:])
    assert found.unigram == pytest.approx(8, abs=0.01)
    assert min(found.gzip, found.bzip2, found.xz) > 7.99


def test_rows_are_sorted() -> None:
    values = [value for _, value in floors(tensor(b"abc" * 99), tensor(b"abc" * 9)).rows()]
    assert values == sorted(values, reverse=True)
    assert len(values) == 5


def test_too_little_is_an_error() -> None:
    with pytest.raises(DataError):
        floors(tensor(b"abc"), tensor(b"a"))
