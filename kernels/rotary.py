"""Rotary positions (Su et al., arXiv 2104.09864), in the split-halves convention of GPT-NeoX and LLaMA."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Turn each pair of features (i, i + d/2) by the angle ``position * base^(-2i/d)``.

    x ``[B, G, ..., d]`` with even d, position ``[B, G]`` int64 -> the shape and dtype of x. Angles are float64 where
    the device has it: at position 100000 a float32 angle is off by 0.004 and shifts every score.
    """
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=exact) / half)
    angle = position.to(exact)[..., None] * frequency
    angle = angle.reshape(position.shape + (1,) * (x.dim() - 3) + (half,))
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
