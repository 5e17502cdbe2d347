"""Write and read Hugging Face folders: config.json and safetensors.

hf_families.py says which classes of transformers compute what our GPT computes; hf_config.py translates configs;
hf_tokenizer.py handles the tokenizer. One table (`layout`) maps our weights to theirs, for export and import. This file
knows nothing of our checkpoints.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.config import ModelConfig
from megatrain.errors import CheckpointError, ConfigError, EnvironmentFault
from megatrain.interop.hf_config import hf_config, model_config, transformers_module
from megatrain.interop.hf_families import family_of
from megatrain.interop.hf_tokenizer import export_tokenizer
from megatrain.model.count import parameter_shapes
from megatrain.model.dtypes import DTYPES
from megatrain.resilience.atomic_file import remove_abandoned, temporary_name

MAX_SHARD_SIZE = "5GB"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


# ---------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class Place:
    """A Hugging Face tensor: our `parts`, concatenated along dimension 0.

    GPT-2's `Conv1D` has it `transposed`. Gemma's norms multiply by their weight plus 1, so theirs is `one_less`.
    """

    name: str
    parts: tuple[str, ...]
    transposed: bool = False
    one_less: bool = False


def layout(config: ModelConfig, kind: str) -> list[Place]:
    """Return the Hugging Face tensors of a family; they cover each parameter once, a tied weight as the embedding."""
    renamed = {**LLAMA_NAMES, **RENAMED.get(kind, {})}
    fused = FUSED.get(kind, ())
    places = []
    for name in parameter_shapes(config):
        module, what = name.rsplit(".", 1)
        stem, block = module, ""
        if module.startswith("blocks."):
            _, block, stem = module.split(".", 2)
        group = next((stems for stems in fused if stem in stems), (stem,))
        if stem != group[0]:
            continue
        parts = (name,) if len(group) == 1 else tuple(f"blocks.{block}.{part}.{what}" for part in group)
        conv = kind == "gpt2" and what == "weight" and stem.startswith(("attn.", "mlp."))
        one_less = kind == "gemma" and stem.endswith("norm")
        places.append(Place(f"{renamed[stem].format(block)}.{what}", parts, transposed=conv, one_less=one_less))
    return places


GPT2_NAMES = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "attn_norm": "transformer.h.{}.ln_1",
    "attn.q": "transformer.h.{}.attn.c_attn",
    "attn.o": "transformer.h.{}.attn.c_proj",
    "mlp_norm": "transformer.h.{}.ln_2",
    "mlp.up": "transformer.h.{}.mlp.c_fc",
    "mlp.down": "transformer.h.{}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "score": "score",
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
    "score": "score",
    "head": "lm_head",
}
RENAMED = {
    "gpt2": GPT2_NAMES,
    "olmo2": {
        "attn_norm": "model.layers.{}.post_attention_layernorm",
        "mlp_norm": "model.layers.{}.post_feedforward_layernorm",
    },
    "phi3": {"attn.q": "model.layers.{}.self_attn.qkv_proj", "mlp.gate": "model.layers.{}.mlp.gate_up_proj"},
}
FUSED = {
    "gpt2": (("attn.q", "attn.k", "attn.v"),),
    "phi3": (("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up")),
}
"""Our layers that a family stores as one tensor, under the name of the first."""


def to_theirs(config: ModelConfig, kind: str, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return our weights with the Hugging Face names and shapes of a family.

    Raises:
        CheckpointError: the weights do not match the config.
        ConfigError: `dtype` cannot hold a value.
    """
    _check_tensors({name: tuple(w.shape) for name, w in weights.items()}, parameter_shapes(config), "weights")
    tensors = {}
    for place in layout(config, kind):
        tensor = torch.cat([weights[part] for part in place.parts]) if len(place.parts) > 1 else weights[place.parts[0]]
        if place.one_less:
            tensor = tensor.float() - 1
        tensors[place.name] = (tensor.t() if place.transposed else tensor).to(dtype).contiguous()
        if beyond := _beyond_range(tensor, dtype):
            raise ConfigError(f"dtype={_short(dtype)}: tensor {place.name} has {beyond}; use dtype={_wider(dtype)}")
    return tensors


