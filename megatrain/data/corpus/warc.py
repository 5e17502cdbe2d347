"""Read WARC and WET files record by record, in bounded memory, and notice where they are cut short.

Pages are what `response` records of HTML or plain text hold, and `resource` and `conversion` records (WET). What else a
crawl has is left out: images and the like, answers that are no success, and pages in several segments. Parsed here, not
by a library, because those that there are take a file that is cut short for one that ends.
ISO 28500: https://iipc.github.io/warc-specifications/specifications/warc-format/warc-1.1/
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from megatrain.data.corpus.record import Problem, Record

_VERSION = re.compile(rb"WARC/\d+\.\d+\r?\n")
_MAX_HEADER_BYTES = 2**20
_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,16})[ \t]*(?:;[^\r\n]*)?\r?\n")
_CUT_CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,16}[ \t]*(?:;[^\r\n]*)?\r?")
_LINE_END = re.compile(rb"\r?\n")
_SKIP_BYTES = 2**20
_PAGES = ("response", "resource", "conversion")
_CONTINUATION = "continuation"
_JOINED = ("content-encoding", "transfer-encoding")  # fields whose lines are one list; of others the first counts
_UNKNOWN = ("br", "zstd", "compress", "x-compress", "dcb", "dcz")
"""Content-Encodings that cannot be undone here. Other names, such as utf-8, are mistakes and mean nothing."""
_HTML = ("text/html", "application/xhtml+xml")


class WarcError(EOFError):
    """A WARC file that is damaged or cut short; the message has the number of the record."""


@dataclass
class _Page:
    """What a record says of its page: the media type, what the server said of the encoding, and its body."""

    media_type: str
    charset: str | None = None
    codings: list[str] = field(default_factory=list)
    body: bytes = b""
    reason: str | None = None  # why it is left out
    problem: Problem | None = None


def read_warc(file: BinaryIO, name: str, limit: int) -> Iterator[Record]:
    """Yield the pages of a WARC file. `oversized` are those of more than `limit` bytes, before or after decompression.

    Raises `WarcError` if the file is damaged, cut short or has no record.
    """
    number = 0
    while headers := _headers(file, number + 1):
        number += 1
        where = f"record {number}"
        length = headers.get("content-length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            what = f"the Content-Length {length[:40]!r}, which is no number of bytes" if length else "no Content-Length"
            raise WarcError(f"{where} has {what}")
        size, kind = int(length), headers.get("warc-type", "").lower()
        content = b"" if kind not in _PAGES else file.read(min(size, limit + _MAX_HEADER_BYTES))
        _skip(file, size - len(content), where)
        if kind in (*_PAGES, _CONTINUATION):
            yield _record(kind, headers, content, f"{name}, {where}", limit)
        _end(file, where)
    if not number:
        raise WarcError("it has no WARC record")


def _headers(file: BinaryIO, number: int) -> dict[str, str] | None:
    """Read the header lines of the next record; None at the end of the file."""
    while (line := file.readline(_MAX_HEADER_BYTES)) in (b"\r\n", b"\n"):
        pass
    if not line:
        return None
    if not _VERSION.fullmatch(line):
        if line.endswith(b"\n"):
            raise WarcError(f"no WARC record where record {number} should begin")
        raise WarcError(f"it ends where record {number} begins")
    block, size = [], 0
    while (line := file.readline(_MAX_HEADER_BYTES)).strip():
        size += len(line)
        if size > _MAX_HEADER_BYTES:
            raise WarcError(f"record {number} has more than {_MAX_HEADER_BYTES} bytes of headers")
        block.append(line)
    if not line.endswith(b"\n"):
        raise WarcError(f"it ends inside of the headers of record {number}")
    return _fields(b"".join(block))


def _fields(block: bytes) -> dict[str, str]:
    """Parse header lines, the names in lower case; a line that begins with space goes on with the one before."""
    found: dict[str, str] = {}
    for line in re.sub(rb"\r?\n[ \t]+", b" ", block).decode(errors="replace").split("\n"):
        name, colon, value = line.partition(":")
        if colon:
            name, value = name.strip().lower(), value.strip()
            if name in found and name in _JOINED:
                value = f"{found[name]}, {value}"
            elif name in found:
                continue
            found[name] = value
    return found


def _skip(file: BinaryIO, size: int, where: str) -> None:
    while size:
        read = len(file.read(min(size, _SKIP_BYTES)))
        if not read:
            raise WarcError(f"it ends inside of {where}")
        size -= read


def _end(file: BinaryIO, where: str) -> None:
    """Read the two empty lines after a record."""
    for _ in range(2):
        line = file.readline(3)
        if line not in (b"\r\n", b"\n"):
            what = "bytes follow its length" if line.strip() else "the lines that end it are missing"
            raise WarcError(f"{where} is damaged or the file is cut short there ({what})")


def _record(kind: str, headers: dict[str, str], content: bytes, where: str, limit: int) -> Record:
    """Return the page of a record, or why it is none."""
    url = headers.get("warc-target-uri", "").strip("<>")
    metadata: dict[str, Any] = {"url": url, "date": headers.get("warc-date")}
    identity = headers.get("warc-record-id", "").strip("<>") or url or None
    about: dict[str, Any] = {"kind": "warc", "id": identity, "metadata": metadata}
    if kind == _CONTINUATION or "warc-segment-number" in headers:
        return Record(b"", where, left_out="segment", **about)
    page = _page(kind, headers, content)
    if page.reason:
        return Record(b"", where, left_out=page.reason, **about)
    if len(content) == limit + _MAX_HEADER_BYTES:
        return Record(b"", where, oversized=True, **about)
    body, problem = page.body, page.problem
    for coding in reversed(page.codings) if not problem else ():
        decoded = _decompressed(body, coding, limit)
        if isinstance(decoded, Problem):
            problem = decoded
            break
        body = decoded
    if problem and headers.get("warc-truncated"):  # by the crawler, which says so
        return Record(b"", where, left_out="truncated", **about)
    if problem:
        return Record(body, where, problem=problem, **about)
    if len(body) > limit:
        return Record(b"", where, oversized=True, **about)
    return Record(body, where, markup=page.media_type in _HTML, charset=page.charset, **about)


def _page(kind: str, headers: dict[str, str], content: bytes) -> _Page:
    if kind != "response":
        page = _Page(*_media_type(headers.get("content-type", "text/plain")), body=content)
    else:
        head, _, body = _partition(content)
        status, _, lines = head.partition(b"\n")
        if not status.startswith(b"HTTP/"):  # such as an answer of the DNS
            return _Page("", reason="no_page")
        code = status.split()[1:2]
        http = _fields(lines)
        page = _Page(*_media_type(http.get("content-type", "")), body=body)
        if code and not code[0].startswith(b"2"):
            page.reason = "http_status"
        listed = [http.get(name, "").lower().split(",") for name in _JOINED]  # the transfer is encoded last
        page.codings = [coding.strip() for codings in listed for coding in codings]
        if "chunked" in page.codings:  # some servers name it as a Content-Encoding
            page.codings = [coding for coding in page.codings if coding != "chunked"]
            dechunked = _dechunked(body)
            if isinstance(dechunked, Problem):
                page.problem = dechunked
            else:
                page.body = dechunked
    if not page.reason and page.media_type not in (*_HTML, "text/plain"):
        page.reason = "no_page"
    return page


def _partition(content: bytes) -> tuple[bytes, bytes, bytes]:
    match = re.search(rb"\r?\n\r?\n", content)
    return (content, b"", b"") if match is None else (content[: match.start()], b"\n", content[match.end() :])


def _media_type(value: str) -> tuple[str, str | None]:
    """Return the media type and the charset of a Content-Type."""
    kind, _, parameters = value.partition(";")
    charset = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", parameters, re.IGNORECASE)
    return kind.strip().lower(), charset[1] if charset else None


def _dechunked(body: bytes) -> bytes | Problem:
    """Join the chunks of a body; one that does not begin with a chunk is what a crawler that joined them has left."""
    parts: list[bytes] = []
    at = 0
    while match := _CHUNK_SIZE.match(body, at):
        size, start = int(match[1], 16), match.end()
        if size == 0:
            return b"".join(parts)
        if body[start + size : start + size + 2] in (b"", b"\r"):
            return Problem("encoding", "a chunked body that ends early")
        if not (end := _LINE_END.match(body, start + size)):
            break
        parts.append(body[start : start + size])
        at = end.end()
    if at == 0:
        return body
    ended = at == len(body) or _CUT_CHUNK_SIZE.fullmatch(body, at)
    return Problem("encoding", "a chunked body that ends early" if ended else f"a damaged chunk {len(parts) + 1}")


def _decompressed(body: bytes, coding: str, limit: int) -> bytes | Problem:
    """Undo a Content-Encoding. A crawler may have undone it and left the header; more than `limit` bytes are cut."""
    if not body:
        return body
    if coding in ("gzip", "x-gzip", "deflate"):
        if "gzip" in coding and not body.startswith(b"\x1f\x8b"):
            return body
        for window in (47, -15) if coding == "deflate" else (47,):
            try:
                whole = _inflated(body, window, limit)
            except zlib.error:
                continue
            return Problem("encoding", f"a {coding} body that ends early") if whole is None else whole
        return body if coding == "deflate" else Problem("encoding", "a damaged gzip body")
    if coding not in _UNKNOWN or b"<" in body[:100]:
        return body
    return Problem("encoding", f"a body in the Content-Encoding {coding}", "leave it out")


def _inflated(body: bytes, window: int, limit: int) -> bytes | None:
    """Decompress all members of a body, up to `limit` + 1 bytes; None if it ends early. Raises `zlib.error`."""
    parts, left = [], limit + 1
    while left > 0:
        decompressor = zlib.decompressobj(window)
        parts.append(decompressor.decompress(body, left))
        left -= len(parts[-1])
        if left > 0 and not decompressor.eof:
            return None
        body = decompressor.unused_data
        if not body.startswith(b"\x1f\x8b"):  # what follows the last member is no text
            break
    return b"".join(parts)
