"""Write and read Hugging Face folders: config.json and safetensors. hf_tokenizer.py handles the tokenizer.

Three transformers classes compute exactly what our GPT computes: `GPT2LMHeadModel`, `LlamaForCausalLM`, and
`Qwen3ForCausalLM` (with `qk_norm`). In both directions, an option without an equivalent raises an error that names it.
One table (`layout`) maps our weights to theirs, for export and import. This file knows nothing of our checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatrain.config import ModelConfig
from megatrain.errors import CheckpointError, ConfigError, EnvironmentFault
from megatrain.interop.hf_tokenizer import export_tokenizer
from megatrain.model.count import parameter_shapes
from megatrain.model.dtypes import DTYPES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MAX_SHARD_SIZE = "5GB"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentFault("Hugging Face folders need transformers: pip install 'megatrain[hf]'") from error
    return transformers


# ---------------------------------------------------------------------------------------------------- config


GPT2_FAMILY: dict[str, Any] = {
    "norm": "layernorm",
    "position": "learned",
    "activation": "gelu",
    "bias": True,
    "qk_norm": False,
}
LLAMA_FAMILY: dict[str, Any] = {"norm": "rmsnorm", "position": "rope", "activation": "swiglu"}

# fmt: off
HARMLESS_FIELDS = frozenset({
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "name_or_path",
    "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "task_specific_params", "n_ctx", "pretraining_tp",
    "max_window_layers", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout",
})
# fmt: on
"""Fields of a config.json that do not affect what the model computes."""


def hf_config(config: ModelConfig, end_of_document: int | None) -> PretrainedConfig:
    """Return the transformers config equivalent to `config`.

    Raises:
        ConfigError: no class of transformers can express a key; the message names it.
    """
    if config.position == "learned":
        return _gpt2_config(config, end_of_document)
    _require(config, LLAMA_FAMILY, "Llama")
    if config.qk_norm and config.bias:
        raise ConfigError("model.bias=true with model.qk_norm=true has no Hugging Face class; set one of them to false")
    if config.hidden_size % config.num_heads and not config.qk_norm:
        raise ConfigError(
            f"model.head_size={config.head_size}: LlamaForCausalLM needs model.hidden_size={config.hidden_size} "
            f"to be divisible by model.num_heads={config.num_heads}"
        )
    shape = {
        "vocab_size": config.vocab,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "attention_dropout": config.dropout,
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
    }
    if config.qk_norm:
        return _transformers().Qwen3Config(**shape, architectures=["Qwen3ForCausalLM"])
    biases = {"attention_bias": config.bias, "mlp_bias": config.bias}
    return _transformers().LlamaConfig(**shape, **biases, architectures=["LlamaForCausalLM"])


def _gpt2_config(config: ModelConfig, end_of_document: int | None) -> PretrainedConfig:
    _require(config, GPT2_FAMILY, "GPT-2")
    if config.kv_heads != config.num_heads:
        raise ConfigError(
            f"model.num_kv_heads={config.kv_heads}: GPT2LMHeadModel has one key-value head per query head"
        )
    if config.head_dim * config.num_heads != config.hidden_size:
        raise ConfigError(f"model.head_size={config.head_size}: GPT2LMHeadModel needs hidden_size / num_heads")
    return _transformers().GPT2Config(
        vocab_size=config.vocab,
        n_positions=config.max_seq_len,
        n_embd=config.hidden_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_inner=config.ffn_dim,
        activation_function="gelu_new",
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        layer_norm_epsilon=config.norm_eps,
        initializer_range=config.init_std,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=end_of_document,
        eos_token_id=end_of_document,
        architectures=["GPT2LMHeadModel"],
    )


def _require(config: ModelConfig, family: dict[str, Any], name: str) -> None:
    for key, needed in family.items():
        if getattr(config, key) != needed:
            raise ConfigError(
                f"model.{key}={getattr(config, key)} with model.position={config.position} has no Hugging Face class; "
                f"the {name} family has model.{key}={needed}"
            )


def model_config(fields: dict[str, Any], origin: Path) -> ModelConfig:
    """Return our config for the contents of a config.json.

    The result is converted back and compared with the original, so no field is overlooked.

    Raises:
        CheckpointError: our GPT cannot honour a field; the message names it.
    """
    transformers = _transformers()
    kind = fields.get("model_type")
    classes = {"gpt2": "GPT2Config", "llama": "LlamaConfig", "qwen3": "Qwen3Config"}
    if kind not in classes:
        raise CheckpointError(f"{origin}: model_type={kind!r} cannot be imported; allowed: {', '.join(classes)}")
    try:
        theirs = getattr(transformers, classes[kind])(**{k: v for k, v in fields.items() if k != "model_type"})
        config = _from_gpt2(theirs) if kind == "gpt2" else _from_llama(theirs)
        rebuilt = hf_config(config, None).to_dict()
    except ConfigError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    except Exception as error:  # transformers raises exceptions of several libraries
        raise CheckpointError(f"{origin}: not a valid {kind} config ({error})") from error
    given = theirs.to_dict()
    if kind == "gpt2":
        given["n_inner"] = given.get("n_inner") or 4 * given["n_embd"]
        if given.get("activation_function") == "gelu_pytorch_tanh":  # another name of the same function
            given["activation_function"] = "gelu_new"
    for field in sorted((given.keys() | rebuilt.keys()) - HARMLESS_FIELDS):
        if given.get(field) != rebuilt.get(field):
            raise CheckpointError(
                f"{origin}: {field}={given.get(field)!r} cannot be honoured; only {field}={rebuilt.get(field)!r} can"
            )
    return config


def _from_gpt2(theirs: Any) -> ModelConfig:
    return ModelConfig(
        **GPT2_FAMILY,
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


def _from_llama(theirs: Any) -> ModelConfig:
    rope = getattr(theirs, "rope_parameters", None) or {"rope_theta": theirs.rope_theta}  # transformers 5, or 4
    usual_head_size = theirs.hidden_size // theirs.num_attention_heads
    return ModelConfig(
        **LLAMA_FAMILY,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        num_kv_heads=theirs.num_key_value_heads,
        hidden_size=theirs.hidden_size,
        head_size=None if theirs.head_dim == usual_head_size else theirs.head_dim,
        ffn_size=theirs.intermediate_size,
        vocab_size=theirs.vocab_size,
        max_seq_len=theirs.max_position_embeddings,
        norm_eps=theirs.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]),
        bias=theirs.attention_bias,
        tie_embeddings=theirs.tie_word_embeddings,
        qk_norm=theirs.model_type == "qwen3",
        dropout=theirs.attention_dropout,
        init_std=theirs.initializer_range,
    )


# ---------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class Place:
    """A Hugging Face tensor: our `parts`, concatenated along dimension 0, and transposed for GPT-2's `Conv1D`."""

    name: str
    parts: tuple[str, ...]
    transposed: bool = False


