"""Repair Unicode: text that was decoded wrongly, and letters that no reader needs."""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, ClassVar

from megatrain.config import key
from megatrain.data.corpus.document import Document, Removal, Step
from megatrain.data.corpus.source import require_library

_INVISIBLE = re.compile("[\u00ad\u180e\u200b\u2060\ufeff\ufff9-\ufffb\U000e0000-\U000e0fff]")
_BLANK = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
_EMOJI = re.compile(
    "[\U0001f1e6-\U0001f1ff\U0001f300-\U0001faff\u2600-\u27bf\u2b50\u2b55\ufe0f\u20e3](?:\u200d|\ufe0f|[\U0001f3fb-\U0001f3ff])*"
)
_MANY_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*){2,}")


@dataclass(frozen=True)
class UnicodeRepair(Step):
    """Repair text decoded wrongly (as in `cafÃ©`), invisible characters and odd spaces; NFC in the end.

    The repair is ftfy's, without what would damage text that is right: Chinese fullwidth punctuation, curly quotes,
    ligatures and HTML entities stay.
    """

    name: ClassVar[str] = "unicode"
    repair_encoding: bool = key(True, "undo decoding as Latin-1 or Windows-1252 of what was UTF-8")
    remove_invisible: bool = key(True, "remove soft hyphens, zero-width spaces and the like, but not joiners")
    plain_spaces: bool = key(
        True, "make no-break and other wide or narrow spaces plain ones, but not the ideographic one"
    )
    remove_emoji: bool = key(False, "remove emoji")
    limit_blank_lines: bool = key(True, "leave at most one blank line in a row")

    def __post_init__(self) -> None:
        if self.repair_encoding:
            _ftfy()

    def apply(self, document: Document) -> Removal | None:
        """Repair the text."""
        text = document.text
        if self.repair_encoding and not text.isascii():
            fixed = _ftfy().fix_text(text, _configuration())
            document.count("repaired", fixed != text)
            text = fixed
        if self.remove_invisible and not text.isascii():
            text = _INVISIBLE.sub("", text)
        if self.plain_spaces and not text.isascii():
            text = _BLANK.sub(" ", text)
        if self.remove_emoji and not text.isascii():
            text, found = _EMOJI.subn("", text)
            document.count("emoji", found)
        if self.limit_blank_lines:
            text = _MANY_LINES.sub("\n\n", text)
        document.text = unicodedata.normalize("NFC", text)
        return None


@functools.cache
def _ftfy() -> Any:
    return require_library("ftfy", "the cleaning step unicode", "corpus")


@functools.cache
def _configuration() -> Any:
    """Return ftfy's settings; its defaults change nearly every Chinese document."""
    return _ftfy().TextFixerConfig(
        unescape_html=False,
        uncurl_quotes=False,
        fix_character_width=False,
        fix_latin_ligatures=False,
        normalization="NFC",
        explain=False,
    )
