"""`megatrain generate`: a prompt in, text out as it is drawn. The sampling itself is model/generate.py's."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from megatrain.config import GenerateConfig
from megatrain.data.normalise import normalise
from megatrain.distributed.devices import device_by_name
from megatrain.errors import ConfigError
from megatrain.interop.load_model import load
from megatrain.model.sampling import generate as sample


def generate(config: GenerateConfig) -> None:
    """Print the prompt, then its continuation token by token, to standard output.

    Raises:
        ConfigError: a prompt that is not text or longer than the model takes, or a model without a tokenizer.
        CheckpointError: no model that is whole.
    """
    loaded = load(Path(config.path))
    tokenizer = loaded.need_tokenizer()
    prompt = read_prompt(config.prompt)
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_document]
    longest = loaded.config.max_seq_len
    if len(ids) > longest:
        raise ConfigError(
            f"prompt: {len(ids)} tokens, but the model takes at most {longest} (model.max_seq_len); shorten it"
        )
    drawn = sample(
        loaded.build(device_by_name(config.device)),
        ids,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        stop_id=tokenizer.end_of_document if config.stop_at_end else None,
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows `?`
    write(prompt)
    decoder = tokenizer.stream_decoder()
    for token in ids if prompt else []:
        decoder.push(token)  # what follows may depend on it
    for token in drawn:
        write(decoder.push(token) if token < tokenizer.vocab_size else "\ufffd")
    write(decoder.finish() + "\n")


def read_prompt(text: str) -> str:
    """The prompt, normalised as training text is. Raises ConfigError for bytes that were no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"prompt: not UTF-8 text (at character {error.start})") from None
    return normalise(text)


def write(text: str) -> None:
    """Text to standard output, seen at once."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
