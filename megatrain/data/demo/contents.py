"""Write the text of packages as raw files of the kinds that corpora come in: text, HTML, WARC, JSONL, source code.

Each function takes an open package and an empty folder. What it writes depends on the package alone, and the names of
the files are made here or checked. Nothing of a package is imported or run.
"""

from __future__ import annotations

import ast
import gzip
import html
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from megatrain.data.demo.packages import Archive
from megatrain.errors import DataError

_PAGE_BYTES = 16_384
"""Size from which a page of documentation is full."""


def copy_files(archive: Archive, folder: Path, pattern: str, without: str = "/tests/") -> None:
    """Copy the files whose names match, under their names, and the package's licence beside them."""
    for name in archive.names(pattern):
        if without not in name:
            _write(folder / name, archive.read(name))
    licenses = b"\n".join(archive.read(name) for name in archive.names("*.dist-info/*LICENSE*"))
    if licenses:
        _write(folder / "LICENSE", licenses)


def write_chapters(archive: Archive, folder: Path, module: str) -> None:
    """Write a pythonbible edition as JSONL, a chapter a line.

    Its module has a call with the whole text, and the places where each verse starts and ends in it. Verse 1002003 is
    the third verse of the second chapter of the first book.
    """
    calls = [node for node in ast.walk(ast.parse(archive.read(module))) if isinstance(node, ast.Call)]
    text, starts, ends = map(ast.literal_eval, max(calls, key=lambda call: len(call.args)).args[1:4])
    chapters: dict[int, list[int]] = {}
    for verse in sorted(starts):
        chapters.setdefault(verse // 1000, []).append(verse)
    records = (
        {"id": f"{chapter // 1000}:{chapter % 1000}", "text": text[starts[verses[0]] : ends[verses[-1]]]}
        for chapter, verses in chapters.items()
    )
    _write_lines(folder / f"{Path(module).parts[0]}.jsonl", records)


def write_conversations(archive: Archive, folder: Path, pattern: str) -> None:
    """Write the conversations of chatterbot-corpus as JSONL of messages, one file a language."""
    import yaml

    found: dict[str, list[dict[str, Any]]] = {}
    for name in archive.names(pattern):
        turns = yaml.safe_load(archive.read(name))["conversations"]
        for spoken in turns:
            messages = [
                {"role": ("user", "assistant")[at % 2], "content": str(said)} for at, said in enumerate(spoken) if said
            ]
            found.setdefault(Path(name).parent.name, []).append({"messages": messages})
    for language, conversations in found.items():
        _write_lines(folder / f"{language}.jsonl", conversations)


def write_poems(archive: Archive, folder: Path, patterns: list[str]) -> None:
    """Write the poems of chinese-poetry as JSONL, a poem a line: title, author, and the poem below them."""
    for name in chain.from_iterable(archive.names(pattern) for pattern in patterns):
        poems = json.loads(archive.read(name))
        records = []
        for poem in poems:
            heading = [poem[key] for key in ("title", "rhythmic", "author") if poem.get(key)]
            records.append({"id": str(poem.get("id", "")), "text": "\n".join([*heading, "", *poem["paragraphs"]])})
        _write_lines(folder / f"{Path(name).stem}.jsonl", records)


# ---------------------------------------------------------------------------------------------------- documentation


def write_warc(archive: Archive, folder: Path, services: list[str]) -> None:
    """Write botocore's documentation of each service as a WARC, as a crawl of its pages would have it: one a command.

    ISO 28500: https://iipc.github.io/warc-specifications/specifications/warc-format/warc-1.1/
    """
    for service in services:
        names = list(archive.names(f"botocore/data/{service}/*/service-2.json.gz"))
        if not names:
            raise DataError(f"botocore has no service {service}")
        model = json.loads(gzip.decompress(archive.read(names[-1])))
        with open(folder / f"{service}.warc.gz", "wb") as file:
            for command, page in _commands(model):
                body = _page(f"{service} {command}", page).encode()
                head = (
                    f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                record = _warc_record(f"https://documentation.example/{service}/{command}.html", head.encode() + body)
                file.write(gzip.compress(record, mtime=0))  # a member a record, as crawls are stored


def _commands(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each command's name and its documentation as HTML: what it does, and what its parameters mean."""
    shapes = model["shapes"]
    for command, operation in sorted(model["operations"].items()):
        parts = [operation.get("documentation") or ""]
        for side, title in (("input", "Parameters"), ("output", "Answer")):
            members = shapes.get(operation.get(side, {}).get("shape"), {}).get("members", {})
            said = [(name, member["documentation"]) for name, member in members.items() if member.get("documentation")]
            if said:
                parts += [f"<h2>{title}</h2>", *(f"<h3>{html.escape(name)}</h3>\n{text}" for name, text in said)]
        if parts[0]:
            yield command, "\n".join(parts)


def _warc_record(url: str, content: bytes) -> bytes:
    lines = [
        "WARC/1.0", "WARC-Type: response", "WARC-Date: 2026-11-30T00:00:00Z", f"WARC-Record-ID: <{url}>",
        f"WARC-Target-URI: {url}", "Content-Type: application/http; msgtype=response",
        f"Content-Length: {len(content)}",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content + b"\r\n\r\n"


_CLASS = re.compile(r'^class (\w+)\(AbstractModel\):\n\s+r?"""(.*?)"""', re.MULTILINE | re.DOTALL)
_PARAMETER = re.compile(r":param _?(\w+): (.*?)\n\s+:type", re.DOTALL)
_METHOD = re.compile(r'^    def (\w+)\(self, request\):\n\s+r?"""(.*?)\n\s+:param request:', re.MULTILINE | re.DOTALL)


def write_html_pages(archive: Archive, folder: Path, pattern: str) -> None:
    """Write the Chinese documentation in Tencent Cloud's client library as HTML pages.

    Its docstrings are HTML already. A description that many structures share is written once.
    """
    seen: set[str] = set()
    for name in archive.names(pattern):
        code = archive.read(name).decode("utf-8")
        service = "-".join(Path(name).parts[1:-1])
        sections = _structures(code, seen) if name.endswith("models.py") else _methods(code, seen)
        for number, page in enumerate(_filled(sections)):
            target = folder / service / f"{Path(name).stem}-{number:03d}.html"
            _write(target, _page(service, page, "zh").encode())


def _structures(code: str, seen: set[str]) -> Iterator[str]:
    """Yield a section for each structure that describes a parameter in new words."""
    starts = [*_CLASS.finditer(code)]
    for found, end in zip(starts, [*(later.start() for later in starts[1:]), len(code)], strict=True):
        parameters = [(name, text) for name, text in _PARAMETER.findall(code, found.end(), end) if text not in seen]
        seen.update(text for _, text in parameters)
        if parameters:
            listed = "\n".join(f"<h3>{name}</h3>\n<p>{text}</p>" for name, text in parameters)
            yield f"<h2>{html.escape(found[2].strip())}</h2>\n{listed}"


def _methods(code: str, seen: set[str]) -> Iterator[str]:
    for name, text in _METHOD.findall(code):
        if text not in seen:
            seen.add(text)
            yield f"<h2>{name}</h2>\n<p>{text.strip()}</p>"


def _filled(sections: Iterator[str]) -> Iterator[str]:
    """Yield sections joined to pages."""
    page: list[str] = []
    size = 0
    for section in sections:
        page.append(section)
        size += len(section.encode())
        if size >= _PAGE_BYTES:
            yield "\n".join(page)
            page, size = [], 0
    if page:
        yield "\n".join(page)


def _page(title: str, body: str, language: str = "en") -> str:
    """Return a web page around `body`, with the navigation and the footer that pages have."""
    return (
        f'<!DOCTYPE html>\n<html lang="{language}"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title></head>"
        '<body><nav><ul><li><a href="/">Home</a></li><li><a href="/index.html">Index</a></li></ul></nav>\n'
        f"<main><article><h1>{html.escape(title)}</h1>\n{body}\n</article></main>\n"
        "<footer>Terms of use · Privacy</footer></body></html>\n"
    )


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _write_lines(path: Path, records: Any) -> None:
    _write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
