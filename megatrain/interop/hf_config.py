"""Translate a config.json of transformers into ours and back. huggingface.py handles weights and folders.

hf_families.py says which classes of transformers compute what our GPT computes. On import the result is converted back
and compared field by field with the original, so no field is overlooked: what cannot be honoured is refused by name.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatrain.config import ROPE_SCALING_KEYS, ModelConfig
from megatrain.errors import CheckpointError, ConfigError, EnvironmentFault
from megatrain.interop.hf_families import FAMILIES, GPT2, HAS_ATTENTION_BIAS, UNSUPPORTED, check_family, family_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LOG = logging.getLogger("megatrain")


def transformers_module() -> Any:
    """Import transformers. Raises EnvironmentFault if it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentFault("Hugging Face folders need transformers: pip install 'megatrain[hf]'") from error
    return transformers


# ---------------------------------------------------------------------------------------------------- ours to theirs


def hf_config(config: ModelConfig, end_of_document: int | None, kind: str | None = None) -> PretrainedConfig:
    """Return the transformers config equivalent to `config`: of family `kind`, or of the one that `family_of` finds.

    Raises:
        ConfigError: no class of transformers can express a key; the message names it.
    """
    kind = kind or family_of(config)
    check_family(config, kind)
    family = FAMILIES[kind]
    fields = {
        "vocab_size": config.vocab,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "pad_token_id": None,
        "architectures": [family.model_class],
        **(_gpt2_fields(config) if kind == "gpt2" else _llama_fields(config, kind)),
    }
    theirs: PretrainedConfig = getattr(transformers_module(), f"{family.prefix}Config")(**fields)
    return theirs


def _gpt2_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_positions": config.max_seq_len,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.ffn_dim,
        "activation_function": "gelu_new",
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
    }


def _llama_fields(config: ModelConfig, kind: str) -> dict[str, Any]:
    fields = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": _rope_fields(config),
        "attention_dropout": 0.0,  # theirs is on attention weights alone, ours on embeddings and residuals too
    }
    if kind in HAS_ATTENTION_BIAS:
        fields["attention_bias"] = config.attention_output_bias
    if kind == "llama":
        fields["mlp_bias"] = config.bias
    if kind in ("mistral", "phi3"):
        fields["sliding_window"] = config.sliding_window
    if kind in ("qwen2", "qwen3"):
        windowed = config.sliding_window is not None
        fields.update(use_sliding_window=windowed, sliding_window=config.sliding_window, max_window_layers=0)
    return fields


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


def _rope_fields(config: ModelConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_type": config.rope_scaling or "default", "rope_theta": config.rope_theta}
    for key in ROPE_SCALING_KEYS[config.rope_scaling]:
        value = getattr(config, key)
        if key == "rope_original_seq_len":
            value = value or config.max_seq_len
        if value is not None:
            fields[ROPE_FIELDS[key]] = value
    return fields


# ---------------------------------------------------------------------------------------------------- theirs to ours

# fmt: off
HARMLESS_FIELDS = frozenset({
    # who wrote the file, how it is loaded and with which tokenizer
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "transformers.js_config",
    "_name_or_path", "name_or_path", "_commit_hash", "auto_map", "tokenizer_class", "is_llama_config",
    "unsloth_fixed", "unsloth_version", "use_cache", "torchscript", "pretraining_tp", "gradient_checkpointing",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled",
    "use_flash_attn", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "prefix", "max_sequence_length", "tokenizer_model_max_length",
    # other tasks, and what a forward pass returns
    "finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id", "return_dict",
    "output_attentions", "output_hidden_states", "output_scores", "output_past", "_num_labels",
    "return_dict_in_generate", "summary_type",
    "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    # computes the same in pieces
    "chunk_size_feed_forward",
    # generation, which has a file of its own
    "max_length", "max_new_tokens", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens",
})
"""Fields of a config.json that do not affect what the model computes, whatever their value."""

REPEATED_FIELDS = frozenset({"n_ctx", "max_window_layers", "original_max_position_embeddings"})
"""Fields that transformers merges into others, which are checked."""

HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,), "attention_bias": (False,), "clip_qkv": (None,), "hidden_activation":
    ("gelu_pytorch_tanh",), "is_causal": (True,), "is_decoder": (False, True), "is_encoder_decoder": (False,),
    "mlp_bias": (False,), "partial_rotary_factor": (1, 1.0), "pruned_heads": ({},), "qk_layernorm": (False,),
    "rope_interleaved": (False,), "tf_legacy_loss": (False,), "tie_encoder_decoder": (False,), "use_bfloat16": (False,
    True), "use_bidirectional_attention": (False,), "use_mrope": (False,), "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
"""Fields that some families do not have, and the values at which they change nothing. A null never does."""
# fmt: on

