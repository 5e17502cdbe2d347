"""The GPT model on one device: the GPT-2 and Llama families from one config.

Initial values are in init.py and single operations in megatrain.kernels. Sharding over ranks, recomputation and
training are applied from outside. Parameters are created uninitialised on the default device, so building a model is
free on the meta device, and cheap where an engine partitions parameters at construction.

Shapes: B batch, T sequence, D width, H query heads, Hkv key-value heads, K head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatrain.config import ModelConfig
from megatrain.kernels.attention import Documents, attends_by_document, attention, document_mask
from megatrain.kernels.choice import REFERENCE, Kernels
from megatrain.kernels.cross_entropy import label_gap_sum, linear_label_gap_sum
from megatrain.kernels.distillation import Sums, Teaching
from megatrain.model.cache import AttentionCache, Cache
from megatrain.model.rope import model_angles

LossFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Maps logits, labels and weights to the summed loss, an fp32 scalar."""

LogProbFunction = Callable[[Tensor, Tensor], Tensor]
"""Maps logits `[..., V]` and labels `[...]` to the labels' log-probabilities, fp32 `[...]`, 0 for ignored labels."""

DistillationFunction = Callable[[Tensor, Tensor, Tensor | None, Teaching], Sums]
"""Maps logits, labels, weights and what a teacher says to the sums of distillation."""


@dataclass(frozen=True)
class Adapter:
    """How low-rank layers count: `scale` times their product, of an input with `dropout`. model/lora.py adds them."""

    scale: float
    dropout: float


