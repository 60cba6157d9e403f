"""Attention on the grid of one call: segment, window and full, each with the cache that carries it across calls.

Legend: ``B`` batch, ``G`` slots, ``P`` timed pieces, ``F`` fixed elements, ``H`` query heads, ``h`` key heads (h
divides H), ``d`` head size, ``S`` segment, ``W`` window, ``R`` capacity. Keys and values travel together, rotated:

    q      [B, G, H, d]         queries of the kept piece
    kv     [B, G, P, 2, h, d]   keys (0) and values (1) of the timed pieces
    fixed  [F, 2, h, d] | None  keys and values that every query sees
    cache  [B, S | W | R, P, 2, h, d]

Each function returns ``[B, G, H, d]`` and the new cache. What a query may see is decided by masks alone, from the
:class:`titans_graph.shapes.Clock`; a row whose document starts in this call needs no other reset. An invalid slot sees
at least itself, so that no row of a mask is empty.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from titans_graph.kernels.timeline import Clock, extend, last, take

FLEX_BLOCK = 128
"""Flex attention's own block of queries and keys."""

Visible = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(row, query slot, key index in the joined cache and grid) -> may it be seen; all broadcast together."""


def attend(q: Tensor, kv: Tensor, mask: Tensor, fixed: Tensor | None) -> Tensor:
    """Softmax attention with a boolean mask.

    q ``[N, T, H, d]``, kv ``[N, L, P, 2, h, d]``, mask ``[N, T, L]`` (or broadcast to it), the same for all pieces ->
    ``[N, T, H, d]``.
    """
    n, slots, pieces = q.shape[0], kv.shape[1], kv.shape[2]
    mask = mask.expand(n, q.shape[1], slots)
    if pieces > 1:
        mask = mask[..., None].expand(-1, -1, -1, pieces).flatten(2)
    kv = kv.flatten(1, 2)
    if fixed is not None:
        kv = torch.cat([fixed.expand(n, *fixed.shape), kv], dim=1)
        mask = F.pad(mask, (fixed.shape[0], 0), value=True)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    grouped = q.shape[2] != k.shape[1]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask[:, None], enable_gqa=grouped)
    return out.transpose(1, 2)


def segment_attention(
    q: Tensor, kv: Tensor, fixed: Tensor | None, cache: Tensor, clock: Clock, segment: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention inside segments of ``S`` tokens (eq. 21-22 of arXiv 2501.00663; eq. 3-5 are the attention itself).

    A query sees the keys of its own segment, up to its own position when ``causal``. The cache ``[B, S, ...]`` holds
    the segment in which the row stands, by place in the segment.
    """
    if q.shape[1] == 1:
        return _segment_token(q, kv, fixed, cache, clock, segment)
    count = num_blocks(q.shape[1], segment)
    valid = to_blocks(clock.valid, count, segment)  # [B, N, S]
    fresh = to_blocks(kv, count, segment)
    merged = torch.where(_over(valid, fresh), fresh, cache[:, None])  # [B, N, S, ...]
    slot = torch.arange(count * segment, device=q.device).view(1, count, segment)
    lead = clock.lead[:, None, None]
    place = torch.arange(segment, device=q.device)
    if causal:
        mask = (place <= place[:, None]).expand(*valid.shape, segment)  # [B, N, S, S]
    else:
        known = valid | ((slot < lead) & (slot // segment == lead // segment))
        mask = known[:, :, None] | (place == place[:, None])
    out = attend(to_blocks(q, count, segment).flatten(0, 1), merged.flatten(0, 1), mask.flatten(0, 1), fixed)
    out = out.reshape(q.shape[0], count * segment, *q.shape[2:])[:, : q.shape[1]]
    holding = ((clock.end - 1).clamp(min=0) // segment)[:, None]
    some = clock.end > clock.lead
    new = torch.where(_over(some, cache), take(merged, holding).squeeze(1), cache)
    return out, new


def _segment_token(
    q: Tensor, kv: Tensor, fixed: Tensor | None, cache: Tensor, clock: Clock, segment: int
) -> tuple[Tensor, Tensor]:
    """The call of one token: its slot in the segment is ``position % S``."""
    place = torch.arange(segment, device=q.device)
    here = clock.position % segment  # [B, 1]
    written = (place == here) & clock.valid  # [B, S]
    merged = torch.where(_over(written, cache), kv, cache)
    return attend(q, merged, (place <= here)[:, None], fixed), merged


def window_attention(
    q: Tensor, kv: Tensor, fixed: Tensor | None, cache: Tensor, clock: Clock, window: int
) -> tuple[Tensor, Tensor]:
    """Attention over the last ``W`` tokens of the document, this one among them: O(G W) time and memory.

    The cache ``[B, W, ...]`` holds the last tokens, oldest first.
    """
    joined = extend(cache, kv, clock.lead)  # [B, W + G, ...], slot s at W + s
    new = last(joined, clock.end, window)
    if q.shape[1] == 1:
        distance = window - torch.arange(window + 1, device=q.device)
        mask = (distance < window) & (distance <= clock.position.clamp(min=0)[..., None])
        return attend(q, joined, mask, fixed), new
    if flex_applies(q):
        return flex_attend(q, joined, window_visible(flex_position(clock), window), fixed), new
    return _window_blocks(q, joined, fixed, clock, window), new


def _window_blocks(q: Tensor, joined: Tensor, fixed: Tensor | None, clock: Clock, window: int) -> Tensor:
    """Blocks of ``W`` queries, each against its own block of keys and the one before."""
    count = num_blocks(q.shape[1], window)
    keys = to_blocks(joined, count + 1, window)  # [B, N + 1, W, ...]: block n + 1 of keys stands at block n of queries
    pairs = torch.cat([keys[:, :-1], keys[:, 1:]], dim=2)  # [B, N, 2 W, ...]
    position = to_blocks(clock.position, count, window)[..., None]  # [B, N, W, 1]
    place = torch.arange(2 * window, device=q.device)
    distance = place[:window, None] + window - place  # [W, 2 W]
    mask = (distance >= 0) & (distance < window) & (distance <= position.clamp(min=0))
    out = attend(to_blocks(q, count, window).flatten(0, 1), pairs.flatten(0, 1), mask.flatten(0, 1), fixed)
    return out.reshape(q.shape[0], count * window, *q.shape[2:])[:, : q.shape[1]]


def full_attention(q: Tensor, kv: Tensor, fixed: Tensor | None, cache: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
    """Attention over all earlier tokens of the document.

    The cache ``[B, R, ...]`` holds them by in-document position; the new one has the size of ``clock.room``.
    """
    joined = torch.cat([cache, kv], dim=1)  # [B, R + G, ...], slot s at R + s
    capacity = cache.shape[1]
    if q.shape[1] > 1 and flex_applies(q):
        # A tensor, because a rule that holds a symbolic number fails in torch 2.13's passes.
        held = clock.lead.new_full((), capacity)
        out = flex_attend(q, joined, full_visible(flex_position(clock), clock.lead, held), fixed)
    else:
        mask = dense_mask(full_visible(clock.position, clock.lead, capacity), q, joined)
        out = attend(q, joined, mask, fixed)
    return out, take(joined, _full_index(clock, capacity))


def _full_index(clock: Clock, capacity: int) -> Tensor:
    """``[B, R_new]``: where in the joined cache and grid position c of each row's last document stands."""
    tail = (clock.end - 1)[:, None]  # [B, 1]: the last valid slot
    reached = clock.position.gather(1, tail.clamp(min=0))
    slot = tail - (reached - clock.room)
    fresh = (slot >= clock.lead[:, None]) & (slot <= tail)
    return torch.where(fresh, capacity + slot, clock.room.clamp(max=capacity - 1))


def window_visible(position: Tensor, window: int) -> Visible:
    """The rule of :func:`window_attention` on keys joined behind a cache of ``W``."""

    def visible(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + window - key
        return (distance >= 0) & (distance < window) & (distance <= position[row, query].clamp(min=0))

    return visible


def full_visible(position: Tensor, lead: Tensor, capacity: int | Tensor) -> Visible:
    """The rule of :func:`full_attention` on keys joined behind a cache of ``R``.

    Cached position c is visible to a slot of the document that the row was in before this call, up to where the row
    stood then; ``position - (slot - lead)`` is that place, and <= 0 for documents that start in this call. On the grid,
    slots left of ``lead`` are empty: what they would hold is in the cache.
    """

    def visible(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place, first = position[row, query], lead[row]
        distance = query + capacity - key
        cached = (key < capacity) & (key < place - (query - first))
        filled = (key >= capacity + first) & (distance > 0) & (distance <= place)
        return cached | filled | (distance == 0)

    return visible


def dense_mask(visible: Visible, q: Tensor, joined: Tensor) -> Tensor:
    """A rule as a mask ``[B, G, L]``."""
    row = torch.arange(q.shape[0], device=q.device)[:, None, None]
    query = torch.arange(q.shape[1], device=q.device)[:, None]
    return visible(row, query, torch.arange(joined.shape[1], device=q.device))


def flex_applies(q: Tensor) -> bool:
    """Whether flex attention computes this: on a CUDA device, inside torch.compile (eager flex is dense and slow), at
    head sizes and dtypes it has kernels for."""
    supported = q.dtype in (torch.float16, torch.bfloat16, torch.float32) and q.shape[-1] >= 16
    return q.is_cuda and supported and torch.compiler.is_compiling()


def flex_attend(q: Tensor, kv: Tensor, visible: Visible, fixed: Tensor | None) -> Tensor:
    """As :func:`attend` with a rule instead of a mask: blocks in which nothing is visible are skipped.

    Queries and keys are padded to whole blocks, so the rule must bear query slots past the grid: :func:`flex_position`.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    skip, pieces = 0 if fixed is None else fixed.shape[0], kv.shape[2]
    kv = kv.flatten(1, 2)
    if fixed is not None:
        kv = torch.cat([fixed.expand(kv.shape[0], *fixed.shape), kv], dim=1)
    if torch.is_autocast_enabled(q.device.type):
        # As autocast does for scaled_dot_product_attention; for flex attention it has a rule in newer versions of torch alone.
        # Keys behind a cache in float32 are float32, so the types would differ, which its backward pass refuses.
        q, kv = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, kv))
    queries = to_blocks(q, flex_blocks(q.shape[1]), FLEX_BLOCK).flatten(1, 2)
    k, v = to_blocks(kv, flex_blocks(kv.shape[1]), FLEX_BLOCK).flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)
    rule = flex_rule(visible, skip, pieces)
    blocks = create_block_mask(rule, q.shape[0], None, queries.shape[1], k.shape[2], device=str(q.device))
    grouped = q.shape[2] != k.shape[1]
    out = flex_attention(queries.transpose(1, 2), k, v, block_mask=blocks, enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)[:, : q.shape[1]]


def flex_blocks(length: int) -> int:
    """How many of flex attention's blocks cover a length: at least two, for the reason given in :func:`num_blocks`."""
    return (length + FLEX_BLOCK - 1) // FLEX_BLOCK + 1


def flex_position(clock: Clock) -> Tensor:
    """The clock's positions, padded with zeros as :func:`flex_attend` pads queries."""
    slots = clock.position.shape[1]
    return F.pad(clock.position, (0, flex_blocks(slots) * FLEX_BLOCK - slots))


def flex_rule(visible: Visible, skip: int, pieces: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule on keys laid out as flex attention gets them: ``skip`` fixed ones, then slot by slot all ``pieces``."""

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        timed = ((key - skip) // pieces).clamp(min=0)
        return (key < skip) | visible(row, query, timed)

    return rule


def num_blocks(length: int, size: int) -> int:
    """How many blocks of ``size`` cover ``length``; one more than needed where ``length`` may be symbolic, so that no
    dimension of a compiled region is 1 at some lengths and more at others."""
    if statically_known_true(length <= size):
        return 1
    return (length + size - 1) // size + 1


def to_blocks(x: Tensor, count: int, size: int) -> Tensor:
    """``[B, L, ...]`` -> ``[B, count, size, ...]``, padded with zeros on the right."""
    missing = count * size - x.shape[1]
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)).reshape(x.shape[0], count, size, *x.shape[2:])


def _over(flag: Tensor, x: Tensor) -> Tensor:
    """A flag ``[B, ...]`` with trailing axes of one, to choose between tensors like ``x``."""
    return flag.reshape(flag.shape + (1,) * (x.dim() - flag.dim()))
