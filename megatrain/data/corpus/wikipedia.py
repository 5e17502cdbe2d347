"""Read the pages of a MediaWiki dump (`pages-articles.xml`), in bounded memory, and turn their wikitext into text.

Parsed with the standard library's expat: of a page only what is wanted is kept, entities cannot be defined, and an XML
that is cut short is an error.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from xml.parsers import expat

from megatrain.data.corpus.record import Problem, Record
from megatrain.data.corpus.wikitext_cost import what_is_too_slow

_READ_BYTES = 2**16
_KEPT = ("title", "ns", "id", "timestamp", "text")
_TAGS = ("ref", "table", "gallery", "timeline", "math", "imagemap")
"""Tags that are removed with what they hold."""
_REMOVED = ("6", "14")  # the numbers of the namespaces whose links are no text: files and categories
_ALIASES = (  # that every wiki knows, and those that <siteinfo> does not name
    *("file", "image", "category", "bild", "imagen", "immagine", "imagem", "изображение", "画像", "afbeelding"),
    *("grafika", "文件", "檔案", "档案", "图像", "圖像", "图片", "圖片", "分类", "分類"),
)
_LANGUAGE = re.compile(r"(?:[a-z]{2,3}(?:-[a-z]+)*|simple):\S")
"""A link to the same page in another language, which a page does not show within its text."""
_REDIRECT = re.compile(r"\s*#redirect(?:ion)?\s*:?\s*\[\[[^\[\]\n]+\]\]", re.IGNORECASE)
_OTHER_REDIRECT = re.compile(r"\s*#[^\s#*:;\[\]{}<>][^\n#\[\]{}<>]{0,40}\[\[[^\[\]\n]+\]\]")
"""A redirect in another language, of which every wiki has its own words. A page that is one has no other text."""
_NO_TEXT = re.compile(r"\[\[[^\[\]]*\]\]|\{\{[^{}]*\}\}|<!--.*?-->", re.DOTALL)


class _DefinesEntitiesError(Exception):
    pass


class DumpError(EOFError):
    """A dump that is damaged or cut short; the message has its line."""


@dataclass
class _Page:
    fields: dict[str, list[str]] = field(default_factory=dict)
    size: int = 0
    redirect: bool = False

    def get(self, name: str) -> str:
        return "".join(self.fields.get(name, []))


class _Reader:
    """Collects whole pages from expat's events. Of several revisions the last counts."""

    def __init__(self, limit: int) -> None:
        self.pages: deque[_Page] = deque()
        self.root: str | None = None
        self.namespaces: list[str] = []
        self._limit = limit
        self._path: list[str] = []
        self._page: _Page | None = None
        self._into: list[str] | None = None
        self._name: list[str] = []
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters
        self.parser.EntityDeclHandler = self._entity

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        name = name.rpartition(":")[2]
        self.root = self.root or name
        self._path.append(name)
        inside = self._path[1:]
        if inside == ["page"]:
            self._page = _Page()
        elif inside == ["siteinfo", "namespaces", "namespace"] and attributes.get("key") in _REMOVED:
            self._into = self._name
        elif self._page and inside == ["page", "redirect"]:
            self._page.redirect = True
        elif self._page and name in _KEPT and inside[:-1] in (["page"], ["page", "revision"]):
            if name == "id" and inside[:-1] != ["page"]:  # of a revision
                return
            self._into = self._page.fields[name] = []
            if name == "text":
                self._page.size = 0

    def _end(self, name: str) -> None:
        self._path.pop()
        if self._into is self._name and self._name:
            self.namespaces.append("".join(self._name))
            self._name = []
        self._into = None
        if self._page and len(self._path) == 1:
            self.pages.append(self._page)
            self._page = None

    def _characters(self, text: str) -> None:
        if self._into is None:
            return
        if self._page is None:
            self._into.append(text)
            return
        self._page.size += len(text)
        if self._page.size <= self._limit:
            self._into.append(text)

    def _entity(self, *_: Any) -> None:
        raise _DefinesEntitiesError