class Linear(nn.Linear):
    """`nn.Linear` that leaves its values uninitialised. If `shared` is given, it uses that embedding's weight.

    With an `adapter` it has low-rank layers beside its weight: `lora_a` `[rank, in]` and `lora_b` `[out, rank]`.
    """

    adapter: Adapter | None = None
    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def __init__(
        self, in_features: int, out_features: int, bias: bool, kernels: Kernels, shared: Embedding | None = None
    ) -> None:
        if shared is None:
            super().__init__(in_features, out_features, bias)
        else:
            nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = shared.weight
            self.register_parameter("bias", None)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[..., in_features]` to `[..., out_features]`."""
        y = self.kernels.linear(x, self.weight, self.bias)
        if self.adapter is None:
            return y
        x = F.dropout(x, self.adapter.dropout, self.training)
        return y + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.adapter.scale

    def reset_parameters(self) -> None:
        """Do nothing: init.py fills the values."""


class Embedding(nn.Embedding):
    """`nn.Embedding` that leaves its values uninitialised."""

    def reset_parameters(self) -> None:
        """Do nothing: init.py fills the values."""


class Head(Linear):
    """The projection onto the vocabulary, and the loss if labels are given: one operation may fuse the two."""

    def __init__(self, width: int, vocab: int, kernels: Kernels, shared: Embedding | None) -> None:
        super().__init__(width, vocab, False, kernels, shared)

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        each: bool = False,
        smoothing: float = 0.0,
        teaching: Teaching | None = None,
    ) -> Any:
        """Map `x` `[B, T, D]` to logits `[B, T, V]`, or to the summed loss of `labels` (`[B, T]`), an fp32 scalar.

        With `each` return the log-probability of each label instead, fp32 `[B, T]`; with `teaching` the sums of
        distillation. `smoothing` is that of the labels.
        """
        if labels is None:
            return super().forward(x)
        if each:
            return self.kernels.linear_log_probs(x, self.weight, labels)
        if teaching is not None:
            return self.kernels.linear_distillation(x, self.weight, labels, weights, teaching)
        loss = self.kernels.linear_cross_entropy_sum(x, self.weight, labels, weights)
        return loss + smoothing * linear_label_gap_sum(x, self.weight, labels, weights) if smoothing else loss


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension. With a `residual`, it normalises the sum, and returns the sum too."""

    def __init__(self, size: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.kernels = kernels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Return the norm of `x` `[..., D]`, or with a `residual` the pair (norm of the sum, sum)."""
        if residual is None:
            return self.kernels.rms_norm(x, self.weight, self.eps)
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension. With a `residual`, it normalises the sum, and returns the sum too."""

    def __init__(self, size: int, eps: float, bias: bool, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.empty(size)) if bias else None)
        self.eps = eps
        self.kernels = kernels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Return the norm of `x` `[..., D]`, or with a `residual` the pair (norm of the sum, sum)."""
        if residual is None:
            return self.kernels.layer_norm(x, self.weight, self.bias, self.eps)
        return self.kernels.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


def make_norm(config: ModelConfig, kernels: Kernels) -> nn.Module:
    """Return the norm of a block, over the width of the residual stream."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, config.norm_eps, kernels)
    return LayerNorm(config.hidden_size, config.norm_eps, config.bias, kernels)


class Attention(nn.Module):
    """Causal self-attention. The head count comes from the projections, so a tensor-parallel shard works the same."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        self.kernels = kernels
        self.head_dim = head_dim
        self.attend = attention  # context parallelism replaces it
        self.config = config
        self.q = Linear(width, config.num_heads * head_dim, config.qkv_bias, kernels)
        self.k = Linear(width, config.kv_heads * head_dim, config.qkv_bias, kernels)
        self.v = Linear(width, config.kv_heads * head_dim, config.qkv_bias, kernels)
        self.o = Linear(config.num_heads * head_dim, width, config.attention_output_bias, kernels)
        together = config.qk_norm_over == "heads"
        q_size, k_size = (heads * head_dim if together else head_dim for heads in (config.num_heads, config.kv_heads))
        self.q_norm = RMSNorm(q_size, config.norm_eps, kernels) if config.qk_norm else None
        self.k_norm = RMSNorm(k_size, config.norm_eps, kernels) if config.qk_norm else None

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | Documents | None, cache: AttentionCache | None
    ) -> Tensor:
        """Map `x` `[B, T, D]` to `[B, T, D]`; `positions` is `[T]` or `[B, T]`, `mask` as in `kernels.attention`."""
        # The head count is the local output width over K. The weight's shape would give it too, but partitioned
        # parameters are whole only inside the projection's forward.
        q, k, v = self.q(x), self.k(x), self.v(x)
        if together := self.config.qk_norm_over == "heads":
            q, k = self._normed(q, k)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        if not together:
            q, k = self._normed(q, k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.config.position == "rope":
            cos, sin = model_angles(positions, self.config)
            if positions.dim() == 2:
                cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            q, k = self.kernels.rope_qk(q, k, cos, sin)
        if cache is None:
            y = self.attend(q, k, v, mask, self.config.dropout if self.training else 0.0)
        else:
            y = cache.attend(q, k, v, mask)
        output: Tensor = self.o(y.transpose(1, 2).flatten(-2))
        return output

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q), self.k_norm(k)


class MLP(nn.Module):
    """Feed-forward layer: GELU between two projections, or SwiGLU or GEGLU with three."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.activation = config.activation
        self.gate = Linear(config.hidden_size, config.ffn_dim, config.bias, kernels) if config.gated else None
        self.up = Linear(config.hidden_size, config.ffn_dim, config.bias, kernels)
        self.down = Linear(config.ffn_dim, config.hidden_size, config.bias, kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[B, T, D]` to `[B, T, D]`."""
        if self.gate is None:
            activated = self.kernels.gelu(self.up(x))
        elif self.activation == "geglu":  # Shazeer, 2020, arXiv:2002.05202
            activated = self.kernels.gelu(self.gate(x)) * self.up(x)
        else:
            activated = self.kernels.swiglu(self.gate(x), self.up(x))
        output: Tensor = self.down(activated)
        return output


class Block(nn.Module):
    """One transformer block, with norms before its layers (Radford et al., 2019) or after (OLMo, arXiv:2501.00656)."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.attn_norm = make_norm(config, kernels)
        self.attn = Attention(config, kernels)
        self.mlp_norm = make_norm(config, kernels)
        self.mlp = MLP(config, kernels)
        self.norm_place = config.norm_place
        self.dropout = config.dropout
        self.has_dropout = config.dropout > 0

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | Documents | None = None, cache: AttentionCache | None = None
    ) -> Tensor:
        """Map `x` `[B, T, D]` to `[B, T, D]`; `positions` is `[T]` or `[B, T]`, `mask` as in `kernels.attention`."""
        if self.norm_place == "after":
            attended = self.attn_norm(self.attn(x, positions, mask, cache))
            x = x + F.dropout(attended, self.dropout, self.training)
            return x + F.dropout(self.mlp_norm(self.mlp(x)), self.dropout, self.training)
        attended = F.dropout(self.attn(self.attn_norm(x), positions, mask, cache), self.dropout, self.training)
        normed, x = self.mlp_norm(attended, x)
        return x + F.dropout(self.mlp(normed), self.dropout, self.training)


