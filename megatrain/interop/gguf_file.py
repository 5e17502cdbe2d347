"""Write a GGUF file for llama.cpp, tensor by tensor, through the gguf package.

gguf_tokenizer.py writes the tokenizer. Families are those whose tensors llama.cpp lays out as we do, but for the
order of rows of queries and keys in Llama: llama.cpp rotates neighbouring pairs, we rotate halves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.lineage import as_text, line_from
from megatrain.checkpoint.manifest import Ancestor
from megatrain.config import ModelConfig
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import CheckpointError, ConfigError, EnvironmentFault, how_to_install
from megatrain.interop.gguf_tokenizer import add_tokenizer
from megatrain.interop.hf_families import family_of
from megatrain.model.count import parameter_shapes

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's name of each family that can be written."""

NAMES = {
    "embed": "token_embd",
    "attn_norm": "blk.{}.attn_norm",
    "attn.q": "blk.{}.attn_q",
    "attn.k": "blk.{}.attn_k",
    "attn.v": "blk.{}.attn_v",
    "attn.o": "blk.{}.attn_output",
    "attn.q_norm": "blk.{}.attn_q_norm",
    "attn.k_norm": "blk.{}.attn_k_norm",
    "mlp_norm": "blk.{}.ffn_norm",
    "mlp.gate": "blk.{}.ffn_gate",
    "mlp.up": "blk.{}.ffn_up",
    "mlp.down": "blk.{}.ffn_down",
    "final_norm": "output_norm",
    "head": "output",
}
TYPES = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
LINEAGE = "megatrain.lineage"
"""The key of where a model came from: JSON, as in an exported folder's lineage.json."""

BLOCK = 32
"""Values of a row that share a scale in q8_0 and q4_0."""


def check_gguf(config: ModelConfig, number_format: str) -> str:
    """Return llama.cpp's name of the model's family.

    Raises:
        ConfigError: llama.cpp has no such model, or the format does not fit the rows of its matrices.
        EnvironmentFault: the gguf package is missing.
    """
    gguf_module()
    kind = family_of(config)
    if kind not in ARCHITECTURES:
        raise ConfigError(f"to=gguf: models of the family {kind} cannot be written; it can {', '.join(ARCHITECTURES)}")
    if kind == "llama" and (config.bias or config.attention_output_bias):
        raise ConfigError("model.bias, model.attention_bias: to=gguf writes Llama without biases")
    for key in ("rope_scaling", "sliding_window"):
        if (value := getattr(config, key)) is not None and not (
            key == "sliding_window" and value >= config.max_seq_len
        ):
            raise ConfigError(f"model.{key}={value}: to=gguf cannot write it")
    odd = next((s[1] for s in parameter_shapes(config).values() if len(s) == 2 and s[1] % BLOCK), None)
    if number_format.startswith("q") and odd:
        raise ConfigError(
            f"gguf_type={number_format}: rows must be multiples of {BLOCK} values, and the model has some of {odd}; "
            "use gguf_type=f16 or f32"
        )
    return ARCHITECTURES[kind]


