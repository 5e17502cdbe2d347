"""Turn raw bytes into clean text: decoding by policy, newlines, control characters, Unicode NFC. Opens no files.

`normalise` is idempotent. A tokenizer trained here decodes the ids of clean text to exactly that text.
"""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from megatrain.errors import DataError

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_OTHER_ENCODINGS = {  # by their byte order marks; UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def normalise(text: str) -> str:
    """Convert newlines to `\\n`, remove leading byte order marks and control characters except tabs, apply NFC."""
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return unicodedata.normalize("NFC", text.lstrip("\ufeff"))


@dataclass(frozen=True)
class Problem:
    """Why a record is bad: a kind, counted in the card, a message, and what would help."""

    kind: str
    message: str
    remedy: str = "mend it"


@dataclass(frozen=True)
class Record:
    """A document as it was read.

    `payload` is UTF-8 bytes, or text from a column. With `json` it is a JSON object whose `text_column` is the text.
    `where` is its file, or file:line. `problem` is what the source found wrong with it. An `oversized` record has no
    payload, because it was longer than `data.max_document_bytes`.
    """

    payload: bytes | str
    where: str
    json: bool = False
    problem: Problem | None = None
    oversized: bool = False


@dataclass(frozen=True)
class Policy:
    """How to read records and what to do with bad ones: the keys of the same names under `data.`."""

    text_column: str
    undecodable: str
    on_bad_record: str = "stop"


class BadRecordError(Exception):
    """A record without text. Never leaves this room: `on_bad_record` decides what becomes of it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def clean(record: Record, policy: Policy) -> tuple[str, bool]:
    """Return a record's clean text, and whether it had undecodable bytes or lone surrogates.

    Raises `BadRecordError` if the record is not JSON but should be, has no text in its column, is UTF-16 or UTF-32, or
    is undecodable and the policy skips that; `DataError` if the policy refuses undecodable records.
    """
    if record.problem:
        raise BadRecordError(record.problem)
    payload, bad, at = record.payload, False, ""
    if isinstance(payload, bytes):
        try:
            text = payload.decode("utf-8")
        except UnicodeDecodeError as error:
            line = payload.count(b"\n", 0, error.start) + 1
            bad, at = True, f"byte {error.start}, line {line}"
            if other := next((name for mark, name in _OTHER_ENCODINGS.items() if payload.startswith(mark)), None):
                remedy = f"convert it with iconv -f {other.lower()} -t utf-8"
                raise _undecodable(record, f"{other} by its byte order mark", remedy, "skip", policy) from error
            text = payload.decode("utf-8", errors="replace")
    else:
        text = payload
    if record.json:
        text = _json_text(text, policy.text_column)
    if _SURROGATE.search(text):
        bad, at = True, at or "a lone surrogate"
        text = _SURROGATE.sub("\ufffd", text)
    if bad and policy.undecodable != "replace":
        raise _undecodable(record, at, "convert it", "replace or skip", policy)
    return normalise(text), bad


def _undecodable(record: Record, what: str, remedy: str, others: str, policy: Policy) -> DataError | BadRecordError:
    """Return the error for a record that is not UTF-8 and whose bytes are not to be replaced."""
    if policy.undecodable == "refuse":
        return DataError(f"{record.where}: not UTF-8 ({what}); {remedy}, or set data.undecodable={others}")
    kind = "undecodable" if policy.undecodable == "skip" else "not_utf_8"
    return BadRecordError(Problem(kind, f"not UTF-8 ({what})", remedy))


def _json_text(line: str, column: str) -> str:
    try:
        value = json.loads(line.lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise BadRecordError(Problem("not_json", f"not a line of JSON ({error})")) from error
    if not isinstance(value, dict):
        raise BadRecordError(Problem("not_object", f"no text under {column!r} (it is not a JSON object)"))
    text = find_text(value, column)
    if isinstance(text, Problem):
        raise BadRecordError(text)
    return str(text)


def find_text(record: dict[str, Any], column: str) -> str | bytes | Problem:
    """Return the text in a record's field, or what is wrong with it.

    A field of that very name comes first; otherwise `content.text` is the field `text` of the object `content`.
    """
    value: Any = record
    for name in [column] if column in record else column.split("."):
        if not isinstance(value, dict) or name not in value:
            has = ", ".join(map(repr, list(record)[:8])) or "no fields"
            return Problem("no_field", f"no text under {column!r} (it has {has})", "set data.text_column")
        value = value[name]
    if isinstance(value, (str, bytes)):
        return value
    if value is None:
        return Problem("null", f"no text under {column!r}: it is null")
    remedy = f"name a field in it, such as data.text_column={column}.text" if isinstance(value, dict) else "mend it"
    return Problem("not_text", f"no text under {column!r}: it is {_described(value)}", remedy)


def _described(value: Any) -> str:
    """Return what a value is, and the value itself if it is short."""
    if isinstance(value, dict):
        return f"an object with {', '.join(map(repr, list(value)[:8])) or 'no fields'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    kind = "true or false" if isinstance(value, bool) else "a number" if isinstance(value, (int, float)) else "no text"
    return f"{kind} ({str(value)[:40]})"
