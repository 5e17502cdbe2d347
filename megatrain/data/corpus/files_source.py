"""Files as a corpus: text, HTML, JSON, Parquet, compressed or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import xxhash

from megatrain.config import DataConfig
from megatrain.config.data_config import CHAT_KINDS
from megatrain.data.corpus.code import FOLDERS_OF_OTHERS, find_license_files, read_licenses
from megatrain.data.corpus.compressed import ERRORS, archive_kind, opened, without_suffix
from megatrain.data.corpus.file_formats import TextColumn, json_values, starts_with_a_line
from megatrain.data.corpus.file_kinds import KNOWN, KNOWN_CODE, KNOWN_JSON, kind_of, programming_language
from megatrain.data.corpus.file_search import find_paths
from megatrain.data.corpus.record import Problem, Record
from megatrain.data.corpus.shard import SHARD_BYTES, Shard, cut_file, group_files, look, stamp
from megatrain.data.corpus.source import Source, require_library
from megatrain.data.corpus.threads import is_comment, is_message, join_messages, join_threads
from megatrain.data.corpus.warc import read_warc
from megatrain.data.corpus.wikipedia import read_dump
from megatrain.errors import ConfigError, DataError

_HEAD_BYTES = 512  # of a file, by which an archive is recognised
_LOOKED_AT = 100  # files, for comments that could be joined
_JOINED = ("lines", "json")  # kinds of files whose records can be joined to threads
_LISTED = 8  # suffixes of files that are left out, in the note


class FilesSource(Source):
    """Files that `data.paths` matches, sorted by path; `file_kinds.py` says by their names what they hold.

    A document is a file of text, HTML or source code, a line of `.jsonl` or `.ndjson`, a row of `.parquet`, a page of a
    WARC or of a Wikipedia dump. A `.json` has lines like a `.jsonl`, or is one array of objects, or one object.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.files, self.left_out = find_paths(
            config.paths,
            self._is_read,
            KNOWN_JSON if config.kind in CHAT_KINDS else KNOWN_CODE if config.kind == "code" else KNOWN,
        )
        folders = [Path(path).expanduser() for path in config.paths]
        self._folders = {folder for folder in folders if folder.is_dir()}
        self._licenses: dict[Path, tuple[list[Path], str | None]] = {}
        kinds = {self._kind(path) for path in self.files}
        for kind, library in (("html", "resiliparse"), ("warc", "resiliparse"), ("wikipedia", "mwparserfromhell")):
            if kind in kinds:
                require_library(library, f"reading {kind}", "corpus")
        if config.join_comments and not kinds & set(_JOINED):
            raise ConfigError(
                "data.join_comments=true joins the records of .jsonl, .ndjson and .json files, and data.paths has none "
                "of them; leave it out"
                + ("; rows of .parquet can be converted to .jsonl" if "parquet" in kinds else "")
            )
        self.total_bytes = sum(look(path).st_size for path in self.files)
        self.identity = {
            "kind": config.kind,
            "files": len(self.files),
            "bytes": self.total_bytes,
            "listing": _listing_hash(self.files),
        }

    def _kind(self, path: Path) -> str | None:
        """Return the kind of a file by its name: `code` for all that `data=code` reads, JSON alone for messages."""
        if self.config.kind == "code":
            return "code" if programming_language(path.name) or kind_of(path.name) == "html" else None
        kind = kind_of(path.name)
        return kind if kind in ("lines", "json") or self.config.kind not in CHAT_KINDS else None

    def _is_read(self, path: Path) -> bool:
        kind = self._kind(path)
        return kind is not None and not (kind == "code" and set(path.parts) & set(FOLDERS_OF_OTHERS))

    def notes(self) -> Iterator[str]:
        """Yield how many files of the folders are not read, and whether comments could be joined."""
        if self.left_out:
            listed = [f"{suffix} {count:,}" for suffix, count in self.left_out.most_common(_LISTED)]
            more = ", ..." if len(self.left_out) > _LISTED else ""
            yield f"data.paths: {self.left_out.total():,} files of other kinds are not read ({', '.join(listed)}{more})"
        if self.config.join_comments and (path := next((p for p in self.files if self._kind(p) == "parquet"), None)):
            yield (
                f"{path}: data.join_comments=true joins no rows of .parquet, which are documents of their own; convert "
                "them to .jsonl to have them joined"
            )
        joins = self.config.join_comments or self.config.kind in CHAT_KINDS
        if not joins and (path := next(filter(self._has_comments, self.files[:_LOOKED_AT]), None)):
            yield (
                f"{path}: its records answer one another (parent_id) and are documents of their own; "
                "data.join_comments=true joins them into threads"
            )

    def _has_comments(self, path: Path) -> bool:
        """Return whether a file begins with a record of JSON that is a comment."""
        first = self._first(path)
        return first is not None and is_comment(first)

    def _first(self, path: Path) -> Record | None:
        """Return the first record of a file of JSON, None if there is none or it cannot be read."""
        if self._kind(path) not in _JOINED:
            return None
        try:
            with open(path, "rb", buffering=2**20) as raw, opened(path, raw) as file:
                return next(self._records(path, file), None)
        except (*ERRORS, OSError, DataError):
            return None  # reading it says what is wrong

    def shards(self) -> Iterator[Shard]:
        """Yield groups of small files, and ranges of large ones that can be cut."""
        for shard in self._cut():
            licenses = {path for file in map(Path, shard.paths) for path in self._license(file)[0]}
            yield replace(shard, stamps=(*shard.stamps, *map(stamp, sorted(licenses))))

    def _cut(self) -> Iterator[Shard]:
        group: list[tuple[Path, int]] = []
        for path in self.files:
            size = look(path).st_size
            if size > SHARD_BYTES and not self._is_joined(path) and (ends := _ends(path, size)):
                yield from group_files(group)
                group = []
                yield from cut_file(path, ends)
            else:
                group.append((path, size))
        yield from group_files(group)

    def _is_joined(self, path: Path) -> bool:
        """Return whether the records of a file are joined to threads, so that it is not cut."""
        if self.config.kind == "chat":
            first = self._first(path)
            return first is not None and is_message(first)
        return self.config.join_comments and self._kind(path) in _JOINED

    def _license(self, path: Path) -> tuple[list[Path], str | None]:
        """Return the files with the licence of a file of code, and the licence; none for another file."""
        if self._kind(path) != "code":
            return [], None
        return self._license_of_folder(path.parent)

    def _license_of_folder(self, folder: Path) -> tuple[list[Path], str | None]:
        """Return the licence files of the nearest folder that has any, up to one of `data.paths`; list each once."""
        if folder not in self._licenses:
            files = find_license_files(folder)
            if files or folder in self._folders or self._folders.isdisjoint(folder.parents):
                self._licenses[folder] = files, read_licenses(files)
            else:
                self._licenses[folder] = self._license_of_folder(folder.parent)
        return self._licenses[folder]

    def read(self, shard: Shard) -> Iterator[Record]:
        """Yield the documents of each file in turn. Raises `DataError` if a file is damaged or cannot be read."""
        for path, listed in zip(map(Path, shard.paths), shard.stamps, strict=False):  # licences have stamps as well
            before = self.progress.bytes
            last = None
            _check_unchanged(path, listed)
            size = look(path).st_size
            try:
                for number, record in enumerate(self._read(path, shard.start, shard.stop), start=1):
                    last = record.where
                    yield record.within(str(path), shard.start, number)
                    if self.progress.bytes - before > size:
                        break  # something writes to it, maybe without end
            except ERRORS as error:
                raise _damaged(path, error, last) from error
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
            _check_unchanged(path, listed)
            if shard.stop is None and not shard.start:
                self.progress.bytes = before + size

    def _read(self, path: Path, start: int, stop: int | None) -> Iterator[Record]:
        kind = self._kind(path)
        assert kind
        if kind == "parquet":
            yield from self._parquet(path, start, stop)
            return
        if start or stop is not None:
            yield from self._range_of_lines(path, start, stop)
            return
        before = self.progress.bytes
        with open(path, "rb", buffering=2**20) as raw, opened(path, raw) as file:
            for record in self._documents(path, file, kind):
                yield record
                self.progress.bytes = before + raw.tell()

    def _documents(self, path: Path, file: BinaryIO, kind: str) -> Iterator[Record]:
        """Yield the documents of an open file."""
        if kind in ("text", "html"):
            return self.whole_file(file, path, kind=kind, markup=kind == "html")
        if kind == "code":
            language = programming_language(path.name) or "HTML"
            about = {"programming_language": language, "license": self._license(path)[1]}
            return self.whole_file(file, path, kind=kind, metadata=about)
        head: bytes = file.peek(_HEAD_BYTES)  # type: ignore[attr-defined]
        if archive := archive_kind(head):
            return iter([Record(b"", str(path), problem=Problem("archive", f"holds {archive}", "unpack it first"))])
        if kind in ("warc", "wikipedia"):
            return self._pages(path, file, read_warc if kind == "warc" else read_dump)
        records = self._records(path, file)
        return self._threads(path, records) if self._is_joined(path) else records

    def _records(self, path: Path, file: BinaryIO) -> Iterator[Record]:
        """Yield the records of an open file of JSON."""
        is_lines = self._kind(path) == "lines" or starts_with_a_line(file)
        return self._lines(path, file) if is_lines else self._values(path, file)

    def _pages(
        self, path: Path, file: BinaryIO, read: Callable[[BinaryIO, str, int], Iterator[Record]]
    ) -> Iterator[Record]:
        """Yield the pages of a WARC or WET file or of a dump."""
        for record in read(file, str(path), self.config.max_document_bytes):
            if record.oversized:
                self.too_long(record.where)
            yield record

    def _lines(self, path: Path, file: BinaryIO) -> Iterator[Record]:
        """Yield the lines of a `.jsonl`, with at most `data.max_document_bytes` in memory."""
        for number in itertools.count(1):
            line, too_long = self._line(file)
            if not line:
                return
            if too_long:
                yield self.too_long(f"{path}:{number}")
            elif line.strip():
                yield Record(line, f"{path}:{number}", kind="json")

    def _threads(self, path: Path, records: Iterator[Record]) -> Iterator[Record]:
        """Yield the threads of a file's comments, or the conversations of its messages."""
        join = join_messages if self.config.kind == "chat" else join_threads
        for record in join(records, str(path), self.config.max_thread_bytes):
            yield record if len(record.payload) <= self.config.max_document_bytes else self.too_long(record.where)

    def _range_of_lines(self, path: Path, start: int, stop: int | None) -> Iterator[Record]:
        """Yield the lines that begin in bytes `[start, stop)` of a `.jsonl`.

        Only from the start of the file on are their numbers known; others are named by their first byte.
        """
        before = self.progress.bytes
        with open(path, "rb", buffering=2**20) as file:
            if start:
                file.seek(start - 1)
                while not (file.readline(2**20) or b"\n").endswith(b"\n"):
                    pass
            at = file.tell()
            for number in itertools.count(1):
                if stop is not None and at >= stop:
                    return
                line, too_long = self._line(file)
                if not line:
                    return
                where = f"{path}, byte {at}" if start else f"{path}:{number}"
                if too_long:
                    yield self.too_long(where)
                elif line.strip():
                    yield Record(line, where, kind="json")
                at = file.tell()
                self.progress.bytes = before + at - start

    def _line(self, file: BinaryIO) -> tuple[bytes, bool]:
        """Return a line (the beginning of one that is too long), and whether it is too long."""
        limit = self.config.max_document_bytes
        line = rest = file.readline(limit + 2)
        too_long = len(line.rstrip(b"\r\n")) > limit
        while too_long and rest and not rest.endswith(b"\n"):
            rest = file.readline(2**20)
        return line, too_long

    def _values(self, path: Path, file: BinaryIO) -> Iterator[Record]:
        """Yield the objects of a `.json` that is not one object a line."""
        for number, text in enumerate(json_values(file, str(path), self.config.max_document_bytes), start=1):
            yield Record(text, f"{path}, record {number}", kind="json")

    def _parquet(self, path: Path, start: int, stop: int | None) -> Iterator[Record]:
        """Yield the rows of row groups `[start, stop)`."""
        pyarrow = require_library("pyarrow", ".parquet")
        import pyarrow.parquet as parquet

        before = self.progress.bytes
        try:
            with parquet.ParquetFile(path) as file:
                column = TextColumn(file.schema_arrow, self.config.text_column, str(path))
                groups = range(start, file.num_row_groups if stop is None else stop)
                row = sum(file.metadata.row_group(group).num_rows for group in range(start))
                rows = max(file.metadata.num_rows, 1)
                for batch in file.iter_batches(64, row_groups=groups, columns=column.columns):
                    for value, whole, metadata in column.rows(batch):
                        row += 1
                        yield from self.field(value, f"{path}:{row}", whole, column.kind, metadata)
                    if not start:
                        self.progress.bytes = before + path.stat().st_size * row // rows
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise DataError(f"{path}: cut short or damaged ({error}); download it again") from error


