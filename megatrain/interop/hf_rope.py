"""Translate the fields of a config.json that describe rotary positions, `rope_parameters` and the like, and back."""

from __future__ import annotations

import math
from typing import Any

from megatrain.config import ROPE_SCALING_KEYS, ModelConfig
from megatrain.errors import ConfigError

ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
"""Fields that describe the rotation. They are read from the file, and never reach transformers."""

ROPE_FIELDS = {
    "rope_factor": "factor",
    "rope_original_seq_len": "original_max_position_embeddings",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_beta_fast": "beta_fast",
    "rope_beta_slow": "beta_slow",
    "rope_truncate": "truncate",
    "rope_attention_factor": "attention_factor",
}
"""Our keys of RoPE's scaling, and their names in `rope_parameters`."""


def rope_fields(config: ModelConfig) -> dict[str, Any]:
    """Return the `rope_parameters` of a config."""
    fields: dict[str, Any] = {"rope_type": config.rope_scaling or "default", "rope_theta": config.rope_theta}
    for key in ROPE_SCALING_KEYS[config.rope_scaling]:
        value = getattr(config, key)
        if key == "rope_original_seq_len":
            value = value or config.max_seq_len
        if value is not None:
            fields[ROPE_FIELDS[key]] = value
    return fields


def rope_section(fields: dict[str, Any]) -> str:
    """Return the field of a config.json that describes RoPE. As in transformers, the older name comes first."""
    return "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"


def rope_of(fields: dict[str, Any], theirs: Any) -> dict[str, Any]:
    """Return what a config.json says of RoPE, from whichever fields it has it in, without nulls.

    Of two fields with the same value, the one that transformers takes counts.
    """
    rope = fields.get(rope_section(fields)) or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{rope_section(fields)}={rope!r} is not an object")
    beside = {field: fields.get(field) for field in ("rope_theta", "partial_rotary_factor")}
    rope = {"rope_theta": getattr(theirs, "default_theta", 10000.0), **_set(beside), **_set(rope)}
    if (original := fields.get("original_max_position_embeddings")) is not None:  # transformers prefers this one
        rope["original_max_position_embeddings"] = original
    return rope


def _set(fields: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in fields.items() if value is not None}


def rope_keys(rope: dict[str, Any], section: str, longest: int, family: str) -> dict[str, Any]:
    """Return our keys for what `rope_of` found in the field `section`; bounds are not checked here.

    Raises:
        ConfigError: a field is missing, unknown or not a number.
    """
    kind = rope.pop("rope_type", rope.get("type", "default"))
    rope.pop("type", None)
    rope.pop("finetuned", None)  # a remark of old YaRN configs
    scaling = None if kind == "default" else kind
    allowed = (None,) if family == "phi3" else tuple(ROPE_SCALING_KEYS)
    if scaling not in allowed:
        raise ConfigError(
            f"{section}.rope_type={kind!r} of {family} cannot be honoured; allowed: "
            f"{', '.join(name or 'default' for name in allowed)}"
        )
    if (part := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"{section}.partial_rotary_factor={part!r} cannot be honoured; only 1.0 can")
    for field, value in sorted(rope.items()):
        kinds = {"truncate": (bool,), "original_max_position_embeddings": (int,)}.get(field, (int, float))
        if type(value) not in kinds:
            needed = " or ".join({bool: "true or false", int: "an integer", float: "a number"}[t] for t in kinds[-1:])
            raise ConfigError(f"{section}.{field}={value!r} with rope_type={kind} is not {needed}")
    keys: dict[str, Any] = {"rope_scaling": scaling, "rope_theta": float(rope.pop("rope_theta"))}
    used = ROPE_SCALING_KEYS[scaling]
    original = rope.get("original_max_position_embeddings", longest)
    if scaling == "yarn":
        rope.setdefault("factor", longest / original)
        _resolve_attention_factor(rope)
        rope = {field: value for field, value in rope.items() if field not in ("beta_fast", "beta_slow") or value}
    if "rope_original_seq_len" not in used or original == longest:
        rope.pop("original_max_position_embeddings", None)
    for key in used:
        field = ROPE_FIELDS[key]
        if field in rope:
            value = rope.pop(field)
            keys[key] = {"rope_truncate": bool, "rope_original_seq_len": int}.get(key, float)(value)
        elif field in ("factor", "low_freq_factor", "high_freq_factor"):
            raise ConfigError(f"{section}.{field} is missing; rope_type={kind} needs it")
    if rope:
        field, value = sorted(rope.items())[0]
        raise ConfigError(f"{section}.{field}={value!r} has no known effect with rope_type={kind}")
    return keys


def _resolve_attention_factor(rope: dict[str, Any]) -> None:
    """Replace DeepSeek's `mscale` and `mscale_all_dim` by the attention factor that they give."""
    above, below = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    if above and below and "attention_factor" not in rope and rope["factor"] > 1:
        growth = 0.1 * math.log(rope["factor"])
        rope["attention_factor"] = (above * growth + 1) / (below * growth + 1)