def _short(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def _wider(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.bfloat16 else "bf16 or fp32"


def _beyond_range(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """Return which finite values a format would turn into infinities; None if it holds all of them."""
    if torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return None
    lost = tensor.isfinite() & ~tensor.to(dtype).isfinite()
    if not (count := int(lost.sum())):
        return None
    return f"{count} of {tensor.numel()} values beyond {_short(dtype)}'s range, such as {float(tensor[lost][0]):.6g}"


def from_theirs(config: ModelConfig, kind: str, tensors: dict[str, Tensor], origin: Path) -> dict[str, Tensor]:
    """Return Hugging Face tensors with our names and shapes: the inverse of `to_theirs`.

    Dtypes stay as they are, except that Gemma's norms become fp32.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of the wrong shape.
    """
    shapes = parameter_shapes(config)
    expected: dict[str, tuple[int, ...]] = {}
    places = layout(config, kind)
    for place in places:
        rows = sum(shapes[part][0] for part in place.parts)
        shape = (rows, *shapes[place.parts[0]][1:])
        expected[place.name] = shape[::-1] if place.transposed else shape
    _check_tensors({name: tuple(t.shape) for name, t in tensors.items()}, expected, str(origin))
    weights = {}
    for place in places:
        tensor = tensors[place.name].t() if place.transposed else tensors[place.name]
        if place.one_less:
            tensor = tensor.float() + 1
        pieces = torch.split(tensor, [shapes[part][0] for part in place.parts]) if len(place.parts) > 1 else [tensor]
        for part, piece in zip(place.parts, pieces, strict=True):  # safetensors refuses tensors that share memory
            weights[part] = (
                piece.contiguous() if piece is tensor else piece.clone(memory_format=torch.contiguous_format)
            )
    return {name: weights[name] for name in shapes}


def _check_tensors(given: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], origin: str) -> None:
    """Refuse the first tensor that is missing, in the model's order, and then one too many or of a wrong shape."""
    for name in expected:
        if name not in given:
            raise CheckpointError(f"{origin}: tensor {name} is missing")
    for name in sorted(given.keys() - expected.keys()):
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
    generation: dict[str, Any] | None = None,
    family: str | None = None,
) -> None:
    """Write the folder `out` for transformers' `from_pretrained`, atomically.

    `weights` has single-device names, a tied weight once; `dtype` is `fp32`, `bf16` or `fp16`. `tokenizer_dir` is a
    saved tokenizer; its files are copied too, so that our own verbs can read the folder. Generation stops at
    `end_of_document`. `generation` are fields of generation_config.json; `bos_token_id` and the like in it (an id, a
    list or None) override what follows from `end_of_document`. `family` is a `model_type` of `hf_families.FAMILIES`, or
    None for the one that `family_of` finds.

    Raises:
        ConfigError: no class of transformers can express the config, or `out` exists.
        CheckpointError: the weights do not match the config.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: allowed are {', '.join(DTYPES)}")
    if out.exists():
        raise ConfigError(f"out={out} exists already; name a new folder")
    kind = family or family_of(config)
    theirs = hf_config(config, end_of_document, kind)
    theirs.dtype = DTYPES[dtype]
    given: dict[str, Any] = {**dict.fromkeys(SPECIAL_TOKENS, end_of_document), **(generation or {})}
    for name in SPECIAL_TOKENS & (generation or {}).keys():
        setattr(theirs, name, given[name])
    tensors = to_theirs(config, kind, weights, DTYPES[dtype])
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    remove_abandoned(out.parent)
    partial = temporary_name(out)
    partial.mkdir(parents=True)
    try:
        save_torch_state_dict(tensors, partial, max_shard_size=MAX_SHARD_SIZE, metadata={"format": "pt"})
        theirs.save_pretrained(partial)
        _write_generation(given, partial)
        if tokenizer_dir is not None:
            export_tokenizer(tokenizer_dir, partial, config.max_seq_len)
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError):  # its only errors in writing are the disk's
            raise EnvironmentFault(f"out={out} cannot be written ({error})") from error
        raise


def import_model(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the config and weights of a Hugging Face folder, with single-device names and stored dtypes.

    Raises:
        ConfigError: there is no such folder.
        CheckpointError: a file is missing or damaged, is a pickle, or has something that our GPT cannot honour.
    """
    if not folder.is_dir():
        raise ConfigError(f"path={folder}: no such folder")
    fields = _read_json(folder / "config.json")
    config = model_config(fields, folder / "config.json")
    kind = fields["model_type"]
    tensors = _read_tensors(folder)
    prefix = "transformer." if kind == "gpt2" else "model."
    if not any(name.startswith(prefix) for name in tensors):  # saved from the class without a head
        tensors = {name if name == "lm_head.weight" else f"{prefix}{name}": t for name, t in tensors.items()}
    if config.tie_embeddings and "lm_head.weight" in tensors:
        head, embedding = tensors.pop("lm_head.weight"), layout(config, kind)[0].name
        if embedding in tensors and not torch.equal(head, tensors[embedding]):
            raise CheckpointError(f"{folder}: tie_word_embeddings is true, but lm_head.weight is not {embedding}")
    listing = INDEX if (folder / INDEX).is_file() else "model.safetensors"
    return config, from_theirs(config, kind, tensors, folder / listing)


GENERATION = "generation_config.json"
_NOT_GENERATION = ("_from_model_config", "transformers_version")


def _write_generation(fields: dict[str, Any], folder: Path) -> None:
    """Write generation_config.json as given: transformers would refuse to save some that it reads."""
    kept = {name: value for name, value in fields.items() if value is not None}
    content = {**kept, "transformers_version": transformers_module().__version__}
    (folder / GENERATION).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def generation_of(folder: Path) -> dict[str, Any]:
    """Return the generation_config.json of a Hugging Face folder, and the special tokens' ids of its config.json.

    Of ids that both name, those of generation_config.json count, because it is what stops generation. An id that
    neither names is None, unless there are none at all.

    Raises:
        CheckpointError: a file is no JSON object, or a number in it is not finite.
    """
    fields = _read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    for name, value in fields.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError as error:
            raise CheckpointError(f"{folder / GENERATION}: {name}={value!r} is not finite; remove it") from error
    config = _read_json(folder / "config.json")
    found = {name: fields.get(name) if fields.get(name) is not None else config.get(name) for name in SPECIAL_TOKENS}
    others = {name: value for name, value in fields.items() if name not in (*SPECIAL_TOKENS, *_NOT_GENERATION)}
    return {**others, **(found if any(token is not None for token in found.values()) else {})}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; every Hugging Face folder has one")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


INDEX = "model.safetensors.index.json"

CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Endings of tensors that old exports stored although they are no parameters."""


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder's safetensors files: those that the index lists, or else model.safetensors.

    Raises:
        CheckpointError: a file or an entry of the index is missing, a file is damaged, or a tensor holds values that
            are not finite or not floating-point numbers.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    listed = _weight_map(folder) if (folder / INDEX).is_file() else None
    tensors: dict[str, Tensor] = {}
    for file in ["model.safetensors"] if listed is None else sorted(set(listed.values())):
        path = folder / file
        if not path.is_file():
            raise CheckpointError(_why_missing(folder, file, listed))
        try:
            stored = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged ({error})") from error
        for name in sorted(stored):
            if listed is not None and name not in listed and not name.endswith(CONSTANTS):
                raise CheckpointError(f"{folder / INDEX}: has no entry for tensor {name}, which is in {file}")
        for name in sorted(stored if listed is None else (name for name, where in listed.items() if where == file)):
            if name.endswith(CONSTANTS):
                continue
            if name not in stored:
                raise CheckpointError(f"{path}: tensor {name} is missing, which {INDEX} says is here")
            _check_values(path, name, stored[name])
            tensors[name] = stored[name]
    return tensors


def _weight_map(folder: Path) -> dict[str, str]:
    """Return the index: tensors and the names of their files."""
    listed = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{folder / INDEX}: has no weight_map")
    return {str(name): Path(str(file)).name for name, file in listed.items()}


def _why_missing(folder: Path, file: str, listed: dict[str, str] | None) -> str:
    """Return the message for a missing file: what needs it, or what is there instead."""
    others = {suffix: sorted(path.name for path in folder.glob(f"*{suffix}")) for suffix in (".safetensors", ".bin")}
    if listed is not None:
        first = min(name for name, where in listed.items() if where == file)
        return f"{folder}: {file} is missing; {INDEX} says that it holds tensor {first}"
    if shards := others[".safetensors"]:
        return f"{folder}: {INDEX} is missing, so it is unknown whether {shards[0]} and the like are all of the weights"
    why = [f"; {name} is a pickle, which is never loaded: convert it to safetensors" for name in others[".bin"]]
    return f"{folder}: {file} is missing{''.join(why[:1])}"


def _check_values(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse numbers of a format that holds no weights of ours, and values that are not finite, in fp32 neither."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(f"{path}: tensor {name} is of {tensor.dtype}; only fp64, fp32, bf16 and fp16 can be read")
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise CheckpointError(f"{path}: tensor {name} has {bad} of {tensor.numel()} values that are NaN or infinite")
    if beyond := _beyond_range(tensor, torch.float32):
        raise CheckpointError(f"{path}: tensor {name} has {beyond}, in which weights are kept")
