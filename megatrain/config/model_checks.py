"""Checks of a model's shape that need more than one key. Imports no torch.

They hold for every model, whether its config was typed or imported. Every message names the key, the given value and
the nearest value that works.
"""

from __future__ import annotations

from megatrain.config.arithmetic import divisors, either, listed, nearest
from megatrain.config.model_config import ROPE_SCALING_KEYS, ModelConfig
from megatrain.errors import ConfigError


def check_model(config: ModelConfig) -> None:
    """Check that the sizes of a model fit together and that each key has an effect."""
    heads, width = config.num_heads, config.hidden_size
    if config.head_size is None and width % heads:
        raise ConfigError(
            f"model.hidden_size={width} is not divisible by model.num_heads={heads}; {_nearest_divisors(heads, width)} "
            f"(or give model.head_size)"
        )
    if heads % config.kv_heads:
        raise ConfigError(
            f"model.num_heads={heads} is not divisible by model.num_kv_heads={config.kv_heads}; "
            f"{_nearest_divisors(config.kv_heads, heads)}"
        )
    if config.position == "rope" and config.head_dim % 2:
        even = [count for count in divisors(width) if (width // count) % 2 == 0]
        options = (
            f"head counts that work for model.hidden_size={width}: {listed(even)}" if even else "use an even width"
        )
        raise ConfigError(
            f"model.position=rope rotates pairs, so the head size must be even; it is {config.head_dim}; "
            + (f"give model.head_size={config.head_size + 1}" if config.head_size else options)
        )
    if config.qk_norm_over != "head" and not config.qk_norm:
        raise ConfigError(f"model.qk_norm_over={config.qk_norm_over} needs model.qk_norm=true, which is false")
    check_rope_scaling(config)


def check_rope_scaling(config: ModelConfig) -> None:
    """Check that the keys of RoPE's scaling are complete, belong to its kind, and can be computed with."""
    kind, used = config.rope_scaling, ROPE_SCALING_KEYS[config.rope_scaling]
    plain = ModelConfig()
    for key in dict.fromkeys(key for keys in ROPE_SCALING_KEYS.values() for key in keys):
        if key not in used and getattr(config, key) != getattr(plain, key):
            kinds = " or ".join(str(name) for name, keys in ROPE_SCALING_KEYS.items() if key in keys)
            raise ConfigError(
                f"model.{key}={getattr(config, key)} has no effect with model.rope_scaling={kind or 'null'}; give "
                f"model.rope_scaling={kinds}, or leave the key out"
            )
    if kind is None:
        return
    if config.position != "rope":
        raise ConfigError(f"model.rope_scaling={kind} needs model.position=rope, given {config.position}")
    if config.rope_factor is None:
        raise ConfigError(f"model.rope_scaling={kind} needs a factor; give for example model.rope_factor=8")
    if kind == "llama3" and config.rope_high_freq_factor <= config.rope_low_freq_factor:
        raise ConfigError(
            f"model.rope_high_freq_factor={config.rope_high_freq_factor:g} must be above "
            f"model.rope_low_freq_factor={config.rope_low_freq_factor:g}; the usual values are 4 and 1"
        )
    if kind == "yarn" and config.rope_beta_fast < config.rope_beta_slow:
        raise ConfigError(
            f"model.rope_beta_fast={config.rope_beta_fast:g} must not be below "
            f"model.rope_beta_slow={config.rope_beta_slow:g}; the usual values are 32 and 1"
        )
    if kind == "dynamic" and config.head_dim == 2:
        raise ConfigError("model.rope_scaling=dynamic needs a head size above 2; give for example model.head_size=4")
    if kind == "yarn" and config.rope_theta == 1:
        raise ConfigError(
            "model.rope_scaling=yarn needs a model.rope_theta other than 1, at which all pairs turn alike"
        )


def _nearest_divisors(given: int, number: int) -> str:
    """Return advice: the divisors of `number` closest to `given`, and all of them."""
    found = divisors(number)
    return f"nearest that work: {either(nearest(found, given))}; all: {listed(found)}"
