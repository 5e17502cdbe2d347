"""Extract the text of HTML documents."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from megatrain.config import key
from megatrain.data.corpus.document import Document, Removal, Step
from megatrain.data.corpus.source import require_library
from megatrain.errors import ConfigError

_VALUE = r"""(?:\s*=\s*(?:"[^"]*"|'[^']*'|[^\s>"'][^\s>]*|["'][^\s>]*)?)?"""
_ATTRIBUTE = rf"[\s/]*[^\s/>][^\s/>=]*{_VALUE}"
_NAME = re.compile(rf"[\s/]*([^\s/>][^\s/>=]*){_VALUE}")


@dataclass(frozen=True)
class Html(Step):
    """Extract the text of documents that are HTML; other documents stay as they are.

    A page that is too large, nested too deeply, or that has an element with too many attributes is removed before it
    costs time or memory: extraction takes time quadratic in the depth and in an element's attributes. Browsers nest at
    most 512 elements.
    """

    name: ClassVar[str] = "html"
    extractor: str = key(
        "resiliparse",
        "library that extracts the text: resiliparse, or trafilatura, which is slower and keeps more of tables",
        choices=("resiliparse", "trafilatura"),
    )
    main_content: bool = key(True, "extract the main content alone, without navigation, headers and footers")
    favor_precision: bool = key(
        False, "trafilatura: rather leave text out than take what is no content, as FineWeb does"
    )
    max_bytes: int = key(8 * 2**20, "largest page to extract, in bytes of UTF-8", minimum=1)
    max_depth: int = key(512, "deepest nesting of elements to extract", minimum=1)
    max_attributes: int = key(1000, "most attributes of an element to extract", minimum=1, maximum=100_000)

    def __post_init__(self) -> None:
        require_library("resiliparse", "clean.steps: html", "corpus")
        require_library(self.extractor, f"clean.steps: html.extractor={self.extractor}", "corpus")
        if self.favor_precision and not (self.extractor == "trafilatura" and self.main_content):
            raise ConfigError(
                "clean.steps: html.favor_precision=true acts only with extractor: trafilatura and main_content: true"
            )

    def apply(self, document: Document) -> Removal | None:
        """Replace markup by its text."""
        if not document.markup:
            return None
        size = len(document.text.encode(errors="surrogatepass"))
        if size > self.max_bytes:
            return Removal("too_large", f"{size} bytes of HTML, more than {self.max_bytes}")
        if _has_more_attributes(document.text, self.max_attributes):
            return Removal("too_many_attributes", f"an element with more than {self.max_attributes} attributes")
        from resiliparse.parse.html import HTMLTree

        tree = HTMLTree.parse(document.text)
        if _deeper(tree, self.max_depth):
            return Removal("too_deep", f"elements nested deeper than {self.max_depth}")
        text = (
            self._with_trafilatura(document.text) if self.extractor == "trafilatura" else self._with_resiliparse(tree)
        )
        if not text.strip():
            return Removal("no_text", f"{self.extractor} found no text in {size} bytes of HTML")
        document.text, document.markup = text, False
        return None

    def _with_resiliparse(self, tree: Any) -> str:
        from resiliparse.extract.html2text import extract_plain_text

        return str(extract_plain_text(tree, preserve_formatting=True, main_content=self.main_content, alt_texts=False))

    def _with_trafilatura(self, page: str) -> str:
        import trafilatura

        logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it logs pages without text as errors
        if not self.main_content:
            return str(trafilatura.html2txt(page))
        # `deduplicate` would compare with pages that this process saw before.
        found = trafilatura.extract(
            page, favor_precision=self.favor_precision, include_comments=False, deduplicate=False
        )
        return found or ""


def _has_more_attributes(page: str, limit: int) -> bool:
    """Return whether a tag has attributes of more than `limit` names, or ten times as many of any names.

    What looks like a tag in a script counts too. Takes time linear in the page.
    """
    most = 10 * limit + 1
    for tag in re.finditer(rf"<[a-zA-Z][^\s/>]*((?:{_ATTRIBUTE}){{0,{most}}})", page):
        if tag.end(1) - tag.start(1) > limit:  # one character each at least
            names = _NAME.findall(tag[1])
            if len(names) == most or len(set(names)) > limit:
                return True
    return False


class _TooDeep(Exception):
    pass


def _deeper(tree: Any, limit: int) -> bool:
    """Return whether elements are nested deeper than `limit`, in time linear in the page and bounded memory."""
    from resiliparse.parse.html import traverse_dom

    def enter(context: Any) -> None:
        if context.depth > limit:
            raise _TooDeep

    try:
        traverse_dom(tree.document, enter)
    except _TooDeep:
        return True
    return False
