"""Which classes of transformers compute what our GPT computes. hf_config.py translates their configs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatrain.config import ModelConfig
from megatrain.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """The classes of a `model_type`, named `<prefix>Config` and `<prefix>ForCausalLM` (GPT-2: `LMHeadModel`).

    `allows` gives the values that our keys may have. A key without an entry may have any.
    """

    prefix: str
    allows: Mapping[str, tuple[Any, ...]]

    @property
    def model_class(self) -> str:
        """Return the name of the model's class."""
        return f"{self.prefix}{'LMHeadModel' if self.prefix == 'GPT2' else 'ForCausalLM'}"

    @property
    def score_class(self) -> str:
        """Return the name of the class that gives a sequence a score."""
        return f"{self.prefix}ForSequenceClassification"


LLAMA: dict[str, tuple[Any, ...]] = {
    "norm": ("rmsnorm",),
    "position": ("rope",),
    "activation": ("swiglu",),
    "bias": (False,),
    "attention_bias": ("none", "all"),
    "norm_place": ("before",),
    "qk_norm": (False,),
    "qk_norm_over": ("head",),
    "embedding_scale": (None,),
    "sliding_window": (None,),
}
"""What most families allow: Llama without biases in the feed-forward layer."""

GPT2: dict[str, tuple[Any, ...]] = {
    "norm": ("layernorm",),
    "position": ("learned",),
    "activation": ("gelu",),
    "bias": (True,),
}


def _without(allows: Mapping[str, tuple[Any, ...]], key: str) -> dict[str, tuple[Any, ...]]:
    return {name: values for name, values in allows.items() if name != key}


WINDOWED = _without(LLAMA, "sliding_window")

FAMILIES = {
    "gpt2": Family("GPT2", {**LLAMA, **GPT2, "attention_bias": ("all",)}),
    "llama": Family("Llama", {**LLAMA, "bias": (False, True)}),
    "mistral": Family("Mistral", {**WINDOWED, "attention_bias": ("none",)}),
    "qwen2": Family("Qwen2", {**WINDOWED, "attention_bias": ("qkv",)}),
    "qwen3": Family("Qwen3", {**WINDOWED, "qk_norm": (True,)}),
    "olmo2": Family("Olmo2", {**LLAMA, "norm_place": ("after",), "qk_norm": (True,), "qk_norm_over": ("heads",)}),
    "phi3": Family("Phi3", {**WINDOWED, "attention_bias": ("none",), "rope_scaling": (None,)}),
    "gemma": Family("Gemma", {**_without(LLAMA, "embedding_scale"), "activation": ("geglu",)}),
}
"""The families that can be imported and exported, by `model_type`."""

HAS_ATTENTION_BIAS = ("llama", "qwen3", "olmo2", "gemma")
"""The families with the field `attention_bias`, for all four projections of attention."""

UNSUPPORTED = {
    "bloom": "ALiBi positions",
    "cohere": "attention and feed-forward layers side by side, and scaled logits",
    "deepseek_v2": "latent attention and a mixture of experts",
    "deepseek_v3": "latent attention and a mixture of experts",
    "falcon": "attention and feed-forward layers side by side",
    "gemma2": "soft caps on scores and logits, and norms both before and after each layer",
    "gemma3": "images, and windows that differ between layers",
    "gemma3_text": "windows that differ between layers, and norms both before and after each layer",
    "gpt_neox": "attention and feed-forward layers side by side",
    "gptj": "attention and feed-forward layers side by side",
    "gpt_oss": "a mixture of experts and attention sinks",
    "granite": "factors on residuals, scores and logits",
    "llama4": "a mixture of experts",
    "llama4_text": "a mixture of experts",
    "ministral": "windows that differ between layers",
    "mixtral": "a mixture of experts",
    "mpt": "ALiBi positions",
    "olmo": "norms without weights",
    "olmo3": "windows that differ between layers",
    "olmoe": "a mixture of experts",
    "opt": "ReLU, and positions that begin at 2",
    "phi": "attention and feed-forward layers side by side",
    "phimoe": "a mixture of experts",
    "qwen2_moe": "a mixture of experts",
    "qwen3_moe": "a mixture of experts",
    "qwen3_next": "linear attention and a mixture of experts",
    "smollm3": "layers without rotary positions",
    "stablelm": "rotation of a part of each head",
}
"""What our GPT lacks for other well-known values of `model_type`."""


def family_of(config: ModelConfig) -> str:
    """Return the `model_type` whose class computes `config`.

    Raises:
        ConfigError: none does; the message names the first key that the nearest class does not allow.
    """
    if config.position == "learned":
        kind = "gpt2"
    elif config.norm_place == "after":
        kind = "olmo2"
    elif config.activation == "geglu" or config.embedding_scale is not None:
        kind = "gemma"
    elif config.qk_norm:
        kind = "qwen3"
    elif config.qkv_bias and not config.attention_output_bias:
        kind = "qwen2"
    elif config.sliding_window is not None:
        kind = "mistral"
    else:
        kind = "llama"
    check_family(config, kind)
    return kind


def check_family(config: ModelConfig, kind: str) -> None:
    """Check that a family's class computes `config`. Raises ConfigError, naming the key that it does not allow."""
    family, width = FAMILIES[kind], config.hidden_size
    given = {**vars(config), "attention_bias": _attention_bias(config)}
    for key, allowed in family.allows.items():
        if given[key] not in allowed:
            needed = " or ".join(f"model.{key}={_shown(value)}" for value in allowed)
            raise ConfigError(
                f"model.{key}={_shown(given[key])} cannot be exported: of the Hugging Face classes, "
                f"{family.model_class} is the nearest to this model, and it has {needed}"
            )
    if kind == "gpt2" and config.kv_heads != config.num_heads:
        raise ConfigError(
            f"model.num_kv_heads={config.kv_heads}: GPT2LMHeadModel has one key-value head per query head"
        )
    if kind == "gpt2" and config.head_dim * config.num_heads != width:
        raise ConfigError(f"model.head_size={config.head_size}: GPT2LMHeadModel needs hidden_size / num_heads")
    if kind == "llama" and width % config.num_heads:
        raise ConfigError(
            f"model.head_size={config.head_size}: LlamaForCausalLM needs model.hidden_size={width} to be divisible by "
            f"model.num_heads={config.num_heads}"
        )
    if kind == "gemma" and config.embedding_scale != math.sqrt(width):
        raise ConfigError(
            f"model.embedding_scale={config.embedding_scale}: GemmaForCausalLM has sqrt(hidden_size)={math.sqrt(width)}"
        )


def _attention_bias(config: ModelConfig) -> str:
    return "all" if config.attention_output_bias else "qkv" if config.qkv_bias else "none"


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