def layout(config: ModelConfig) -> list[Place]:
    """Return the Hugging Face tensors, which cover each parameter once; a tied weight is stored as the embedding."""
    gpt2 = config.position == "learned"
    renamed = GPT2_NAMES if gpt2 else LLAMA_NAMES
    places = []
    for name in parameter_shapes(config):
        module, kind = name.rsplit(".", 1)
        stem, block = module, ""
        if module.startswith("blocks."):
            _, block, stem = module.split(".", 2)
        theirs = f"{renamed[stem].format(block)}.{kind}"
        if gpt2 and stem in ("attn.k", "attn.v"):
            continue
        fused = ("q", "k", "v") if gpt2 and stem == "attn.q" else None
        parts = tuple(f"blocks.{block}.attn.{p}.{kind}" for p in fused) if fused else (name,)
        conv = gpt2 and kind == "weight" and stem.startswith(("attn.", "mlp."))
        places.append(Place(theirs, parts, transposed=conv))
    return places


GPT2_NAMES = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "attn_norm": "transformer.h.{}.ln_1",
    "attn.q": "transformer.h.{}.attn.c_attn",
    "attn.k": "transformer.h.{}.attn.c_attn",
    "attn.v": "transformer.h.{}.attn.c_attn",
    "attn.o": "transformer.h.{}.attn.c_proj",
    "mlp_norm": "transformer.h.{}.ln_2",
    "mlp.up": "transformer.h.{}.mlp.c_fc",
    "mlp.down": "transformer.h.{}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn.q": "model.layers.{}.self_attn.q_proj",
    "attn.k": "model.layers.{}.self_attn.k_proj",
    "attn.v": "model.layers.{}.self_attn.v_proj",
    "attn.o": "model.layers.{}.self_attn.o_proj",
    "attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "attn.k_norm": "model.layers.{}.self_attn.k_norm",
    "mlp_norm": "model.layers.{}.post_attention_layernorm",
    "mlp.gate": "model.layers.{}.mlp.gate_proj",
    "mlp.up": "model.layers.{}.mlp.up_proj",
    "mlp.down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}


