"""Turn raw bytes into clean text: decoding by policy, newlines, control characters, Unicode NFC. Opens no files.

`normalise` is idempotent. A tokenizer trained here decodes the ids of clean text to exactly that text.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass

from megatrain.errors import DataError

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def normalise(text: str) -> str:
    """Convert newlines to `\\n`, remove leading byte order marks and control characters except tabs, apply NFC."""
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return unicodedata.normalize("NFC", text.lstrip("\ufeff"))


@dataclass(frozen=True)
class Record:
    """A document as it was read.

    `payload` is UTF-8 bytes, or text from a column. With `json` it is a JSON object whose `text_column` is the text.
    `where` is its file, or file:line.
    """

    payload: bytes | str
    where: str
    json: bool = False


@dataclass(frozen=True)
class Policy:
    """How to read records and what to do with bad ones: the keys of the same names under `data.`."""

    text_column: str
    undecodable: str


def clean(record: Record, policy: Policy) -> tuple[str | None, bool]:
    """Return a record's clean text, and whether it had undecodable bytes or lone surrogates.

    The text is None if the policy skips the record. Raises `DataError` if it is not JSON but should be, lacks the
    column, or is undecodable and the policy refuses that.
    """
    payload, bad, at = record.payload, False, ""
    if isinstance(payload, bytes):
        try:
            text = payload.decode("utf-8")
        except UnicodeDecodeError as error:
            line = payload.count(b"\n", 0, error.start) + 1
            bad, at = True, f"byte {error.start}, line {line}"
            text = payload.decode("utf-8", errors="replace")
    else:
        text = payload
    if record.json:
        text = _json_text(text, record.where, policy.text_column)
    if _SURROGATE.search(text):
        bad, at = True, at or "a lone surrogate"
        text = _SURROGATE.sub("\ufffd", text)
    if bad and policy.undecodable == "refuse":
        raise DataError(f"{record.where}: not UTF-8 ({at}); convert it, or set data.undecodable=replace or skip")
    if bad and policy.undecodable == "skip":
        return None, True
    return normalise(text), bad


def _json_text(line: str, where: str, column: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON ({error})") from error
    if not isinstance(value, dict) or not isinstance(value.get(column), str):
        have = (
            f"it has {', '.join(map(repr, list(value)[:8]))}" if isinstance(value, dict) else "it is not a JSON object"
        )
        raise DataError(f"{where}: no text under {column!r} ({have}); set data.text_column")
    text: str = value[column]
    return text