DROPOUT_FIELDS = ("attention_dropout", "resid_pdrop", "embd_pdrop")
"""Dropout of all families but GPT-2: it acts in training alone, and not where `model.dropout` acts."""

ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
"""Fields that describe the rotation. They are read from the file, and never reach transformers."""


def model_config(fields: dict[str, Any], origin: Path) -> ModelConfig:
    """Return our config for the contents of a config.json.

    Dropout is taken over from GPT-2 only; other families' acts elsewhere than ours, so it is left out with a warning.

    Raises:
        CheckpointError: our GPT cannot honour a field; the message names it.
    """
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        lacks = UNSUPPORTED.get(kind) if isinstance(kind, str) else None
        why = f": it has {lacks}, which this model has not" if lacks else ""
        raise CheckpointError(f"{origin}: model_type={kind!r} cannot be imported{why}; allowed: {', '.join(FAMILIES)}")
    if fields.get("quantization_config") is not None:
        raise CheckpointError(f"{origin}: quantization_config is set; import the weights before they were quantized")
    used = {field: value for field, value in fields.items() if field not in HARMLESS_FIELDS}
    if kind != "gpt2":
        used = {field: value for field, value in used.items() if field not in ROPE}
    used.update(
        bos_token_id=None, eos_token_id=None, pad_token_id=None
    )  # the classes' defaults exceed small vocabularies
    transformers = transformers_module()
    try:
        theirs = getattr(transformers, f"{FAMILIES[kind].prefix}Config")(**used)
        config = _from_gpt2(theirs) if kind == "gpt2" else _from_llama(theirs, kind, fields)
        rebuilt = hf_config(config, None, kind).to_dict()
    except ConfigError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    except Exception as error:  # transformers raises exceptions of several libraries
        raise CheckpointError(f"{origin}: not a valid {kind} config ({error})") from error
    _compare(_comparable(theirs.to_dict(), kind, config), rebuilt, origin)
    if kind != "gpt2":
        _warn_of_dropout(theirs, origin)
    return config


def _comparable(given: dict[str, Any], kind: str, config: ModelConfig) -> dict[str, Any]:
    """Return their fields with one name for each value of which they have two, and without those checked elsewhere."""
    if kind == "gpt2":
        given["n_inner"] = given.get("n_inner") or 4 * given["n_embd"]
        if given.get("activation_function") == "gelu_pytorch_tanh":
            given["activation_function"] = "gelu_new"
        return given
    given["head_dim"] = given.get("head_dim") or config.head_dim
    if given.get("hidden_act") == "swish":
        given["hidden_act"] = "silu"
    return {field: value for field, value in given.items() if field not in (*DROPOUT_FIELDS, *ROPE)}


def _compare(given: dict[str, Any], rebuilt: dict[str, Any], origin: Path) -> None:
    """Refuse the first field, in alphabetical order, that our config does not express."""
    for field in sorted(given.keys() - HARMLESS_FIELDS - REPEATED_FIELDS):
        value = given[field]
        if value is None and rebuilt.get(field) is None:
            continue
        if field in rebuilt and value != rebuilt[field]:
            raise CheckpointError(
                f"{origin}: {field}={value!r} cannot be honoured; only {field}={rebuilt[field]!r} can"
            )
        if field not in rebuilt and value not in HARMLESS_VALUES.get(field, ()):
            known = HARMLESS_VALUES.get(field)
            advice = f"only {field}={known[0]!r} can" if known else "if it changes nothing, remove it from the file"
            what = "cannot be honoured" if known else "is not a known field, so what it changes is unknown"
            raise CheckpointError(f"{origin}: {field}={value!r} {what}; {advice}")


def _warn_of_dropout(theirs: Any, origin: Path) -> None:
    for field in DROPOUT_FIELDS:
        if rate := getattr(theirs, field, None):
            _LOG.warning(
                "%s: %s=%s is left out, because model.dropout acts in other places; set model.dropout to train with it",
                origin,
                field,
                rate,
            )


def _from_gpt2(theirs: Any) -> ModelConfig:
    return ModelConfig(
        **{key: values[0] for key, values in GPT2.items()},
        num_layers=theirs.n_layer,
        num_heads=theirs.n_head,
        hidden_size=theirs.n_embd,
        ffn_size=theirs.n_inner or 4 * theirs.n_embd,
        vocab_size=theirs.vocab_size,
        max_seq_len=theirs.n_positions,
        norm_eps=theirs.layer_norm_epsilon,
        tie_embeddings=theirs.tie_word_embeddings,
        dropout=theirs.resid_pdrop,
        init_std=theirs.initializer_range,
    )