def write_gguf(
    out: Path,
    config: ModelConfig,
    read: Callable[[str], Tensor],
    number_format: str,
    tokenizer: Tokenizer | None,
    ends: list[int],
    name: str,
    line: list[Ancestor],
) -> None:
    """Write the file `out`. `read` returns a parameter by its name; matrices become `number_format`, the rest fp32.

    `ends` are the tokens that end a text or a reply, `line` is where the model came from, itself the last. Raises as
    `check_gguf` does.
    """
    gguf = gguf_module()
    architecture = check_gguf(config, number_format)
    kind = getattr(gguf.GGMLQuantizationType, TYPES[number_format])
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_name(name)
    if line:
        writer.add_base_model_count(1)  # what llama.cpp's own converter writes: the model before its conversion
        writer.add_base_model_name(0, line[-1].name)
        writer.add_string(LINEAGE, as_text(line))
    for add, value in (
        (writer.add_context_length, config.max_seq_len),
        (writer.add_embedding_length, config.hidden_size),
        (writer.add_block_count, config.num_layers),
        (writer.add_feed_forward_length, config.ffn_dim),
        (writer.add_head_count, config.num_heads),
        (writer.add_head_count_kv, config.kv_heads),
        (writer.add_key_length, config.head_dim),
        (writer.add_value_length, config.head_dim),
        (writer.add_rope_dimension_count, config.head_dim),
        (writer.add_layer_norm_rms_eps, config.norm_eps),
        (writer.add_rope_freq_base, float(config.rope_theta)),
        (writer.add_vocab_size, config.vocab),
    ):
        add(value)
    all_of_it = "ALL_F32" if number_format == "f32" else f"MOSTLY_{TYPES[number_format]}"
    writer.add_file_type(getattr(gguf.LlamaFileType, all_of_it))
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer, config.vocab, ends)
    names = list(parameter_shapes(config))
    for parameter in names:  # the header first, which needs their sizes
        array = _converted(gguf, config, architecture, parameter, read(parameter), kind)
        raw = kind if array.dtype.name == "uint8" else None
        writer.add_tensor_info(theirs(parameter), array.shape, array.dtype, array.nbytes, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for parameter in names:
        writer.write_tensor_data(_converted(gguf, config, architecture, parameter, read(parameter), kind))
    writer.close()


def read_gguf(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Return the parameters that a file of `write_gguf` holds, by our names, as float32."""
    gguf = gguf_module()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    architecture = check_gguf(config, "f32")
    weights = {}
    for name, shape in parameter_shapes(config).items():
        found = stored[theirs(name)]
        dense = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy()).float().view(shape)
        heads = _rotated_heads(config, architecture, name)
        if heads:
            dense = dense.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(shape)
        weights[name] = dense
    return weights


def describe_gguf(path: Path) -> tuple[dict[str, Any], list[Ancestor]]:
    """Return what any GGUF file says of itself, by what is to be shown, and where its model came from, if it says that.

    Raises:
        CheckpointError: it is no GGUF file, or cut short.
        EnvironmentFault: the gguf package is missing.
    """
    gguf = gguf_module()
    try:
        reader = gguf.GGUFReader(path)
        long = ("tokenizer.ggml.to", "tokenizer.ggml.merges", "tokenizer.ggml.scores")
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith(long)}
    except (ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{path}: not a GGUF file, or cut short ({error})") from error
    architecture = fields.get("general.architecture")
    facts = {
        "name": fields.get("general.name"),
        "architecture": architecture,
        "parameters": f"{sum(int(tensor.n_elements) for tensor in reader.tensors):,}",
        "number formats": ", ".join(sorted({tensor.tensor_type.name for tensor in reader.tensors})),
        "layers": fields.get(f"{architecture}.block_count"),
        "width": fields.get(f"{architecture}.embedding_length"),
        "vocabulary": fields.get(f"{architecture}.vocab_size"),
        "longest sequence": fields.get(f"{architecture}.context_length"),
        "tokenizer": fields.get("tokenizer.ggml.model"),
        "splits text as": fields.get("tokenizer.ggml.pre"),
        "chat template": "yes" if "tokenizer.chat_template" in fields else "none",
    }
    return facts, line_from(fields[LINEAGE], f"{path}: {LINEAGE}") if LINEAGE in fields else []


def theirs(name: str) -> str:
    """Return llama.cpp's name of a parameter."""
    module, what = name.rsplit(".", 1)
    if not module.startswith("blocks."):
        return f"{NAMES[module]}.{what}"
    _, block, stem = module.split(".", 2)
    return f"{NAMES[stem].format(block)}.{what}"


def _rotated_heads(config: ModelConfig, architecture: str, name: str) -> int:
    """Return the heads of a parameter whose rows llama.cpp orders in another way; 0 for the others."""
    if architecture != "llama" or not name.endswith(("attn.q.weight", "attn.k.weight")):
        return 0
    return config.num_heads if name.endswith("attn.q.weight") else config.kv_heads


def _converted(gguf: Any, config: ModelConfig, architecture: str, name: str, tensor: Tensor, kind: Any) -> Any:
    """Return a parameter as the array to store."""
    if heads := _rotated_heads(config, architecture, name):
        tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
    array = tensor.float().contiguous().numpy()
    return array if tensor.dim() == 1 else gguf.quants.quantize(array, kind)


def gguf_module() -> Any:
    """Import gguf. Raises EnvironmentFault if it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise EnvironmentFault(f"GGUF files need the gguf package: {how_to_install('compress')}") from error
    return gguf
