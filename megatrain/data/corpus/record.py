"""What a reader gives for a document: a raw `Record`, and what is wrong with a bad one. Decodes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from megatrain.data.chat.layout import Layout

METADATA = (
    *("id", "source", "url", "path", "max_stars_repo_path", "lang", "language", "programming_language"),
    *("license", "licenses", "detected_licenses", "max_stars_repo_licenses"),
)
"""Columns of a table that go along with its text: its id, and what cleaning steps read. JSON's fields go along all."""


@dataclass(frozen=True)
class Problem:
    """Why a record is bad: a kind, counted in the card, a message, and what would help."""

    kind: str
    message: str
    remedy: str = "mend it"


@dataclass(frozen=True)
class Record:
    """A document as it was read.

    `payload` is bytes, or text from a column. `kind` says how it is decoded: `json` is an object whose `text_column` is
    the text, `wikipedia` the wikitext of a page, `text`, `html` and `code` a file, `warc` a page of a crawl; others are
    text as they are. With `markup` it is HTML in any encoding; `charset` is what its server said. `where` is its file,
    or file:line. `id` is its own name, else `<source>/<start of the shard>/<number>`; `source` is the file or dataset
    that it is from, or what a field of that name says. `metadata` is what else is known of it.
    `charset` is what a server named, `namespaces` are a wiki's own names for its files and categories.

    `problem` is what the source found wrong with it. An `oversized` record has no payload, because it was longer than
    `data.max_document_bytes`; one that is `left_out` has none either, because it is no document, for the reason named.
    """

    payload: bytes | str
    where: str
    kind: str | None = None
    markup: bool = False
    problem: Problem | None = None
    oversized: bool = False
    left_out: str | None = None
    id: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    charset: str | None = None
    namespaces: tuple[str, ...] = ()
    source: str = ""

    def within(self, source: str, start: int, number: int) -> Record:
        """Return the record with the source it was read from, and an id if it has none: its place in a shard."""
        return replace(self, source=self.source or source, id=self.id or f"{source}/{start}/{number}")


@dataclass(frozen=True)
class Policy:
    """How to read records and what to do with bad ones: the keys of the same names under `data.`.

    With `kind="chat"` a record is a conversation to tune on, and its text is its messages as JSON
    (chat/conversation.py); with `pairs` it is a preference pair (chat/pair.py), with `prompts` a prompt with fields for
    rewards (chat/prompt.py). `layout` then has the template that must be able to lay it out.
    """

    text_column: str
    undecodable: str
    on_bad_record: str = "stop"
    kind: str = "files"
    layout: Layout | None = None


def identity(fields: dict[str, Any]) -> tuple[str | None, str, dict[str, Any]]:
    """Return the id and the source that the fields of a record name (None and empty if none), and the other fields.

    An object `metadata` counts as fields: so datatrove and Dolma write them, and `data.write_text` too.
    """
    others = {name: value for name, value in fields.items() if name not in ("id", "source")}
    if isinstance(others.get("metadata"), dict):
        others = others.pop("metadata") | others
    own, source = fields.get("id"), fields.get("source")
    named = isinstance(own, (str, int)) and not isinstance(own, bool) and own != ""
    return str(own) if named else None, source if isinstance(source, str) else "", others


class BadRecordError(Exception):
    """A record without text. Never leaves this room: `on_bad_record` decides what becomes of it.

    `id` is its own, if that could be read.
    """

    def __init__(self, problem: Problem, id: str | None = None) -> None:
        super().__init__(problem.message)
        self.problem, self.id = problem, id


class LeftOutError(Exception):
    """A record that is no document, such as a minified script; counted by its reason. Never leaves this room."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
