"""Translate a config.json of transformers into ours and back. huggingface.py handles weights and folders.

hf_families.py says which classes of transformers compute what our GPT computes. On import the result is converted back
and compared field by field with the original, so no field is overlooked: what cannot be honoured is refused by name.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatrain.config import ModelConfig
from megatrain.config.compose import check_value
from megatrain.config.model_checks import check_model
from megatrain.errors import CheckpointError, ConfigError, EnvironmentFault, how_to_install
from megatrain.interop.hf_families import (
    FAMILIES,
    GPT2,
    HAS_ATTENTION_BIAS,
    UNSUPPORTED,
    Family,
    check_family,
    family_of,
)
from megatrain.interop.hf_rope import ROPE, ROPE_FIELDS, rope_fields, rope_keys, rope_of, rope_section

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LOG = logging.getLogger("megatrain")


def transformers_module() -> Any:
    """Import transformers. Raises EnvironmentFault if it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentFault(f"Hugging Face folders need transformers: {how_to_install('hf')}") from error
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
        **{field: _resolved(config)[key] for key, field in names(kind).items()},
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "pad_token_id": None,
        "architectures": [family.model_class],
        **(_score_fields(family, end_of_document) if config.output == "score" else {}),
        **(_gpt2_fields(config) if kind == "gpt2" else _llama_fields(config, kind)),
    }
    theirs: PretrainedConfig = getattr(transformers_module(), f"{family.prefix}Config")(**fields)
    return theirs


def _score_fields(family: Family, end_of_document: int | None) -> dict[str, Any]:
    """Return the fields of a model with one score, which its class takes from the last token that is no padding.

    Raises ConfigError if transformers has no such class.
    """
    if not hasattr(transformers_module(), family.score_class):
        raise ConfigError(f"model.output=score: transformers has no {family.score_class}; give another family=...")
    return {"architectures": [family.score_class], "num_labels": 1, "pad_token_id": end_of_document}


_EVERYWHERE = {"vocab_size": "vocab_size", "init_std": "initializer_range", "tie_embeddings": "tie_word_embeddings"}
_GPT2 = {
    "max_seq_len": "n_positions",
    "hidden_size": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "ffn_size": "n_inner",
    "dropout": "resid_pdrop",
    "norm_eps": "layer_norm_epsilon",
}
_LLAMA = {
    "hidden_size": "hidden_size",
    "ffn_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}


def names(kind: str) -> dict[str, str]:
    """Return the names that a family's config.json has for our keys, of those that mean the same."""
    return {**_EVERYWHERE, **(_GPT2 if kind == "gpt2" else _LLAMA)}


def _resolved(config: ModelConfig) -> dict[str, Any]:
    """Return our keys and values, with nulls replaced by what they mean."""
    sizes = {"ffn_size": config.ffn_dim, "num_kv_heads": config.kv_heads, "head_size": config.head_dim}
    return {**vars(config), "vocab_size": config.vocab, **sizes}


def _gpt2_fields(config: ModelConfig) -> dict[str, Any]:
    return {"activation_function": "gelu_new", "embd_pdrop": config.dropout, "attn_pdrop": config.dropout}


def _llama_fields(config: ModelConfig, kind: str) -> dict[str, Any]:
    fields = {
        "rope_parameters": rope_fields(config),
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
        given = {key: fields.get(field) for key, field in names(kind).items()}
        _check_bounds(given, names(kind))  # first, because transformers makes a list of the layers
        theirs = getattr(transformers, f"{FAMILIES[kind].prefix}Config")(**used)
        config = _from_gpt2(theirs) if kind == "gpt2" else _from_llama(theirs, kind, fields)
        _check(config, {**names(kind), "sliding_window": "sliding_window", **_rope_names(fields)})
        rebuilt = hf_config(config, None, kind).to_dict()
    except ConfigError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    except Exception as error:  # transformers raises exceptions of several libraries
        raise CheckpointError(f"{origin}: not a valid {kind} config ({error})") from error
    _compare(_comparable(theirs.to_dict(), kind, config), rebuilt, origin)
    if FAMILIES[kind].score_class in (fields.get("architectures") or []):
        if (labels := len(fields.get("id2label") or (0, 0))) != 1:
            raise CheckpointError(f"{origin}: it has {labels} labels; a model that scores has one")
        config.output = "score"
    if kind != "gpt2":
        _warn_of_dropout(theirs, origin)
    return config


def _rope_names(fields: dict[str, Any]) -> dict[str, str]:
    inside = {"rope_scaling": "rope_type", **ROPE_FIELDS}
    return {key: f"{rope_section(fields)}.{field}" for key, field in inside.items()} | {"rope_theta": "rope_theta"}


def _check(config: ModelConfig, names: dict[str, str]) -> None:
    """Check a config as `megatrain train` does. Raises ConfigError, with the names that the config.json has."""
    _check_bounds(vars(config), names)
    try:
        check_model(config)
    except ConfigError as error:
        text = re.sub(r"\bmodel\.(\w+)", lambda found: names.get(found[1], found[0]), str(error))
        raise ConfigError(text) from error


def _check_bounds(values: dict[str, Any], names: dict[str, str]) -> None:
    """Check the values of our keys, None aside, against their bounds. Raises ConfigError with their names."""
    for f in dataclasses.fields(ModelConfig):
        if (value := values.get(f.name)) is not None:
            check_value(names.get(f.name, f"model.{f.name}"), value, f.metadata)


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


def _same(theirs: Any, kind: str) -> dict[str, Any]:
    return {key: getattr(theirs, field) for key, field in names(kind).items() if hasattr(theirs, field)}


def _from_gpt2(theirs: Any) -> ModelConfig:
    same = {**_same(theirs, "gpt2"), "ffn_size": theirs.n_inner or 4 * theirs.n_embd}
    return ModelConfig(**{key: values[0] for key, values in GPT2.items()}, **same)


def _from_llama(theirs: Any, kind: str, fields: dict[str, Any]) -> ModelConfig:
    heads, width = theirs.num_attention_heads, theirs.hidden_size
    head_size = getattr(theirs, "head_dim", None) or width // heads
    bias = kind == "llama" and theirs.mlp_bias
    in_attention = "qkv" if kind == "qwen2" else "none"
    if kind in HAS_ATTENTION_BIAS and theirs.attention_bias:
        in_attention = "all"
    olmo2, gemma = kind == "olmo2", kind == "gemma"
    return ModelConfig(
        **{**_same(theirs, kind), "head_size": None if head_size * heads == width else head_size},
        norm="rmsnorm",
        position="rope",
        activation="geglu" if gemma else "swiglu",
        bias=bias,
        attention_bias=None if in_attention == ("all" if bias else "none") else in_attention,
        sliding_window=_window(theirs),
        embedding_scale=math.sqrt(width) if gemma else None,
        norm_place="after" if olmo2 else "before",
        qk_norm=kind in ("olmo2", "qwen3"),
        qk_norm_over="heads" if olmo2 else "head",
        **rope_keys(rope_of(fields, theirs), rope_section(fields), theirs.max_position_embeddings, kind),
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
