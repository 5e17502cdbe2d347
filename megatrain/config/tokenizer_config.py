"""`tokenizer.*`: the tokenizer to train or to load. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key

SMALLEST_VOCABULARY = 300
"""Size of the smallest vocabulary to train: the bytes, and some pieces."""


@dataclass
class TokenizerConfig:
    """How text becomes token ids. All but `kind` and `path` is for a tokenizer that is trained."""

    kind: str = key(
        "sentencepiece",
        "kind of tokenizer: SentencePiece's BPE or unigram, both with byte fallback, or byte-level BPE, each trained "
        "or loaded; hf is any Hugging Face tokenizer, loaded",
        choices=("sentencepiece", "unigram", "byte_level_bpe", "hf"),
    )
    path: str | None = key(
        None,
        "trained tokenizer to load: a .model file, a tokenizer.json, or a Hugging Face name or folder",
        path=True,
    )
    vocab_size: int = key(
        8192,
        "vocabulary size of the tokenizer to train (without tokenizer.path), special tokens included",
        minimum=SMALLEST_VOCABULARY,
        maximum=2**24,
    )
    train_bytes: int = key(
        32 * 2**20, "bytes of text to train the tokenizer on, sampled from the whole corpus", minimum=1024
    )
    digits: str = key(
        "whole",
        "tokens of numbers: whole may hold any number of digits, threes at most three, single one",
        choices=("whole", "threes", "single"),
    )
    whitespace: str = key(
        "joined",
        "tokens of whitespace: joined keeps runs of spaces, as code has them, and may join line ends to what is beside "
        "them; runs keeps spaces, tabs and line ends in runs of their own; single makes each of them a token, but for "
        "the one space before a word",
        choices=("joined", "runs", "single"),
    )
    punctuation: str = key(
        "joined",
        "joined may put letters and punctuation into one token, such as `.append(`, which makes code shorter; apart "
        "keeps words free of it",
        choices=("joined", "apart"),
    )
    special_tokens: list[str] = key(
        [], "further control tokens by name, such as <|tool_call|>; no text is encoded to them"
    )
    reserved_tokens: int = key(
        0, "control tokens to set aside for later, <|reserved_0|> and so on", minimum=0, maximum=2**16
    )
    fim_tokens: bool = key(
        False,
        "add the control tokens of fill-in-the-middle: <|fim_prefix|>, <|fim_middle|>, <|fim_suffix|> and <|fim_pad|>",
    )
    chat_template: str | None = key(
        None,
        "chat template to save with the tokenizer: chatml, llama3, minimal, or a Jinja file; its markers such as "
        "<|im_start|> become control tokens",
    )
