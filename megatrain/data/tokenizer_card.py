"""The card of a tokenizer that was trained here, `tokenizer_card.json`: rules, control tokens, and the text it saw."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatrain.config import TrainTokenizerConfig
from megatrain.data.corpus.pipeline import ENCODING_LIBRARIES, versions
from megatrain.data.corpus.recipe import build_recipe, settings_of
from megatrain.data.special_tokens import special_tokens
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_sample import TextSample, described
from megatrain.errors import DataError

CARD = "tokenizer_card.json"
_RULES = ("digits", "whitespace", "punctuation", "chat_template")


@dataclass
class TrainedTokenizerCard:
    """How a tokenizer was trained. It has no times and no paths of machines but those of the text.

    `special_tokens` are the control tokens that were asked for by id, `sample` what it was trained on: a fingerprint of
    the texts, documents, bytes, and the same of each source. `libraries` are versions: another one may train another
    tokenizer on the same text.
    """

    kind: str
    fingerprint: str
    vocab_size: int
    rules: dict[str, str | None]
    special_tokens: dict[str, int]
    seed: int
    sample: dict[str, Any]
    cleaning: list[Any] = field(default_factory=list)
    libraries: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(tokenizer: Tokenizer, config: TrainTokenizerConfig, sample: TextSample) -> TrainedTokenizerCard:
        """Return the card of a tokenizer that was trained on a sample."""
        ids = {name: tokenizer.control_token(name) for name in special_tokens(config.tokenizer, [])}
        return TrainedTokenizerCard(
            kind=config.tokenizer.kind,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            rules={name: getattr(config.tokenizer, name) for name in _RULES},
            special_tokens={name: token for name, token in ids.items() if token is not None},
            seed=config.seed,
            sample=described(sample),
            cleaning=settings_of(build_recipe(config.clean.steps)),
            libraries=versions(ENCODING_LIBRARIES),
        )

    def save(self, folder: Path) -> None:
        """Write the card into a folder."""
        (folder / CARD).write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @staticmethod
    def find(folder: Path) -> TrainedTokenizerCard | None:
        """Read the card of a folder, None if it has none. Raises `DataError` if it is damaged."""
        path = folder / CARD
        if not path.is_file():
            return None
        try:
            return TrainedTokenizerCard(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: not the card of a tokenizer ({error})") from error
