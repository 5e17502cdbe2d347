"""`megatrain generate`: print a prompt and its continuation while it is sampled. `model/sampling.py` samples."""

from __future__ import annotations

import io
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from megatrain.config import GenerateConfig
from megatrain.data.corpus.fill_in_the_middle import gap_prompt, marker_names
from megatrain.data.corpus.normalise import normalise
from megatrain.data.tokenizer import Tokenizer
from megatrain.distributed.devices import device_by_name
from megatrain.errors import ConfigError
from megatrain.interop.load_model import load
from megatrain.model.ensemble import Ensemble
from megatrain.model.gpt import GPT
from megatrain.model.sampling import generate as sample
from megatrain.verbs.ensembles import build, load_others


def generate(config: GenerateConfig) -> None:
    """Print the prompt, then its continuation token by token, on standard output; then the suffix, if one is given.

    Raises:
        ConfigError: prompt or suffix is not text, they are too long for the model, the model has no tokenizer, or that
            has no markers for a gap.
        CheckpointError: there is no intact model.
    """
    loaded = load(Path(config.path), config.step)
    tokenizer = loaded.need_tokenizer()
    prompt, suffix = _texts(config)
    model = build([loaded, *load_others(loaded, config.ensemble)], device_by_name(config.device))
    pieces = stream(model, tokenizer, loaded.end_tokens(), config)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal shows `?` for a character it does not have
    print_text(prompt)
    for piece in pieces:
        print_text(piece)
    print_text(f"{suffix or ''}\n")


def stream(
    model: GPT | Ensemble, tokenizer: Tokenizer, end_tokens: Collection[int], config: GenerateConfig
) -> Iterator[str]:
    """Return the continuation of `config.prompt` in pieces, as it is sampled; `end_tokens` may end it.

    With `config.suffix` that is what stands between the prompt and the suffix.

    Raises:
        ConfigError: at once, if prompt or suffix is not text, they are too long, or markers for a gap are missing.
    """
    prompt, suffix = _texts(config)
    if suffix is None:
        ids = [*tokenizer.start(), *tokenizer.encode(prompt)] or [tokenizer.end_of_document]
    else:
        markers = marker_names(config.fim_tokens, "fim_tokens")
        ids = [*tokenizer.start(), *gap_prompt(tokenizer, markers, prompt, suffix)]
    longest = model.config.max_seq_len
    if len(ids) > longest:
        what = "prompt" if suffix is None else "prompt and suffix"
        raise ConfigError(
            f"{what}: {len(ids)} tokens, but the model takes at most {longest} (model.max_seq_len); shorten it"
        )
    sampled = sample(
        model,
        ids,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        stop_ids=end_tokens if config.stop_at_end else (),
    )
    return decode(sampled, tokenizer, ids if prompt and suffix is None else [])


def _texts(config: GenerateConfig) -> tuple[str, str | None]:
    """Return the prompt, and the suffix if there is one, normalised like training text."""
    return read_text("prompt", config.prompt), None if config.suffix is None else read_text("suffix", config.suffix)


def decode(sampled: Iterator[int], tokenizer: Tokenizer, before: Sequence[int]) -> Iterator[str]:
    """Yield the text of ids as they are sampled, after the ids `before`."""
    decoder = tokenizer.stream_decoder()
    for token in before:
        decoder.push(token)  # how the first sampled token decodes may depend on the prompt
    for token in sampled:
        yield decoder.push(token) if token < tokenizer.vocab_size else "\ufffd"
    yield decoder.finish()


def read_text(key: str, text: str) -> str:
    """Return a text that `key` gives, normalised like training text. Raises ConfigError if it was not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{key}: not UTF-8 text (at character {error.start}); give text in UTF-8") from None
    return normalise(text)


def print_text(text: str) -> None:
    """Print text on standard output without delay."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
