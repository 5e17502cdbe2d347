"""Train byte-level BPE with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatrain.config import TokenizerConfig
from megatrain.data.special_tokens import chat_template, special_tokens
from megatrain.data.tokenizer_hf import Folder, HuggingFaceTokenizer
from megatrain.errors import ConfigError, DataError, EnvironmentFault, how_to_install

END, BEGIN = "<|endoftext|>", "<|begin_of_text|>"
_MIN_FREQUENCY = 2
"""How often a pair of tokens must occur to become one: what occurs once says nothing of other text."""


def train_byte_level_bpe(texts: Iterable[str], config: TokenizerConfig, bos: bool = False) -> HuggingFaceTokenizer:
    """Train on clean texts, read once; `bos` gives it a BOS token.

    Ids are those of the control tokens, then of the 256 bytes, then of the merges, in their order. The same texts in
    the same order give the same definition, whatever the number of threads. The vocabulary is smaller than
    `tokenizer.vocab_size` if the texts have no more pairs that occur twice. Raises ConfigError if the control tokens
    and the bytes alone fill it, `DataError` if there is no text.
    """
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise EnvironmentFault(f"byte-level BPE needs tokenizers: {how_to_install('hf')}") from error
    names = special_tokens(config, [END, *([BEGIN] if bos else [])])
    least = len(names) + 256
    if config.vocab_size <= least:
        raise ConfigError(
            f"tokenizer.vocab_size={config.vocab_size}: {len(names)} control tokens and 256 bytes alone are {least}; "
            f"give more than {least}, or fewer control tokens (tokenizer.reserved_tokens, tokenizer.special_tokens)"
        )
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split_pattern(config)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # or bytes that the texts lack could not be encoded
        show_progress=False,
    )
    library.train_from_iterator(_some(texts), trainer)
    settings: dict[str, Any] = {"eos_token": END, **({"bos_token": BEGIN} if bos else {})}
    settings["clean_up_tokenization_spaces"] = False
    if template := chat_template(config):
        settings["chat_template"] = template
    else:
        settings["split_special_tokens"] = True  # names in text are text for transformers too
    return HuggingFaceTokenizer(library.to_str(), Folder(settings), "the trained tokenizer")


def _some(texts: Iterable[str]) -> Iterable[str]:
    empty = True
    for text in texts:
        empty = empty and not text.strip()
        yield text
    if empty:
        raise DataError("the text to train a tokenizer on is empty; give more text, or a trained tokenizer")


def split_pattern(config: TokenizerConfig) -> str:
    """Return the regular expression that cuts text into the pieces in which merges happen, by the config's rules.

    The forms are those of GPT-2 (`apart`) and of GPT-4's cl100k (`joined`), with combining marks as letters.
    """
    letter = r"[\p{L}\p{M}]"
    mark = r"[^\s\p{L}\p{M}\p{N}]"
    if config.punctuation == "apart":
        words = rf"'(?:[sdmt]|ll|ve|re)(?!{letter})| ?{letter}+"
    elif config.whitespace == "joined":
        words = rf"[^\r\n\p{{L}}\p{{M}}\p{{N}}]?{letter}+"
    else:
        words = rf"(?: |{mark})?{letter}+"
    digits = {"whole": r" ?\p{N}+", "threes": r"\p{N}{1,3}", "single": r"\p{N}"}[config.digits]
    marks = rf" ?{mark}+" + (r"[\r\n]*" if config.whitespace == "joined" else "")
    spaces = {
        "joined": r"\s*[\r\n]+|\s+(?!\S)|\s+",
        "runs": r"[\r\n]+|\t+| +(?!\S)|\s",
        "single": r"\s",
    }[config.whitespace]
    return f"{words}|{digits}|{marks}|{spaces}"
