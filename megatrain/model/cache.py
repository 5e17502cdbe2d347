"""A cache of keys and values, with which generation computes each token only once."""

from __future__ import annotations

import torch
from torch import Tensor

from megatrain.config import ModelConfig


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


class KVCache:
    """The cache of a whole model: `batch_size` rows of up to `capacity` tokens. `layers[i]` belongs to block `i`."""

    def __init__(
        self, config: ModelConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (batch_size, config.kv_heads, capacity, config.head_dim)
        self.layers = [LayerCache(shape, device, dtype) for _ in range(config.num_layers)]

    @property
    def length(self) -> int:
        """Tokens stored so far, the same in every block."""
        return self.layers[0].length
