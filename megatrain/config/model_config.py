"""`model.*`: the shape of the model. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key

ROPE_SCALING_KEYS: dict[str | None, tuple[str, ...]] = {
    None: (),
    "linear": ("rope_factor",),
    "dynamic": ("rope_factor",),
    "llama3": ("rope_factor", "rope_original_seq_len", "rope_low_freq_factor", "rope_high_freq_factor"),
    "yarn": (
        "rope_factor",
        "rope_original_seq_len",
        "rope_beta_fast",
        "rope_beta_slow",
        "rope_truncate",
        "rope_attention_factor",
    ),
}
"""The keys that each `model.rope_scaling` reads."""


@dataclass
class ModelConfig:
    """The model's shape. `model=<preset>` sets every key."""

    name: str = key("custom", "name of the preset")
    num_layers: int = key(2, "transformer blocks", minimum=1, maximum=100_000)
    num_heads: int = key(2, "attention (query) heads", minimum=1)
    num_kv_heads: int | None = key(None, "key-value heads (grouped-query attention); null means num_heads", minimum=1)
    hidden_size: int = key(64, "width of the residual stream", minimum=1)
    head_size: int | None = key(None, "width of one head; null means hidden_size / num_heads", minimum=1)
    ffn_size: int | None = key(None, "width of the feed-forward layer; null means 4 x hidden_size", minimum=1)
    vocab_size: int | None = key(None, "vocabulary size; null takes the tokenizer's", minimum=2)
    max_seq_len: int = key(256, "longest sequence that the model supports, in tokens", minimum=1)
    norm: str = key("rmsnorm", "normalisation", choices=("layernorm", "rmsnorm"))
    norm_eps: float = key(1e-5, "epsilon inside the normalisation", above=0)
    position: str = key("rope", "position encoding", choices=("learned", "rope"))
    rope_theta: float = key(10000.0, "base of the rotary frequencies", above=0)
    rope_scaling: str | None = key(
        None,
        "scaling of the rotary frequencies, for sequences longer than in pre-training; null scales nothing",
        choices=("linear", "dynamic", "yarn", "llama3"),
    )
    rope_factor: float | None = key(None, "factor of rope_scaling", minimum=1)
    rope_original_seq_len: int | None = key(
        None, "yarn, llama3: sequence length of the pre-training; null means max_seq_len", minimum=1
    )
    rope_low_freq_factor: float = key(1.0, "llama3: turns over the original length up to which to scale fully", above=0)
    rope_high_freq_factor: float = key(4.0, "llama3: turns over the original length from which to scale not", above=0)
    rope_beta_fast: float = key(32.0, "yarn: turns over the original length from which to scale not", above=0)
    rope_beta_slow: float = key(1.0, "yarn: turns over the original length up to which to scale fully", above=0)
    rope_truncate: bool = key(True, "yarn: round the bounds of its ramp to whole pairs")
    rope_attention_factor: float | None = key(
        None, "yarn: factor on cosines and sines; null means 0.1 ln(rope_factor) + 1", above=0
    )
    sliding_window: int | None = key(
        None, "keys that a query sees, itself included; null means all before it", minimum=1
    )
    activation: str = key(
        "swiglu", "feed-forward activation; swiglu and geglu are gated", choices=("gelu", "swiglu", "geglu")
    )
    bias: bool = key(False, "use biases in linear layers and LayerNorms")
    attention_bias: str | None = key(
        None,
        "biases in attention, apart from bias: none, query, key and value only, or all; null follows bias",
        choices=("none", "qkv", "all"),
    )
    tie_embeddings: bool = key(False, "share the token embedding's weight with the output head")
    output: str = key(
        "vocabulary",
        "what the model computes of a token: logits over the vocabulary, or with method=reward one score",
        choices=("vocabulary", "score"),
    )
    embedding_scale: float | None = key(None, "factor on the token embeddings; null means none", above=0)
    norm_place: str = key(
        "before",
        "norms before attention and feed-forward layers, or after, on their outputs",
        choices=("before", "after"),
    )
    qk_norm: bool = key(False, "apply RMSNorm to queries and keys")
    qk_norm_over: str = key(
        "head", "what qk_norm normalises: each head, or all heads of a token together", choices=("head", "heads")
    )
    dropout: float = key(0.0, "dropout on embeddings, attention and residual branches", minimum=0, below=1)
    init_std: float = key(0.02, "standard deviation of the initial weights", above=0)

    @property
    def ties_head(self) -> bool:
        """Whether the model has an output head that shares the embedding's weight."""
        return self.tie_embeddings and self.output == "vocabulary"

    @property
    def kv_heads(self) -> int:
        """Key-value heads, with the default resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        """Width of one head, with the default resolved."""
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer, with the default resolved."""
        return self.ffn_size or 4 * self.hidden_size

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate projection."""
        return self.activation != "gelu"

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return self.bias if self.attention_bias is None else self.attention_bias != "none"

    @property
    def attention_output_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        return self.bias if self.attention_bias is None else self.attention_bias == "all"

    @property
    def vocab(self) -> int:
        """Vocabulary size. Valid only once a null has been replaced by the tokenizer's."""
        assert self.vocab_size is not None, "model.vocab_size has not been resolved"
        return self.vocab_size
