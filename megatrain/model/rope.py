"""The rotation angles of a model's queries and keys: plain, or with frequencies scaled for longer sequences.

kernels/rope.py rotates by them. The scalings compute what Hugging Face checkpoints were trained with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatrain.config import ModelConfig
from megatrain.kernels.rope import rope_angles, rope_frequencies


def model_angles(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cosines and sines as `kernels.rope.rope_angles` does, by `model.rope_*`.

    YaRN multiplies both by its attention factor.
    """
    if config.rope_scaling is None:
        return rope_angles(positions, config.head_dim, config.rope_theta)
    factor = attention_factor(config) if config.rope_scaling == "yarn" else 1.0
    angles = positions.unsqueeze(-1).float() * scaled_frequencies(config, positions)
    return angles.cos() * factor, angles.sin() * factor


def scaled_frequencies(config: ModelConfig, positions: Tensor) -> Tensor:
    """Return the frequencies of a config with `rope_scaling`, fp32 `[K/2]`. Only `dynamic` depends on the positions."""
    assert config.rope_factor is not None, "config/model_checks.py refuses it"
    device, factor = positions.device, config.rope_factor
    if config.rope_scaling == "dynamic":
        return rope_frequencies(config.head_dim, _dynamic_theta(config, positions, factor), device)
    plain = rope_frequencies(config.head_dim, config.rope_theta, device)
    if config.rope_scaling == "linear":
        return plain / factor
    kept = _llama3_kept(config, plain) if config.rope_scaling == "llama3" else _yarn_kept(config, device)
    return plain * kept + plain / factor * (1 - kept)


def attention_factor(config: ModelConfig) -> float:
    """Return YaRN's factor on cosines and sines (Peng et al., 2023, arXiv:2309.00071)."""
    if config.rope_attention_factor is not None:
        return config.rope_attention_factor
    assert config.rope_factor is not None
    return 0.1 * math.log(config.rope_factor) + 1.0


def _dynamic_theta(config: ModelConfig, positions: Tensor, factor: float) -> Tensor:
    """Return the base for the longest sequence of `positions`: `rope_theta` up to `max_seq_len`, and more beyond.

    NTK-aware scaling, computed anew for each length (Peng et al., 2023, arXiv:2309.00071). Training never goes beyond
    `max_seq_len`; generation may.
    """
    length = (positions.max() + 1).clamp(min=config.max_seq_len).float()
    growth = factor * length / config.max_seq_len - (factor - 1)
    return config.rope_theta * growth ** (config.head_dim / (config.head_dim - 2))


def _llama3_kept(config: ModelConfig, plain: Tensor) -> Tensor:
    """Return the part of each frequency that Llama 3.1 leaves unscaled, `[K/2]` from 0 to 1.

    It grows with the turns that a pair makes over the original length, as in Llama 3.1's reference code.
    """
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = _original_length(config) * plain / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_kept(config: ModelConfig, device: torch.device) -> Tensor:
    """Return the part of each frequency that YaRN leaves unscaled: a ramp over the pairs, `[K/2]` from 1 to 0.

    Its bounds are the pairs that turn `rope_beta_fast` and `rope_beta_slow` times over the original length.
    """

    def pair(turns: float) -> float:
        return (
            config.head_dim
            * math.log(_original_length(config) / (turns * 2 * math.pi))
            / (2 * math.log(config.rope_theta))
        )

    first, last = pair(config.rope_beta_fast), pair(config.rope_beta_slow)
    if config.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(config.head_dim // 2, dtype=torch.float32, device=device)
    return 1 - ((pairs - first) / (last - first)).clamp(0, 1)


def _original_length(config: ModelConfig) -> int:
    return config.rope_original_seq_len or config.max_seq_len
