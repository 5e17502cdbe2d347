"""Train the tokenizer that `tokenizer.*` describes on texts."""

from __future__ import annotations

from collections.abc import Iterator

from megatrain.config import TokenizerConfig
from megatrain.data.special_tokens import special_tokens
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.train_byte_level_bpe import train_byte_level_bpe
from megatrain.data.train_sentencepiece import train_sentencepiece
from megatrain.errors import ConfigError


def check_training(config: TokenizerConfig) -> None:
    """Refuse a tokenizer that cannot be trained before any text is read. Raises ConfigError."""
    if config.kind == "hf":
        raise ConfigError(
            "tokenizer.path: missing; tokenizer=hf is loaded from a path, to train one give tokenizer=byte_level_bpe, "
            "sentencepiece or unigram"
        )
    special_tokens(config, [])


def train_tokenizer(texts: Iterator[str], config: TokenizerConfig, bos: bool) -> Tokenizer:
    """Train on clean texts, read once; `bos` gives the tokenizer a BOS token. Raises ConfigError or `DataError`."""
    train = train_byte_level_bpe if config.kind == "byte_level_bpe" else train_sentencepiece
    return train(texts, config, bos)
