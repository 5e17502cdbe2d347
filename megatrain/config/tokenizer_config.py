"""`tokenizer.*`: the tokenizer to train or to load. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key


@dataclass
class TokenizerConfig:
    """How text becomes token ids."""

    kind: str = key("sentencepiece", "tokenizer library", choices=("sentencepiece", "hf"))
    path: str | None = key(
        None,
        "trained tokenizer to load: a .model file, a tokenizer.json, or a Hugging Face name or folder",
        path=True,
    )
    vocab_size: int = key(8192, "vocabulary size of the tokenizer to train (without tokenizer.path)", minimum=300)
    train_bytes: int = key(
        32 * 2**20, "bytes of text to train the tokenizer on, sampled from the whole corpus", minimum=1024
    )
