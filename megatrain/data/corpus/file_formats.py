"""Layouts of records within a file: objects of a `.json`, and the text column of a `.parquet`. Opens no files."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from megatrain.data.corpus.conversations import BEGINNINGS, FIELDS, render
from megatrain.data.corpus.record import METADATA, Problem
from megatrain.errors import DataError

_READ_BYTES = 2**20
_SPACE = " \t\r\n\ufeff"


def starts_with_a_line(file: BinaryIO) -> bool:
    """Whether a `.json` has one record a line: its first line is JSON, or at least not the start of a longer value."""
    head: bytes = file.peek(_READ_BYTES)  # type: ignore[attr-defined]
    text = head.decode("utf-8", errors="replace").lstrip(_SPACE)
    line, newline, rest = text.partition("\n")
    try:
        return not isinstance(json.loads(line), list)
    except (ValueError, RecursionError):
        if line.startswith("[") or not newline:
            return not line.startswith("[")
        return not line.startswith("{") or line.rstrip().endswith("}") or rest.lstrip(_SPACE).startswith("{")


def json_values(file: BinaryIO, name: str, limit: int) -> Iterator[str]:
    """Yield the source text of each element of one JSON array, or of values that follow one another.

    Only one value of at most `limit` characters is held in memory. Undecodable bytes become lone surrogates. Raises
    `DataError` if the text is not JSON, because there is no telling where the next value would begin.
    """
    codec = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    decoder = json.JSONDecoder()
    text, at, number, ended, in_array = "", 0, 1, False, False

    def skip_space() -> str:
        """Go to the next character that is not space and return it; empty at the end of the file."""
        nonlocal text, at, ended
        while True:
            while at < len(text) and text[at] in _SPACE:
                at += 1
            if at < len(text) or ended:
                return text[at : at + 1]
            data = file.read(_READ_BYTES)
            text, at, ended = codec.decode(data, final=not data), 0, not data

    def damaged(what: str) -> DataError:
        return DataError(f"{name}: not JSON at record {number} ({what}); mend it, or write one object a line")

    if skip_space() == "[":
        in_array, at = True, at + 1
    while True:
        following = skip_space()
        if in_array and following == "]":
            at += 1
            if skip_space():
                raise damaged("there is more after the array")
            return
        if not following:
            if in_array:
                raise damaged("the array does not end")
            return
        if in_array and number > 1:
            if following != ",":
                raise damaged(f"{following!r} where a comma should be")
            at += 1
            skip_space()
        while True:
            try:
                _, end = decoder.raw_decode(text, at)
                if end < len(text) or ended:
                    break
            except (ValueError, RecursionError) as error:
                if ended:
                    raise damaged(str(error)) from error
            if len(text) - at > limit:
                raise DataError(
                    f"{name}: record {number} is longer than data.max_document_bytes={limit}; raise it, or write one "
                    "object a line"
                )
            data = file.read(max(_READ_BYTES, len(text) - at))
            text, at, ended = text[at:] + codec.decode(data, final=not data), 0, not data
        yield text[at:end]
        at, number = end, number + 1


class TextColumn:
    """The column of a `.parquet` that holds the text; `content.text` is the field `text` of the struct `content`.

    A list of messages in that column, or in a file without it, is a conversation. `problem` is what is wrong with every
    row, if there is no such column or it holds something else. `columns` are those to read (None for all), `kind` is
    what the text's column holds. Raises `DataError` if there are two columns of that name.
    """

    problem: Problem | None = None
    kind = "parquet"

    def __init__(self, schema: Any, name: str, origin: str) -> None:
        import pyarrow
        import pyarrow.compute
        from pyarrow import types

        self._pyarrow = pyarrow
        if name.partition(".")[0] not in schema.names:
            name = next((other for other in FIELDS if _holds_objects(schema, other)), name)
        self.column = name
        self._metadata = [other for other in METADATA if other != name and schema.names.count(other) == 1]
        self.columns: list[str] | None = [name, *self._metadata]
        self._path = [name] if name in schema.names else name.split(".")
        if schema.names.count(self._path[0]) > 1:
            raise DataError(
                f"{origin}: {schema.names.count(self._path[0])} columns are named {self._path[0]!r}; rename all but one"
            )
        kind: Any = None
        fields = schema
        for part in self._path:
            at = fields.get_field_index(part) if fields is not None else -1
            if at < 0:
                has = ", ".join(_paths(schema))
                self.problem = Problem("no_field", f"no column {name!r} (it has {has})", "set data.text_column")
                self.columns = None
                return
            kind = fields.field(at).type
            fields = kind if types.is_struct(kind) else None
        if _holds_objects(schema, name):
            self.kind = "conversation"
            beginnings = [other for other in BEGINNINGS if other != name and schema.names.count(other) == 1]
            self.columns = [name, *beginnings, *self._metadata]
            return
        text = kind.value_type if types.is_dictionary(kind) else kind
        known = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
        if not any(getattr(types, f"is_{known_kind}")(text) for known_kind in known):
            self.problem = Problem("not_text", f"column {name!r} is {kind}, not text", "set data.text_column")
            self.columns = None

    def rows(self, batch: Any) -> list[tuple[str | bytes | Problem, Any, dict[str, Any]]]:
        """Return each row of a record batch: its text or what is wrong with it, the row if known, its metadata."""
        if self.problem:
            return [(self.problem, row, {}) for row in batch.to_pylist()]
        metadata = batch.select(self._metadata).to_pylist() if self._metadata else [{}] * batch.num_rows
        null = Problem("null", f"no text under {self.column!r}: it is null")
        if self.kind == "conversation":
            rows = batch.to_pylist()
            texts = [null if row[self.column] is None else render(row[self.column], row) for row in rows]
            return list(zip(texts, rows, metadata, strict=True))
        return [
            (null if text is None else text, None, about)
            for text, about in zip(self._texts(batch), metadata, strict=True)
        ]

    def _texts(self, batch: Any) -> list[bytes | None]:
        """Return the texts of a record batch, None for a null."""
        column = batch.column(self._path[0])
        for part in self._path[1:]:
            column = self._pyarrow.compute.struct_field(column, part)
        if self._pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if self._pyarrow.types.is_null(column.type):
            return [None] * len(column)
        values: list[Any] = column.to_pylist() if _is_view(column.type) else column.cast("large_binary").to_pylist()
        return [value.encode(errors="surrogatepass") if isinstance(value, str) else value for value in values]


def _holds_objects(schema: Any, name: str) -> bool:
    """Return whether a column holds lists of objects."""
    from pyarrow import types

    if schema.names.count(name) != 1:
        return False
    kind = schema.field(name).type
    return bool((types.is_list(kind) or types.is_large_list(kind)) and types.is_struct(kind.value_type))


def _is_view(kind: Any) -> bool:
    return str(kind).endswith("_view")


def _paths(schema: Any) -> Iterator[str]:
    """Yield the names of all columns, and of the fields of structs."""
    for field in schema:
        yield field.name
        if str(field.type).startswith("struct<"):
            yield from (f"{field.name}.{inner.name}" for inner in field.type)
