"""A cache of keys and values with a slot for each sequence, whose lengths differ.

A step computes tokens of several sequences as one row of tokens: the next token of each sequence that is being
generated, and chunks of prompts. `SlotCache.plan` says which tokens these are; each block's part then stores their keys
and values and attends. Which sequence is in which slot, and how long it is, batch_generator.py keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.config import ModelConfig
from megatrain.kernels.attention import Documents, attention


@dataclass(frozen=True)
class Chunk:
    """Tokens `[start, stop)` of the prompt in a slot, to be computed in one step."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Plan:
    """One step: the tokens' places in the cache (`slots` and `positions`, int64 `[T]`), and what they may see.

    First come the tokens of the slots 0 to N - 1, one each, with `mask` `[N, 1, 1, S]`; then those of each chunk, with
    a mask `[C, S]`, or None for plain causal attention.
    """

    slots: Tensor
    positions: Tensor
    mask: Tensor | None
    chunks: list[tuple[Chunk, Tensor | None]]


class SlotCache:
    """`num_slots` slots of up to `capacity` tokens: `storage` `[2, layers, slots, capacity, Hkv, K]`, keys first."""

    has_own_masks = True
    length = 0
    """Each slot has its own."""

    def __init__(
        self, config: ModelConfig, num_slots: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (2, config.num_layers, num_slots, capacity, config.kv_heads, config.head_dim)
        # zeros, since a weight of 0 on an infinity or NaN of empty memory is NaN; pages are claimed when written
        self.storage = torch.zeros(shape, device=device, dtype=dtype)
        self.window = config.sliding_window
        self.layers = [_SlotLayer(self, layer) for layer in range(config.num_layers)]
        self.step: _Plan | None = None

    def plan(self, lengths: Sequence[int], chunks: Sequence[Chunk]) -> Tensor:
        """Prepare a step: a token for each of the first slots, after `lengths` tokens there, and then the chunks.

        Return the position of each token, int64 `[1, T]`, on the cache's device.
        """
        slots, positions = list(range(len(lengths))), list(lengths)
        for chunk in chunks:
            slots += [chunk.slot] * (chunk.stop - chunk.start)
            positions += range(chunk.start, chunk.stop)
        device = self.storage.device
        places = torch.tensor([slots, positions]).to(device)
        mask = self._decoding_mask(places[1, : len(lengths)], max(lengths) + 1) if lengths else None
        masks = [(chunk, self._chunk_mask(chunk)) for chunk in chunks]
        self.step = _Plan(places[0], places[1], mask, masks)
        return places[1:]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first `length` tokens of two slots."""
        first, second = self.storage[:, :, one, :length], self.storage[:, :, other, :length]
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a slot to another."""
        self.storage[:, :, target, :length] = self.storage[:, :, source, :length]

    def clear(self, slot: int) -> None:
        """Overwrite a slot that may hold NaN: in a sum, even a weight of 0 would not hide it."""
        self.storage[:, :, slot] = 0

    def _decoding_mask(self, positions: Tensor, longest: int) -> Tensor:
        """Return 0 where a slot's token may attend to the column's, else -inf: `[N, 1, 1, longest]`."""
        keys = torch.arange(longest, device=positions.device)
        hidden = keys > positions[:, None]
        if self.window is not None:
            hidden |= keys <= positions[:, None] - self.window
        # made once for all layers; of a bool mask each would make a copy
        mask = torch.zeros(hidden.shape, dtype=self.storage.dtype, device=positions.device)
        return mask.masked_fill_(hidden, -torch.inf)[:, None, None]

    def _chunk_mask(self, chunk: Chunk) -> Tensor | None:
        window = self.window if self.window is not None and self.window < chunk.stop else None
        if window is None and (chunk.start == 0 or chunk.stop - chunk.start == 1):
            return None
        shape = chunk.stop - chunk.start, chunk.stop
        seen = torch.ones(shape, dtype=torch.bool, device=self.storage.device).tril(chunk.start)
        return seen if window is None else seen.triu(chunk.start + 1 - window)


class _SlotLayer:
    """A block's part of the cache."""

    def __init__(self, cache: SlotCache, layer: int) -> None:
        self.cache = cache
        self.keys, self.values = cache.storage[0, layer], cache.storage[1, layer]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Documents | None) -> Tensor:
        """Store the keys and values `[1, Hkv, T, K]` of the planned tokens; return their attention `[1, H, T, K]`."""
        plan = self.cache.step
        assert plan is not None and mask is None and q.shape[2] == len(plan.slots)
        dtype = q.dtype
        q, k, v = (x[0].transpose(0, 1).to(self.keys.dtype) for x in (q, k, v))
        self.keys[plan.slots, plan.positions] = k
        self.values[plan.slots, plan.positions] = v
        results, begin = [], 0
        if plan.mask is not None:
            begin = len(plan.mask)
            results.append(self._next_tokens(q[:begin], plan.mask))
        for chunk, chunk_mask in plan.chunks:
            end = begin + chunk.stop - chunk.start
            keys, values = (x[chunk.slot : chunk.slot + 1, : chunk.stop].transpose(1, 2) for x in self._stored())
            seen = attention(q[None, begin:end].transpose(1, 2), keys, values, chunk_mask)
            results.append(seen[0].transpose(0, 1))
            begin = end
        return torch.cat(results).transpose(0, 1)[None].to(dtype)

    def _next_tokens(self, q: Tensor, mask: Tensor) -> Tensor:
        """Attend with one query `[H, K]` for each of the first slots: `q` is `[N, H, K]`, and so is the result.

        The query heads that share a key-value head become queries of that one head, so that no key is copied.
        """
        num, longest = len(q), mask.shape[-1]
        keys, values = (x[:num, :longest].transpose(1, 2) for x in self._stored())
        grouped = q.unflatten(1, (keys.shape[1], -1))
        return attention(grouped, keys, values, mask).flatten(1, 2)

    def _stored(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values
