"""Clean text: newlines, control characters, Unicode NFC. Opens no files.

`normalise` is idempotent. A tokenizer trained here decodes the ids of clean text to exactly that text.
"""

from __future__ import annotations

import re
import unicodedata

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def normalise(text: str) -> str:
    """Convert newlines to `\\n`, remove leading byte order marks and control characters except tabs, apply NFC."""
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return unicodedata.normalize("NFC", text.lstrip("\ufeff"))