def _check_unchanged(path: Path, listed: str) -> None:
    """Raise `DataError` if a file is not what was listed: its documents would be counted as those of another one."""
    if stamp(path) != listed:
        raise DataError(
            f"{path}: changed since the files were listed; prepare again when nothing writes to it any more"
        )


def _damaged(path: Path, error: BaseException, last: str | None) -> DataError:
    after = f"; the last whole record: {last}" if last else ""
    return DataError(f"{path}: cut short or damaged ({error}{after}); download or compress it again")


def _listing_hash(files: list[Path]) -> str:
    """Return the xxh3-128 of all names, sizes and modification times, which detects edits without reading the files."""
    digest = xxhash.xxh3_128()
    for path in files:
        digest.update(f"{stamp(path)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _ends(path: Path, size: int) -> list[tuple[int, int]]:
    """Return where a large file can be cut: each end, and the bytes stored up to it; empty if it cannot be."""
    if kind_of(path.name) == "lines" and without_suffix(path.name) == path.name.lower():
        return [(min(end, size), min(end, size)) for end in range(SHARD_BYTES, size + SHARD_BYTES, SHARD_BYTES)]
    if kind_of(path.name) != "parquet":
        return []
    pyarrow = require_library("pyarrow", ".parquet")
    import pyarrow.parquet as parquet

    ends: list[tuple[int, int]] = []
    stored = 0
    try:
        metadata = parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError):
        return []  # reading it says what is wrong
    groups = metadata.num_row_groups
    for group in range(groups):
        columns = metadata.row_group(group)
        stored += sum(columns.column(at).total_compressed_size for at in range(columns.num_columns))
        if stored - (ends[-1][1] if ends else 0) >= SHARD_BYTES or group == groups - 1:
            ends.append((group + 1, stored))
    return ends
