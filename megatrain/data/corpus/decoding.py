"""Turn a raw record into text by policy: the encoding, the field of a JSON object, what is no text. Opens no files."""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatrain.config.data_config import CHAT_KINDS
from megatrain.data.chat.conversation import read_conversation, to_text
from megatrain.data.chat.errors import ConversationError
from megatrain.data.chat.pair import pair_to_text, read_pair
from megatrain.data.chat.prompt import read_prompt
from megatrain.data.corpus.code import license_of, why_left_out
from megatrain.data.corpus.compressed import SUFFIXES, archive_kind
from megatrain.data.corpus.conversations import find_conversation, render
from megatrain.data.corpus.html_bytes import decode_html
from megatrain.data.corpus.normalise import normalise
from megatrain.data.corpus.record import BadRecordError, LeftOutError, Policy, Problem, Record, identity
from megatrain.data.corpus.wikipedia import wikitext_to_text
from megatrain.errors import DataError

_SURROGATE = re.compile("[\ud800-\udfff]")
_OTHER_ENCODINGS = {  # by their byte order marks; UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_FILES = ("text", "html", "code", "warc")  # kinds whose payload is a whole file or page
_HEAD_BYTES = 8000  # of a file, by which it is found to be binary: with NUL bytes in it that are no mere accident
_MANY_NULS = 0.2


@dataclass
class Decoded:
    """A record's clean text, whether it had undecodable bytes or lone surrogates, and what its source knows of it."""

    text: str
    undecodable: bool
    kind: str | None
    id: str | None = None
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


def decode(record: Record, policy: Policy) -> Decoded:
    """Return a record's clean text.

    Raises `LeftOutError` if it is code that people did not write; `BadRecordError` if the record is not JSON but should
    be, has no text in its column, is UTF-16 or UTF-32, is binary, or is undecodable and the policy skips that;
    `DataError` if the policy refuses undecodable records.
    """
    if record.problem:
        raise BadRecordError(record.problem)
    payload, bad, at = record.payload, False, ""
    decoded = Decoded("", False, record.kind, record.id, record.source, record.metadata)
    if isinstance(payload, bytes):
        if record.kind in _FILES and (problem := no_text(payload)):
            raise LeftOutError(problem.kind) if record.kind == "code" else BadRecordError(problem)
        if record.markup or record.charset:
            text, bad = decode_html(payload, record.charset)
            at = "in no encoding that it names or resembles" if bad else ""
        else:
            text, bad, at = _decode_utf_8(payload, record, policy)
    else:
        text = payload
    if record.kind == "wikipedia":
        found = wikitext_to_text(text, record.namespaces)
        if isinstance(found, Problem):
            raise BadRecordError(found, record.id)
        text = found
    elif record.kind == "json":
        text = _from_json(text, policy, decoded)
    if _SURROGATE.search(text):
        bad, at = True, at or "a lone surrogate"
        text = _SURROGATE.sub("\ufffd", text)
    if bad and policy.undecodable != "replace":
        raise _undecodable(record, at, "convert it", "replace or skip", policy)
    decoded.text, decoded.undecodable = normalise(text), bad
    if record.kind == "code":
        if reason := why_left_out(decoded.text, record.where):
            raise LeftOutError(reason)
        decoded.metadata = record.metadata | {"license": license_of(decoded.text) or record.metadata.get("license")}
    return decoded


def no_text(payload: bytes) -> Problem | None:
    """Return what a file is if it is no text: an archive, or binary."""
    if archive := archive_kind(payload):
        return Problem("archive", f"holds {archive}, not text", "unpack it first")
    head = payload[:_HEAD_BYTES]
    if (at := head.find(b"\0")) < 0 or any(payload.startswith(mark) for mark in _OTHER_ENCODINGS):
        return None
    if head.count(b"\0") <= _MANY_NULS * len(head) and _is_utf_8(head):
        return None
    return Problem("binary", f"binary, not text (a NUL byte at {at})", "leave the file out")


def _is_utf_8(head: bytes) -> bool:
    """Return whether the beginning of a file is UTF-8; its last character may be incomplete."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _decode_utf_8(payload: bytes, record: Record, policy: Policy) -> tuple[str, bool, str]:
    """Return the text, whether bytes were replaced, and the place of the first."""
    try:
        return payload.decode("utf-8"), False, ""
    except UnicodeDecodeError as error:
        line = payload.count(b"\n", 0, error.start) + 1
        if other := next((name for mark, name in _OTHER_ENCODINGS.items() if payload.startswith(mark)), None):
            remedy = _conversion(record, other)
            raise _undecodable(record, f"{other} by its byte order mark", remedy, "skip", policy) from error
        return payload.decode("utf-8", errors="replace"), True, f"byte {error.start}, line {line}"


def _conversion(record: Record, encoding: str) -> str:
    """Return advice for a text in another encoding: iconv helps only where the file as a whole is that text."""
    if record.kind not in ("text", "code", "html", "json"):
        return "write its text as UTF-8 where the file is made"
    unpack = "unpack it, and " if any(suffix in Path(record.where).suffix for suffix in SUFFIXES) else ""
    return f"{unpack}convert it with iconv -f {encoding.lower()} -t utf-8"


def _undecodable(record: Record, what: str, remedy: str, others: str, policy: Policy) -> DataError | BadRecordError:
    """Return the error for a record that is not UTF-8 and whose bytes are not to be replaced."""
    if policy.undecodable == "refuse":
        return DataError(f"{record.where}: not UTF-8 ({what}); {remedy}, or set data.undecodable={others}")
    kind = "undecodable" if policy.undecodable == "skip" else "not_utf_8"
    return BadRecordError(Problem(kind, f"not UTF-8 ({what})", remedy))


def _from_json(line: str, policy: Policy, decoded: Decoded) -> str:
    """Return the text of a line of JSON; put its id and other fields into `decoded`."""
    column = policy.text_column
    try:
        value = json.loads(line.lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise BadRecordError(Problem("not_json", f"not a line of JSON ({error})")) from error
    if not isinstance(value, dict):
        raise BadRecordError(Problem("not_object", f"no text under {column!r} (it is not a JSON object)"))
    if policy.kind in CHAT_KINDS:
        return _messages(value, policy, decoded)
    conversation = find_conversation(value, column)
    held = column if column in value else column.partition(".")[0]
    rest = {name: other for name, other in value.items() if name != held and other is not conversation}
    own, source, decoded.metadata = identity(rest)
    decoded.id, decoded.source = own or decoded.id, source or decoded.source
    text = find_text(value, column)
    if isinstance(text, Problem):
        raise BadRecordError(text, decoded.id)
    if conversation is not None:
        decoded.kind = "conversation"
    return str(text)


def _messages(record: dict[str, Any], policy: Policy, decoded: Decoded) -> str:
    """Return the messages of a conversation to tune on, a pair or a prompt as text; put its id into `decoded`."""
    layout = policy.layout
    own, source, _ = identity(record)
    decoded.id, decoded.source, decoded.kind = own or decoded.id, source or decoded.source, "conversation"
    try:
        # normalised here: later they are JSON, which escapes line ends
        if policy.kind == "pairs":
            pair = read_pair(record, normalise)
            if layout:
                layout.check(pair.chosen, given=pair.num_given)
                layout.check(pair.rejected, given=pair.num_given)
            return pair_to_text(pair)
        if policy.kind == "prompts":
            prompt = read_prompt(record, normalise)
            if layout:
                layout.check(prompt["messages"], asks=True)
            return json.dumps(prompt)
        messages = read_conversation(record, normalise)
        if layout:
            layout.check(messages)
        return to_text(messages)
    except ConversationError as error:
        raise BadRecordError(Problem(error.kind, error.message, error.remedy), decoded.id) from error


def find_text(record: dict[str, Any], column: str) -> str | bytes | Problem:
    """Return the text in a record's field, or what is wrong with it.

    A field of that very name comes first; otherwise `content.text` is the field `text` of the object `content`. A list
    of messages in that field, or in a record without it, is written as text (`conversations.py`).
    """
    if (conversation := find_conversation(record, column)) is not None:
        return render(conversation, record)
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
