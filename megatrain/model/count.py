"""Parameter shapes and counts, and FLOPs, computed from a model's config.

Imports no torch. `python -m megatrain.model.count` prints the table of presets in docs/reference/models.md.
"""

from __future__ import annotations

from importlib import resources
from math import prod

from megatrain.config import WITH_VALUES, LoraConfig, MethodConfig, ModelConfig, TokenizerConfig


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return every parameter's shape by its single-device name, in the model's order; a tied weight appears once."""
    width, head_dim = config.hidden_size, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab, width)}

    def linear(name: str, outputs: int, inputs: int, bias: bool = config.bias) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (width,)
        if config.norm == "layernorm" and config.bias:
            shapes[f"{name}.bias"] = (width,)

    if config.position == "learned":
        shapes["positions.weight"] = (config.max_seq_len, width)
    for i in range(config.num_layers):
        norm(f"blocks.{i}.attn_norm")
        linear(f"blocks.{i}.attn.q", config.num_heads * head_dim, width, config.qkv_bias)
        linear(f"blocks.{i}.attn.k", config.kv_heads * head_dim, width, config.qkv_bias)
        linear(f"blocks.{i}.attn.v", config.kv_heads * head_dim, width, config.qkv_bias)
        linear(f"blocks.{i}.attn.o", width, config.num_heads * head_dim, config.attention_output_bias)
        if config.qk_norm:
            together = config.qk_norm_over == "heads"
            shapes[f"blocks.{i}.attn.q_norm.weight"] = (config.num_heads * head_dim if together else head_dim,)
            shapes[f"blocks.{i}.attn.k_norm.weight"] = (config.kv_heads * head_dim if together else head_dim,)
        norm(f"blocks.{i}.mlp_norm")
        if config.gated:
            linear(f"blocks.{i}.mlp.gate", config.ffn_dim, width)
        linear(f"blocks.{i}.mlp.up", config.ffn_dim, width)
        linear(f"blocks.{i}.mlp.down", width, config.ffn_dim)
    norm("final_norm")
    if config.output == "score":
        shapes["score.weight"] = (1, width)
    elif not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab, width)
    return shapes


def adapter_shapes(config: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the low-rank layers beside a model's projections: `<layer>.lora_a` and `<layer>.lora_b`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(config).items() if lora.rank else ():
        layer, _, what = name.rpartition(".")
        if layer.startswith("blocks.") and what == "weight" and layer.rpartition(".")[2] in lora.targets:
            shapes[f"{layer}.lora_a"] = (lora.rank, shape[1])
            shapes[f"{layer}.lora_b"] = (shape[0], lora.rank)
    return shapes


def value_shapes(config: ModelConfig, method: MethodConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of the value head of a method that has one (`WITH_VALUES`), by its name; else nothing."""
    return {"value.weight": (1, config.hidden_size)} if method.name in WITH_VALUES else {}


def run_shapes(config: ModelConfig, method: MethodConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters that a run by `method` holds: the model's, and those that training adds."""
    return parameter_shapes(config) | adapter_shapes(config, method.lora) | value_shapes(config, method)


def trained_shapes(config: ModelConfig, method: MethodConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters that a run by `method` changes.

    With low-rank layers, these are none of the model's but its score.
    """
    own, low_rank = parameter_shapes(config), adapter_shapes(config, method.lora)
    score = {name: shape for name, shape in own.items() if name == "score.weight"}
    return (low_rank | score if low_rank else own) | value_shapes(config, method)


def num_parameters(config: ModelConfig) -> int:
    """Return the exact number of trainable parameters; a tied weight counts once."""
    return sum(prod(shape) for shape in parameter_shapes(config).values())


def flops_per_token(config: ModelConfig, seq_len: int, causal: bool = False) -> int:
    """Return the exact FLOPs of all matrix products, forward and backward, per token of a sequence of `seq_len`.

    A product of `[m, k]` by `[k, n]` counts 2mkn, and the backward pass has two such products for each one forward.
    Look-ups, norms, activations, softmax and recomputation are not counted. Attention counts the full
    `T x T` square, the convention of published MFU figures (Chowdhery et al., 2022, arXiv:2204.02311, appendix B);
    `causal=True` counts only the part on and below the diagonal, `(T + 1) / 2` keys per query, rounded down.
    """
    per_head_width = config.num_heads * config.head_dim
    attention_weights = 2 * config.hidden_size * (per_head_width + config.kv_heads * config.head_dim)
    mlp_weights = (3 if config.gated else 2) * config.hidden_size * config.ffn_dim
    head_weights = (config.vocab if config.output == "vocabulary" else 1) * config.hidden_size
    matrix_products = 2 * (config.num_layers * (attention_weights + mlp_weights) + head_weights)
    scores_and_values = config.num_layers * 2 * 2 * per_head_width * seq_len
    if causal:
        scores_and_values = scores_and_values * (seq_len + 1) // (2 * seq_len)
    return 3 * (matrix_products + scores_and_values)


def presets() -> dict[str, ModelConfig]:
    """Return every preset of conf/model, smallest first. An unset vocabulary size becomes the default tokenizer's."""
    import yaml

    found = []
    for file in (resources.files("megatrain.conf") / "model").iterdir():
        if file.name.endswith(".yaml"):
            config = ModelConfig(**yaml.safe_load(file.read_text(encoding="utf-8")))
            config.vocab_size = config.vocab_size or TokenizerConfig().vocab_size
            found.append(config)
    return {config.name: config for config in sorted(found, key=num_parameters)}


def preset_table() -> str:
    """Return the presets as a Markdown table, with parameters and training FLOPs per token at the longest sequence."""
    lines = [
        "| preset | layers | width | heads (kv) | ffn | vocabulary | sequence | tied | parameters | FLOPs/token |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for config in presets().values():
        cells = [
            f"`{config.name}`",
            f"{config.num_layers}",
            f"{config.hidden_size:,}",
            f"{config.num_heads} ({config.kv_heads})",
            f"{config.ffn_dim:,}",
            f"{config.vocab:,}",
            f"{config.max_seq_len:,}",
            "yes" if config.tie_embeddings else "no",
            f"{num_parameters(config):,}",
            f"{flops_per_token(config, config.max_seq_len):,}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(preset_table())