def _from_llama(theirs: Any, kind: str, fields: dict[str, Any]) -> ModelConfig:
    heads, kv_heads, width = theirs.num_attention_heads, theirs.num_key_value_heads, theirs.hidden_size
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads={heads} is not divisible by num_key_value_heads={kv_heads}")
    head_size = getattr(theirs, "head_dim", None) or width // heads
    if head_size % 2:
        raise ConfigError(f"the size of a head is {head_size}; rotary positions need an even one")
    bias = kind == "llama" and theirs.mlp_bias
    in_attention = "qkv" if kind == "qwen2" else "none"
    if kind in HAS_ATTENTION_BIAS and theirs.attention_bias:
        in_attention = "all"
    olmo2, gemma = kind == "olmo2", kind == "gemma"
    return ModelConfig(
        norm="rmsnorm",
        position="rope",
        activation="geglu" if gemma else "swiglu",
        num_layers=theirs.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        hidden_size=width,
        head_size=None if head_size * heads == width else head_size,
        ffn_size=theirs.intermediate_size,
        vocab_size=theirs.vocab_size,
        max_seq_len=theirs.max_position_embeddings,
        norm_eps=theirs.rms_norm_eps,
        bias=bias,
        attention_bias=None if in_attention == ("all" if bias else "none") else in_attention,
        sliding_window=_window(theirs),
        embedding_scale=math.sqrt(width) if gemma else None,
        norm_place="after" if olmo2 else "before",
        qk_norm=kind in ("olmo2", "qwen3"),
        qk_norm_over="heads" if olmo2 else "head",
        tie_embeddings=theirs.tie_word_embeddings,
        init_std=theirs.initializer_range,
        **_rope_keys(_rope_of(fields, theirs), theirs.max_position_embeddings, kind),
    )


def _window(theirs: Any) -> int | None:
    """Return the sliding window of all layers, or None. Raises ConfigError if layers differ."""
    window: int | None = getattr(theirs, "sliding_window", None)
    kinds = set(getattr(theirs, "layer_types", None) or ())
    if len(kinds) > 1 or kinds - {"sliding_attention", "full_attention"}:
        raise ConfigError(
            f"layer_types has {' and '.join(sorted(kinds))}; only sliding_attention in all layers, or full_attention "
            f"in all, can be honoured"
        )
    return None if kinds == {"full_attention"} else window


def _rope_of(fields: dict[str, Any], theirs: Any) -> dict[str, Any]:
    """Return `rope_parameters` of a config.json, from whichever fields it has them in, without nulls."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_parameters={rope!r} is not an object")
    beside = {field: fields.get(field) for field in ("rope_theta", "partial_rotary_factor")}
    rope = {"rope_theta": getattr(theirs, "default_theta", 10000.0), **_set(beside), **_set(rope)}
    if (original := fields.get("original_max_position_embeddings")) is not None:  # transformers prefers this one
        rope["original_max_position_embeddings"] = original
    return rope


def _set(fields: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in fields.items() if value is not None}


def _rope_keys(rope: dict[str, Any], longest: int, family: str) -> dict[str, Any]:
    """Return our keys for their `rope_parameters`. Raises ConfigError for what is missing, unknown or invalid."""
    kind = rope.pop("rope_type", rope.get("type", "default"))
    rope.pop("type", None)
    rope.pop("finetuned", None)  # a remark of old YaRN configs
    scaling = None if kind == "default" else kind
    allowed = (None,) if family == "phi3" else tuple(ROPE_SCALING_KEYS)
    if scaling not in allowed:
        raise ConfigError(
            f"rope_parameters.rope_type={kind!r} of {family} cannot be honoured; allowed: "
            f"{', '.join(name or 'default' for name in allowed)}"
        )
    if (part := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"rope_parameters.partial_rotary_factor={part!r} cannot be honoured; only 1.0 can")
    for field, value in sorted(rope.items()):
        if field != "truncate" and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
            raise ConfigError(f"rope_parameters.{field}={value!r} with rope_type={kind} is not a number that it takes")
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
            raise ConfigError(f"rope_parameters.{field} is missing; rope_type={kind} needs it")
    if rope:
        field, value = sorted(rope.items())[0]
        raise ConfigError(f"rope_parameters.{field}={value!r} has no known effect with rope_type={kind}")
    for key, value in keys.items():
        if key not in ("rope_scaling", "rope_truncate") and value == 0:
            raise ConfigError(f"rope_parameters.{ROPE_FIELDS.get(key, key)}=0 must be above 0")
    if keys.get("rope_factor", 1) < 1:
        raise ConfigError(f"rope_parameters.factor={keys['rope_factor']!r} must be 1 or more")
    return keys


def _resolve_attention_factor(rope: dict[str, Any]) -> None:
    """Replace DeepSeek's `mscale` and `mscale_all_dim` by the attention factor that they give."""
    above, below = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    if above and below and "attention_factor" not in rope and rope["factor"] > 1:
        growth = 0.1 * math.log(rope["factor"])
        rope["attention_factor"] = (above * growth + 1) / (below * growth + 1)
