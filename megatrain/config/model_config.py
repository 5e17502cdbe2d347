"""`model.*`: the shape of the model. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key


@dataclass
class ModelConfig:
    """The model's shape. `model=<preset>` sets every key."""

    name: str = key("custom", "name of the preset")
    num_layers: int = key(2, "transformer blocks", minimum=1)
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
    activation: str = key("swiglu", "feed-forward activation", choices=("gelu", "swiglu"))
    bias: bool = key(False, "use biases in linear layers and LayerNorms")
    tie_embeddings: bool = key(False, "share the token embedding's weight with the output head")
    qk_norm: bool = key(False, "apply RMSNorm to each query and key head")
    dropout: float = key(0.0, "dropout on embeddings, attention and residual branches", minimum=0, below=1)
    init_std: float = key(0.02, "standard deviation of the initial weights", above=0)

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
    def vocab(self) -> int:
        """Vocabulary size. Valid only once a null has been replaced by the tokenizer's."""
        assert self.vocab_size is not None, "model.vocab_size has not been resolved"
        return self.vocab_size
