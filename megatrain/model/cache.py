"""A cache of keys and values, with which generation computes each token only once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatrain.config import ModelConfig
from megatrain.kernels.attention import Documents, attention


class AttentionCache(Protocol):
    """What a block needs of its part of a cache."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Documents | None) -> Tensor:
        """Store the new tokens' keys and values `[B, Hkv, T, K]`; return what the queries `[B, H, T, K]` attend to."""
        ...


class Cache(Protocol):
    """What a model needs of a cache. `layers[i]` belongs to block `i`."""

    has_own_masks: bool
    """Whether `attend` knows what each token may see; otherwise the model makes the mask."""

    @property
    def length(self) -> int:
        """Tokens stored so far, before those of this call."""
        ...

    @property
    def layers(self) -> Sequence[AttentionCache]:
        """The parts of the blocks."""
        ...


class LayerCache:
    """One block's keys and values: two preallocated tensors `[B, Hkv, S, K]`, filled up to `length`."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values `[B, Hkv, T, K]` of `T` new tokens; return all so far, `[B, Hkv, length, K]`."""
        end = self.length + keys.shape[2]
        assert end <= self.keys.shape[2], f"{end} tokens do not fit a cache of {self.keys.shape[2]}"
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Documents | None) -> Tensor:
        """Append the new tokens; return the attention of their queries `[B, H, T, K]` over all tokens so far."""
        keys, values = self.append(k, v)
        return attention(q, keys, values, mask)


class KVCache:
    """A cache of `batch_size` rows of up to `capacity` tokens, which all have the same length."""

    has_own_masks = False

    def __init__(
        self, config: ModelConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (batch_size, config.kv_heads, capacity, config.head_dim)
        self.layers = [LayerCache(shape, device, dtype) for _ in range(config.num_layers)]

    @property
    def length(self) -> int:
        """Tokens stored so far, the same in every block."""
        return self.layers[0].length