class GPT(nn.Module):
    """The whole model.

    `config` must be checked (config/model_checks.py): its vocabulary size is known and its sizes fit together.
    `kernels` are the operations that it computes with. Set `loss`, `log_probs` and `distilled` if the vocabulary is
    sharded over ranks: they are then computed from the head's output. Set `needs_dense_mask` if another `attend` than
    `attention` takes no `Documents`, and `context_size` and `context_sum` if the model runs on slices of sequences.
    With `model.output=score` it has no head, and `token_scores`. With `has_values` it has a value head beside the head,
    and `token_values`. Set `score_join` if the input of scores and values is cut.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels = REFERENCE, has_values: bool = False) -> None:
        super().__init__()
        self.config = config
        self.loss: LossFunction | None = None
        self.label_gap: LossFunction = label_gap_sum
        self.log_probs: LogProbFunction | None = None
        self.distilled: DistillationFunction | None = None
        self.needs_dense_mask = False
        self.has_dropout = config.dropout > 0
        self.context_size = 1
        self.context_sum: Callable[[Tensor], Tensor] | None = None
        self.embed = Embedding(config.vocab, config.hidden_size)
        learned = config.position == "learned"
        self.positions = Embedding(config.max_seq_len, config.hidden_size) if learned else None
        self.blocks = nn.ModuleList(Block(config, kernels) for _ in range(config.num_layers))
        self.final_norm = make_norm(config, kernels)
        self.score: Linear | None = None
        self.score_join: Callable[[Tensor], Tensor] | None = None
        if config.output == "score":
            self.score = Linear(config.hidden_size, 1, False, kernels)
            self.head: Head = None  # type: ignore[assignment]  # nothing asks a model that scores for logits
        else:
            shared = self.embed if config.ties_head else None
            self.head = Head(config.hidden_size, config.vocab, kernels, shared)
        self.value = Linear(config.hidden_size, 1, False, kernels) if has_values else None

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        loss_weights: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        dropout_seed: int | None = None,
        cache: Cache | None = None,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return logits `[B, T, V]`, or with `labels` the summed loss, an fp32 scalar in nats; or scores `[B, T]`.

        `tokens` and `labels` are integers `[B, T]`; a label of `IGNORE_INDEX` does not count, and `loss_weights`
        (`[B, T]`) multiply each label's loss. `positions` (`[T]` or `[B, T]`) default to 0..T-1, or continue the
        `cache`. With `documents` a token sees only its own document. `finish` replaces the head and loss.
        `dropout_seed` is required when training with dropout: each layer's masks are a pure function of it, and torch's
        random state is reseeded.
        """
        x = self.hidden(tokens, positions=positions, documents=documents, dropout_seed=dropout_seed, cache=cache)
        if finish is not None:
            return finish(x)
        if self.score is not None:
            return self.token_scores(x)
        return self.head(x) if labels is None else self.cross_entropy_sum(x, labels, loss_weights)

    def cross_entropy_sum(
        self, x: Tensor, labels: Tensor, weights: Tensor | None, label_smoothing: float = 0.0
    ) -> Tensor:
        """Return the summed cross-entropy of `labels` given the result of `hidden`, an fp32 scalar in nats."""
        if self.loss is None:
            whole: Tensor = self.head(x, labels, weights, smoothing=label_smoothing)
            return whole
        logits = self.head(x)
        loss = self.loss(logits, labels, weights)
        return loss + label_smoothing * self.label_gap(logits, labels, weights) if label_smoothing else loss

    def token_log_probs(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the log-probability of each label given the result of `hidden`, fp32 `[B, T]`, 0 if ignored."""
        if self.log_probs is None:
            log_probs: Tensor = self.head(x, labels, each=True)
            return log_probs
        return self.log_probs(self.head(x), labels)

    def distillation_sums(self, x: Tensor, labels: Tensor, weights: Tensor | None, teaching: Teaching) -> Sums:
        """Return the loss of distillation given the result of `hidden`, and its two parts."""
        if self.distilled is None:
            sums: Sums = self.head(x, labels, weights, teaching=teaching)
            return sums
        return self.distilled(self.head(x), labels, weights, teaching)

    def token_scores(self, x: Tensor) -> Tensor:
        """Return the score of each token given the result of `hidden`, fp32 `[B, T]`."""
        assert self.score is not None, "model.output is not score"
        return self._each_token(self.score, x)

    def token_values(self, x: Tensor) -> Tensor:
        """Return the value of each token given the result of `hidden`, fp32 `[B, T]`."""
        assert self.value is not None, "the model has no value head"
        return self._each_token(self.value, x)

    def _each_token(self, head: Linear, x: Tensor) -> Tensor:
        """Return the number that `head` gives each token, fp32 `[B, T]`, of whole rows where ranks hold slices."""
        numbers: Tensor = head(x)[..., 0].float()
        return numbers if self.score_join is None else self.score_join(numbers)

    def sum_over_context(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over the ranks that hold the other slices of these sequences."""
        return values if self.context_sum is None else self.context_sum(values)

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        dropout_seed: int | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the head's input: the last block's output after the final norm, `[B, T, D]`. See `forward`."""
        num_tokens, past = tokens.shape[1], 0 if cache is None else cache.length
        if positions is None:
            positions = torch.arange(past, past + num_tokens, device=tokens.device)
        x = self.embedded(tokens, positions, dropout_seed)
        has_mask = cache is not None and cache.has_own_masks
        mask = None if has_mask else self._mask(documents, positions, x.dtype, past)
        x = self.through_blocks(x, positions, mask, dropout_seed, cache)
        normed: Tensor = self.final_norm(x)
        return normed

    def embedded(self, tokens: Tensor, positions: Tensor, dropout_seed: int | None) -> Tensor:
        """Return the input of the first block, `[B, T, D]`."""
        self._seed_dropout(dropout_seed, layer=-1)
        x = self.embed(tokens)
        if self.config.embedding_scale is not None:
            x = x * self.config.embedding_scale
        if self.positions is not None:
            x = x + self.positions(positions)
        return F.dropout(x, self.config.dropout, self.training)

    def through_blocks(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | Documents | None,
        dropout_seed: int | None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return `x` `[B, T, D]` after every block of this model.

        A block's name is its index in the whole model, of which a pipeline stage holds a part.
        """
        for name, block in self.blocks.named_children():
            layer = int(name)
            self._seed_dropout(dropout_seed, layer)
            x = block(x, positions, mask, None if cache is None else cache.layers[layer])
        return x

    def tie(self) -> None:
        """Make the head share the embedding's weight again, if the config ties them."""
        if self.config.ties_head:
            self.head.weight = self.embed.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Tie the weights again: `to_empty` and other moves off the meta device make new parameters for each module."""
        apply: Callable[..., Any] = super()._apply  # typed here: torch does not
        result = apply(fn, recurse)
        self.tie()
        return result

    def _mask(
        self, documents: Documents | None, positions: Tensor, dtype: torch.dtype, past: int
    ) -> Tensor | Documents | None:
        """Return the mask that attention needs, or None if plain causal attention is enough.

        The queries are at `positions` (`[T]` or `[B, T]`), after `past` tokens in a cache. Documents are their own mask
        where attention can cut the sequence at their ends, which a window that is shorter than they are prevents.
        """
        num_tokens = positions.shape[-1]
        window = self.config.sliding_window
        if documents is not None and documents.are_whole_rows:
            documents = None
        if window is not None and window >= (documents.longest if documents else past + num_tokens):
            window = None
        if documents is not None:
            assert past == 0, "documents are for training; a cache holds one document"
            dropout = self.config.dropout if self.training else 0.0
            by_document = attends_by_document(positions.device, dtype, self.config.head_dim, dropout)
            if by_document and window is None and not self.needs_dense_mask:
                return documents
            return document_mask(documents.ids(), dtype, window)
        if past == 0 and window is not None:
            return document_mask(positions.new_zeros(1, num_tokens), dtype, window)
        if window is not None or (past > 0 and num_tokens > 1):
            seen = torch.ones(num_tokens, past + num_tokens, dtype=torch.bool, device=positions.device).tril(past)
            return seen if window is None else seen.triu(past + 1 - window)
        return None

    def _seed_dropout(self, dropout_seed: int | None, layer: int) -> None:
        """Make the dropout masks drawn next a pure function of (dropout_seed, layer)."""
        if self.training and self.has_dropout:
            if dropout_seed is None:
                raise ValueError("training with dropout needs dropout_seed")
            torch.manual_seed(mix_seed(dropout_seed, layer))


def mix_seed(seed: int, layer: int) -> int:
    """Hash (seed, layer) to a 32-bit seed: two rounds of splitmix64's finaliser (Steele et al., 2014).

    torch's CPU generator keeps only 32 bits of a seed.
    """
    state = (seed * 0x9E3779B97F4A7C15 + layer + 1) % 2**64
    for _ in range(2):
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state >> 32