def read_dump(file: BinaryIO, name: str, limit: int) -> Iterator[Record]:
    """Yield the articles of a dump: pages of namespace 0 that are no redirects; redirects and others are left out.

    A page of more than `limit` characters is oversized. An XML that is no dump is one bad record. Raises `DumpError` if
    the file is damaged or cut short.
    """
    reader = _Reader(limit)
    ended = False
    while not ended:
        data = file.read(_READ_BYTES)
        ended = not data
        try:
            reader.parser.Parse(data, ended)
        except expat.ExpatError as error:
            if reader.root == "mediawiki" or ended:
                raise DumpError(str(error)) from error
            yield _no_dump(name, str(error))
            return
        except _DefinesEntitiesError:
            yield _no_dump(name, "it defines entities, which no dump does")
            return
        if reader.root not in (None, "mediawiki"):
            yield _no_dump(name, f"its root is <{reader.root}>")
            return
        while reader.pages:
            yield _record(reader.pages.popleft(), name, limit, tuple(reader.namespaces))


def _no_dump(name: str, what: str) -> Record:
    problem = Problem("not_a_dump", f"not a MediaWiki dump ({what})", "leave the file out")
    return Record(b"", name, problem=problem)


def _record(page: _Page, name: str, limit: int, namespaces: tuple[str, ...]) -> Record:
    title = page.get("title")
    where = f"{name}, page {title!r}"
    about: dict[str, Any] = {"kind": "wikipedia", "id": page.get("id") or title}
    about["metadata"] = {"title": title, "date": page.get("timestamp")}
    if page.get("ns") not in ("", "0"):
        return Record("", where, left_out="other_namespace", **about)
    if page.redirect:
        return Record("", where, left_out="redirect", **about)
    if page.size > limit:
        return Record("", where, oversized=True, **about)
    text = page.get("text")
    if is_redirect(text):
        return Record("", where, left_out="redirect", **about)
    return Record(text, where, namespaces=namespaces, **about)


def is_redirect(text: str) -> bool:
    """Return whether a page's wikitext is a redirect, in any language; older dumps say so nowhere else."""
    if _REDIRECT.match(text):
        return True
    other = _OTHER_REDIRECT.match(text)
    return other is not None and not _NO_TEXT.sub("", text[other.end() :]).strip()


def wikitext_to_text(source: str, namespaces: Iterable[str] = ()) -> str | Problem:
    """Return the text of a page: without templates, tables, references, files, categories and links' targets.

    `namespaces` are the wiki's own names for files and categories. A page that the parser cannot read is a problem.
    """
    import mwparserfromhell

    if reason := what_is_too_slow(source):
        return Problem("wikitext", reason)
    try:
        return _text(source, {*_ALIASES, *(name.lower() for name in namespaces)})
    except RecursionError:
        return Problem("wikitext", "templates or tags are nested too deeply")
    except mwparserfromhell.parser.ParserError as error:
        return Problem("wikitext", f"the wikitext cannot be parsed ({error})")


def _text(source: str, removed: set[str]) -> str:
    """Return the text of wikitext; `removed` are the names, in small letters, of files and categories."""
    import mwparserfromhell

    code = mwparserfromhell.parse(source)
    for tag in list(code.ifilter_tags(matches=lambda node: str(node.tag).strip().lower() in _TAGS)):
        _remove(code, tag)
    for link in list(code.ifilter_wikilinks()):
        title = str(link.title).strip()
        if title.partition(":")[0].strip().replace("_", " ").lower() in removed or (
            link.text is None and _LANGUAGE.match(title)
        ):
            _remove(code, link)
        elif link.text is None and title.startswith(":"):  # shown as a link, without the colon
            link.title = title.removeprefix(":")
    text = str(code.strip_code(normalize=True, collapse=True))
    text = re.sub(r"__[A-Z]{3,}__", "", text)
    text = re.sub(r"[ \t]*\n[ \t]*", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _remove(code: Any, node: Any) -> None:
    with suppress(ValueError):  # it was inside of one that is removed
        code.remove(node)
