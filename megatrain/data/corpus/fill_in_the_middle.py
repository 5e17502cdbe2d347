"""Fill-in-the-middle: documents rearranged so that a model learns to write what is missing between two parts.

Bavarian et al., 2022 (arXiv:2207.14255): a document is cut into prefix, middle and suffix at two random characters, and
the middle comes last, after markers. Here as a document is encoded: cuts inside of words, as an editor's cursor makes
them, need the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from megatrain.config import DataConfig, PrepareConfig
from megatrain.data.special_tokens import special_tokens
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError

_PROBE = ("def f(ar", "gument):")
"""Two parts of a text: a tokenizer fit for fill-in-the-middle encodes them as it would the parts of a document."""


@dataclass(frozen=True)
class FillInTheMiddle:
    """What is done to documents: a share `rate` is rearranged, of these the share `spm_rate` in SPM order, not PSM.

    `prefix`, `middle` and `suffix` are the ids of the markers. Everything is a pure function of `seed` and the text.
    """

    rate: float
    spm_rate: float
    seed: int
    prefix: int
    middle: int
    suffix: int

    @staticmethod
    def of(config: PrepareConfig, tokenizer: Tokenizer) -> FillInTheMiddle | None:
        """Return what the config asks for, None for nothing.

        Raises ConfigError if the tokenizer lacks a marker, or marks with one where documents begin or end.
        """
        data = config.data
        if not data.fim_rate:
            return None
        ids = [tokenizer.control_token(name) for name in marker_names(data.fim_tokens)]
        if missing := [name for name, token in zip(data.fim_tokens, ids, strict=True) if token is None]:
            raise _lacks(data, missing, f"the tokenizer {config.tokenizer.path or 'that was trained'}")
        _check_unbound("data.fim_tokens", data.fim_tokens, tokenizer)
        joined = [*tokenizer.encode(_PROBE[0]), *tokenizer.encode(_PROBE[1])]
        if tokenizer.decode(joined) != "".join(_PROBE):
            raise ConfigError(
                f"data.fim_rate={data.fim_rate}: the tokenizer {config.tokenizer.path or 'that was trained'} puts a "
                "mark before each text, so the parts of a document would begin with a space that is not in it; give "
                "one without (tokenizer=byte_level_bpe), or data.fim_rate=0"
            )
        prefix, middle, suffix = (token for token in ids if token is not None)
        return FillInTheMiddle(data.fim_rate, data.fim_spm_rate, config.seed, prefix, middle, suffix)

    def encode(self, text: str, encode: Callable[[str], np.ndarray]) -> np.ndarray:
        """Return the ids of a document, rearranged or not, without BOS and its end.

        PSM: `<prefix> P <suffix> S <middle> M`. SPM: `<prefix> <suffix> S <middle> P M`, as the paper's joint training
        has it. The three parts are encoded each by itself.
        """
        draws = [xxhash.xxh3_64_intdigest(f"fim|{number}|{text}".encode(), seed=self.seed) for number in range(4)]
        if draws[0] >= self.rate * 2**64:
            return encode(text)
        first, second = sorted(draw % (len(text) + 1) for draw in draws[2:])
        prefix, middle, suffix = encode(text[:first]), encode(text[first:second]), encode(text[second:])
        if draws[1] < self.spm_rate * 2**64:
            parts = [[self.prefix, self.suffix], suffix, [self.middle], prefix, middle]
        else:
            parts = [[self.prefix], prefix, [self.suffix], suffix, [self.middle], middle]
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def gap_prompt(tokenizer: Tokenizer, markers: Sequence[str], before: str, after: str) -> list[int]:
    """Return the ids after which a model writes what stands between two texts (PSM), without BOS.

    `markers` are the names of those before prefix, middle and suffix. Raises ConfigError if the tokenizer lacks one, or
    marks with one where documents begin or end.
    """
    ids = {name: tokenizer.control_token(name) for name in markers}
    if missing := [name for name, token in ids.items() if token is None]:
        raise ConfigError(
            f"suffix: the model's tokenizer has no control token {' or '.join(missing)}, so it was not trained to fill "
            "a gap; leave suffix out, or give the names of its own markers as "
            '\'fim_tokens=["<before the prefix>","<before the middle>","<before the suffix>"]\''
        )
    _check_unbound("fim_tokens", markers, tokenizer)
    prefix, middle, suffix = (token for token in ids.values() if token is not None)
    return [prefix, *tokenizer.encode(before), suffix, *tokenizer.encode(after), middle]


def check_markers(config: PrepareConfig) -> None:
    """Refuse fill-in-the-middle if the tokenizer to be trained will lack a marker. Raises ConfigError."""
    data = config.data
    if not data.fim_rate:
        return
    known = special_tokens(config.tokenizer, [])
    if missing := [name for name in marker_names(data.fim_tokens) if name not in known]:
        raise _lacks(data, missing, "the tokenizer to be trained")


def marker_names(given: Sequence[str], key: str = "data.fim_tokens") -> list[str]:
    """Return the names of the three markers that `key` gives. Raises ConfigError unless they are three and differ."""
    if len(set(given)) != 3 or len(given) != 3:
        raise ConfigError(
            f"{key}={list(given)}: give three names, of the markers before the prefix, the middle and the suffix"
        )
    return list(given)


def _check_unbound(key: str, markers: Sequence[str], tokenizer: Tokenizer) -> None:
    """Raise ConfigError if a marker begins or ends documents: it would cut one into several."""
    bounds = (tokenizer.end_of_document, tokenizer.beginning_of_document)
    if bound := [name for name in markers if tokenizer.control_token(name) in bounds]:
        raise ConfigError(
            f"{key}={list(markers)}: {bound[0]} marks where documents begin or end; give control tokens that mark "
            "nothing else"
        )


def _lacks(data: DataConfig, missing: list[str], tokenizer: str) -> ConfigError:
    return ConfigError(
        f"data.fim_rate={data.fim_rate:g}: {tokenizer} has no control token {' or '.join(missing)}; give the names of "
        "its own markers as data.fim_tokens, train a tokenizer with tokenizer.fim_tokens=true, or leave data.fim_rate "
        "out"
    )