def to_theirs(config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return our weights with Hugging Face names and shapes.

    Raises:
        CheckpointError: the weights do not match the config.
    """
    _check_tensors({name: tuple(w.shape) for name, w in weights.items()}, parameter_shapes(config), "weights")
    tensors = {}
    for place in layout(config):
        tensor = torch.cat([weights[part] for part in place.parts]) if len(place.parts) > 1 else weights[place.parts[0]]
        tensors[place.name] = (tensor.t() if place.transposed else tensor).to(dtype).contiguous()
    return tensors


def from_theirs(config: ModelConfig, tensors: dict[str, Tensor], origin: Path) -> dict[str, Tensor]:
    """Return Hugging Face tensors with our names and shapes, dtypes unchanged: the inverse of `to_theirs`.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of the wrong shape.
    """
    shapes = parameter_shapes(config)
    expected: dict[str, tuple[int, ...]] = {}
    for place in layout(config):
        rows = sum(shapes[part][0] for part in place.parts)
        shape = (rows, *shapes[place.parts[0]][1:])
        expected[place.name] = shape[::-1] if place.transposed else shape
    _check_tensors({name: tuple(t.shape) for name, t in tensors.items()}, expected, str(origin))
    weights = {}
    for place in layout(config):
        tensor = tensors[place.name].t() if place.transposed else tensors[place.name]
        pieces = torch.split(tensor, [shapes[part][0] for part in place.parts])
        weights.update({part: piece.contiguous() for part, piece in zip(place.parts, pieces, strict=True)})
    return {name: weights[name] for name in shapes}


def _check_tensors(given: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], origin: str) -> None:
    for name in expected.keys() - given.keys():
        raise CheckpointError(f"{origin}: tensor {name} is missing")
    for name in given.keys() - expected.keys():
        raise CheckpointError(f"{origin}: tensor {name} has no place in the model that the config describes")
    for name, shape in expected.items():
        if given[name] != shape:
            raise CheckpointError(f"{origin}: tensor {name} has shape {given[name]}; the config needs {shape}")


# ---------------------------------------------------------------------------------------------------- folders


def export_model(
    config: ModelConfig,
    weights: dict[str, Tensor],
    out: Path,
    *,
    dtype: str = "fp32",
    tokenizer_dir: Path | None = None,
    end_of_document: int | None = None,
    special_tokens: dict[str, Any] | None = None,
) -> None:
    """Write the folder `out` for transformers' `from_pretrained`, atomically.

    `weights` has single-device names, a tied weight once; `dtype` is `fp32`, `bf16` or `fp16`. `tokenizer_dir` is a
    saved tokenizer; its files are copied too, so that our own verbs can read the folder. Generation stops at
    `end_of_document`. `special_tokens` (`bos_token_id` and the like, an id, a list or None) override what follows from
    `end_of_document`.

    Raises:
        ConfigError: no class of transformers can express the config, or `out` exists.
        CheckpointError: the weights do not match the config.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: allowed are {', '.join(DTYPES)}")
    if out.exists():
        raise ConfigError(f"out={out} exists already; name a new folder")
    theirs = hf_config(config, end_of_document)
    theirs.dtype = DTYPES[dtype]
    special = special_tokens or {}
    for name, token in special.items():
        setattr(theirs, name, token)
    tensors = to_theirs(config, weights, DTYPES[dtype])
    from huggingface_hub import save_torch_state_dict

    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        save_torch_state_dict(tensors, partial, max_shard_size=MAX_SHARD_SIZE, metadata={"format": "pt"})
        theirs.save_pretrained(partial)
        stops: dict[str, Any] = dict.fromkeys(SPECIAL_TOKENS, end_of_document)
        _transformers().GenerationConfig(**stops | special).save_pretrained(partial)
        if tokenizer_dir is not None:
            export_tokenizer(tokenizer_dir, partial, config.max_seq_len)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def import_model(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the config and weights of a Hugging Face folder, with single-device names and stored dtypes.

    Raises:
        ConfigError: there is no such folder.
        CheckpointError: a file is missing or damaged, is a pickle, or has something that our GPT cannot honour.
    """
    if not folder.is_dir():
        raise ConfigError(f"path={folder}: no such folder")
    config = model_config(_read_json(folder / "config.json"), folder / "config.json")
    tensors = {}
    for name, tensor in _read_tensors(folder).items():
        if name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")):
            continue  # constants that old exports stored
        if config.position == "learned" and not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"  # saved from the headless GPT2Model, as the original release was
        tensors[name] = tensor
    if config.tie_embeddings and "lm_head.weight" in tensors:
        head, embedding = tensors.pop("lm_head.weight"), layout(config)[0].name
        if embedding in tensors and not torch.equal(head, tensors[embedding]):
            raise CheckpointError(f"{folder}: tie_word_embeddings is true, but lm_head.weight is not {embedding}")
    return config, from_theirs(config, tensors, folder)


def special_tokens_of(folder: Path) -> dict[str, Any]:
    """Return `bos_token_id`, `eos_token_id` and `pad_token_id` of a Hugging Face folder, None where it names none.

    generation_config.json comes before config.json, because it is what stops generation. Empty if both name none.
    """
    found: dict[str, Any] = {}
    for path in (folder / "config.json", folder / "generation_config.json"):
        fields = _read_json(path) if path.is_file() else {}
        found |= {name: fields[name] for name in SPECIAL_TOKENS if fields.get(name) is not None}
    return {name: found.get(name) for name in SPECIAL_TOKENS} if found else {}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; every Hugging Face folder has one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder's safetensors files: those that the index lists, or else model.safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: has no weight_map")
        files = sorted({Path(str(name)).name for name in weight_map.values()})
    else:
        files = ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not (folder / file).is_file():
            pickles = sorted(path.name for path in folder.glob("*.bin"))
            why = f"; {pickles[0]} is a pickle, which is never loaded: convert it to safetensors" if pickles else ""
            raise CheckpointError(f"{folder}: {file} is missing{why}")
        try:
            tensors.update(load_file(folder / file))
        except SafetensorError as error:
            raise CheckpointError(f"{folder / file}: damaged ({error})") from error
    return tensors
