"""Identify the language of a document, offline."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

from megatrain.config import key
from megatrain.data.corpus.document import Document, Removal, Step
from megatrain.data.corpus.source import require_library
from megatrain.errors import ConfigError

_CHARACTERS = 2000
"""Characters looked at: from the middle of a long document, because beginnings are often menus."""

_VARIANTS = {"lzh": "zh", "wuu": "zh", "yue": "zh"}
"""Written variants that the model tells apart, but not reliably."""


@dataclass(frozen=True)
class Language(Step):
    """Identify the language with py3langid, whose model comes with the package, and keep only some languages.

    The codes are those of ISO 639-1, such as en and zh. Source code is taken for English. The model was trained on
    97 languages (Lui and Baldwin, "langid.py", 2012).
    """

    name: ClassVar[str] = "language"
    keep: list[str] = key([], "languages to keep; empty keeps all")
    min_score: float = key(
        0.65, "with `keep`: smallest probability of the language (FineWeb's 0.65)", minimum=0, maximum=1
    )

    def __post_init__(self) -> None:
        _langid()
        if not self.keep:
            return
        known = {str(label) for label in _identifier().labels} - set(_VARIANTS)
        if unknown := [code for code in self.keep if code not in known]:
            variants = [f"{_VARIANTS[code]} for {code}" for code in unknown if code in _VARIANTS]
            hint = f"give {', '.join(variants)}; " if variants else ""
            raise ConfigError(
                f"clean.steps: language.keep: unknown {', '.join(unknown)}; {hint}codes that would work: "
                f"{', '.join(sorted(known))}"
            )

    def apply(self, document: Document) -> Removal | None:
        """Set the document's language, and remove it if another is wanted or the model is not sure."""
        at = max(0, (len(document.text) - _CHARACTERS) // 2)
        found, score = _identifier().classify(document.text[at : at + _CHARACTERS])
        language = _VARIANTS.get(found, str(found))
        document.language = language
        document.count(language)
        if self.keep and language not in self.keep:
            return Removal(f"language_{language}", f"{language} with probability {score:.2f}")
        if self.keep and score < self.min_score:
            return Removal("uncertain_language", f"{language} with probability {score:.2f}, below {self.min_score}")
        return None


def _langid() -> Any:
    return require_library("py3langid.langid", "the cleaning step language", "corpus")


@functools.cache
def _identifier() -> Any:
    langid = _langid()
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
