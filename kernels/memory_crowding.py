"""How crowded a chunk's keys are: what the stable step of a memory with chunk-start gradients depends on.

All gradients of a chunk are taken at its first weights, so tokens with like keys push the same way without seeing each
other: with C equal keys the chunk's step is C times one token's. A cap must be causal and the same in streaming, so the
crowding of a token counts the keys of its chunk up to and with its own: r_t = sum over i <= t of |k_i . k_t|.

For equal keys r_t = t, and the sum over t of 1 / (r_t (1 + ln r_t)) is 2.28 for a chunk of 64 and 2.87 for 4096 (it grows
like ln ln C), where the sum of 1 / r_t would grow like ln C. Orthogonal keys give r_t = 1: nothing is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_graph.kernels.precision import running
from titans_graph.kernels.timeline import take

TOGETHER = 32
"""Chunks of heads whose keys are multiplied at a time."""


def crowding(k: Tensor, ring: Tensor, valid: Tensor, position: Tensor, lead: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """``r [B, H, G]`` (at least 1 for unit keys) and the new ring; both detached: a control, not a signal to learn from.

    k ``[B, H, G, d]`` unit keys; ring ``[B, C, H, d]``, the keys of the chunk that earlier calls left unfinished, by slot;
    valid, position ``[B, G]`` and lead, end ``[B]`` as in :class:`titans_graph.shapes.Clock`. G is 1 or a multiple of C.
    """
    k, ring = k.detach(), ring.detach()
    if k.shape[2] == 1:
        return _one(k, ring, valid, position)
    # The operator has no batching rule, and is there for compiled regions alone.
    plain = not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None
    r, fresh = (_chunks if plain else _whole)(k, ring, valid, lead, end)
    return r, fresh


@torch.library.custom_op("titans_graph::crowding", mutates_args=())
def _whole(k: Tensor, ring: Tensor, valid: Tensor, lead: Tensor, end: Tensor) -> list[Tensor]:
    """Whole chunks. An operator of its own, so that a compiled region is not specialised on the number of chunks."""
    return _chunks(k, ring, valid, lead, end)


def _chunks(k: Tensor, ring: Tensor, valid: Tensor, lead: Tensor, end: Tensor) -> list[Tensor]:
    """Whole chunks as plain tensor operations."""
    chunk, count = ring.shape[1], k.shape[2] // ring.shape[1]

    def keys_of(number: Tensor) -> Tensor:
        """The keys ``[B, C, H, d]`` of one chunk a row ``[B]``: those of earlier calls as well, and zeros in empty slots."""
        found, filled = (take(x, number[:, None])[:, 0] for x in (blocks, _blocks(valid, chunk)))
        there = torch.where(filled[..., None, None], found, 0.0)
        earlier = (number == lead // chunk)[:, None] & (torch.arange(chunk, device=k.device) < (lead % chunk)[:, None])
        return torch.where(earlier[..., None, None], ring, there)

    blocks = _blocks(k.transpose(1, 2), chunk)
    # What lies in empty slots is summed for no token but theirs; the one chunk that may have begun earlier is summed again.
    r = _sums(blocks.permute(0, 3, 1, 2, 4))
    begun = (lead // chunk).clamp(max=count - 1)
    here = (torch.arange(count, device=k.device) == begun[:, None])[:, None, :, None]
    r = torch.where(here, _sums(keys_of(begun).transpose(1, 2)[:, :, None]), r).flatten(2)
    fresh = keys_of(((end - 1).clamp(min=0) // chunk).clamp(max=count - 1))
    keep = (end == lead)[:, None, None, None]
    return [torch.where(valid[:, None], r.clamp(min=1.0), 1.0), torch.where(keep, ring, fresh)]


def _sums(keys: Tensor) -> Tensor:
    """``[..., chunks, C, d]`` to ``sum over i <= t of |k_i . k_t|``, ``[..., chunks, C]``.

    A few chunks at a time, which stay in the caches; and dense ones: the product would copy both sides value by value.
    """
    blocks = [x.contiguous() for x in torch.split(keys.reshape(-1, *keys.shape[-2:]), TOGETHER)]
    sums = [running(torch.bmm(x, x.mT)).abs_().tril().sum(-1) for x in blocks]
    return torch.cat(sums).view(keys.shape[:-1])


@_whole.register_fake
def _(k: Tensor, ring: Tensor, valid: Tensor, lead: Tensor, end: Tensor) -> list[Tensor]:
    return [running(k.new_empty(k.shape[:3])), torch.empty_like(ring)]


def _blocks(x: Tensor, chunk: int) -> Tensor:
    """``[B, G, ...]`` -> ``[B, G / C, C, ...]``."""
    return x.reshape(x.shape[0], x.shape[1] // chunk, chunk, *x.shape[2:])


def _one(k: Tensor, ring: Tensor, valid: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """One token: it takes its slot in the ring, and sees the slots up to its own."""
    chunk = ring.shape[1]
    slot = position % chunk
    here = (torch.arange(chunk, device=k.device) == slot) & valid
    merged = torch.where(here[..., None, None], k.transpose(1, 2), ring)
    alike = running(torch.einsum("bchd,bhd->bhc", merged, k[:, :, 0])).abs()
    seen = torch.arange(chunk, device=k.device) <= slot
    r = torch.where(seen[:, None], alike, 0.0).sum(-1, keepdim=True)
    return r.clamp(min=1.0), merged


def step_cap(r: Tensor, max_momentum: float, curvature: float | None = 2.0) -> Tensor:
    """The largest step for ``||f(k) - v||^2`` at crowding ``r``: ``(1 - max_momentum) / (3 r (1 + ln r))``.

    A linear memory's error along a key is multiplied by ``1 - sum of 2 step`` over a chunk of equal keys, so the sum must
    stay below 2: with the 3 it is 1.52 for a chunk of 64 and 1.91 for 4096, the longest. (With a 2 it would be 2.28 for
    64: a step at the cap would multiply the error by -1.28 a chunk, and did.) At r = 1 a third of it is slack.

    The *maximum* momentum, not the token's own: with momentum alternating between 0 and 0.99 a cap from the token's own
    value lets the next token multiply a large step by a hundred.

    ``curvature`` bounds the objective's second derivative: 2 for ``||f(k) - v||^2``. A larger one multiplies the cap by
    2 / curvature. A smaller one leaves it: the cap is never enlarged. None, no bound known: as for 2, and not known to be
    stable.
    """
    cap = (1.0 - max_momentum) / (3.0 * r * (1.0 + r.log()))
    return cap if curvature is None or curvature <= 2.0 else cap * (2.0 / curvature)
