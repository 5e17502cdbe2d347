"""Remove files of code that people did not write, that hold data, or whose licence is not wanted."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from megatrain.config import key
from megatrain.data.corpus.code import is_generated
from megatrain.data.corpus.document import Document, Removal, Step
from megatrain.data.corpus.file_kinds import programming_language
from megatrain.data.corpus.licenses import allows, license_of_metadata, wanted_licenses
from megatrain.data.corpus.source import require_library
from megatrain.errors import ConfigError

_XML = "<?xml version="
_XML_CHARACTERS = 100  # at the beginning of a file
_DATA = ("json", "yaml")


@dataclass(frozen=True)
class CodeQuality(Step):
    """Remove files that are generated, minified or data: the rules of the Stack and StarCoder.

    Line lengths and the share of letters and digits are what Codex looked at (Chen et al. 2021, arXiv 2107.03374, 3.1),
    with the thresholds of the Stack (Kocetkov et al. 2022, arXiv 2211.15533). XML (but for XSLT), HTML, JSON and YAML
    have rules of StarCoder (Li et al. 2023, arXiv 2305.06161, 3.1); a file's language comes from its metadata or its
    name. The licence is that of the metadata (the file's own, or of the nearest LICENSE): a file stays if it may be
    used under one of those wanted. null turns a rule off.
    """

    name: ClassVar[str] = "code_quality"
    max_line_length: int | None = key(1000, "longest line, in characters", minimum=1)
    max_mean_line_length: float | None = key(100, "longest mean length of the lines, in characters", minimum=1)
    min_alphanumeric: float | None = key(0.25, "smallest fraction of letters and digits", minimum=0, maximum=1)
    generated: bool = key(True, "remove files whose head says that they are generated")
    xml: bool = key(True, "remove files that begin as XML, in whatever language but XSLT")
    min_visible_text: float | None = key(0.2, "HTML: smallest fraction of visible text", minimum=0, maximum=1)
    min_visible_characters: int = key(100, "HTML: fewest characters of visible text", minimum=0)
    min_data_characters: int = key(50, "JSON and YAML: shortest file, in characters", minimum=0)
    max_data_characters: int | None = key(5000, "JSON and YAML: longest file, in characters", minimum=1)
    licenses: list[str] = key([], "licences to keep: SPDX identifiers, or permissive for the usual ones; [] for any")
    unknown_license: str = key(
        "keep", "with `licenses`: what becomes of a file whose licence is unknown", choices=("keep", "remove")
    )

    def __post_init__(self) -> None:
        if self.min_visible_text is not None:
            require_library("resiliparse", "clean.steps: code_quality.min_visible_text", "corpus")
        if self.unknown_license == "remove" and not self.licenses:
            raise ConfigError(
                "clean.steps: code_quality.unknown_license=remove acts only with licenses; add licenses: [permissive]"
            )

        for name in self.licenses:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", name):
                raise ConfigError(
                    f"clean.steps: code_quality.licenses: {name!r} is no SPDX identifier; give each by itself, such as "
                    "[MIT,Apache-2.0], or permissive"
                )
            if name.lower() != "permissive" and difflib.get_close_matches(name.lower(), ["permissive"], 1, 0.8):
                raise ConfigError(f"clean.steps: code_quality.licenses: {name!r} is unknown; did you mean permissive?")

    def apply(self, document: Document) -> Removal | None:
        """Compare the file with each rule."""
        if document.text:
            language = _language(document)
            return self._written_by_people(document.text, language) or self._license(document)
        return None

    def _written_by_people(self, text: str, language: str) -> Removal | None:
        if self.xml and language != "xslt" and _XML in text[:_XML_CHARACTERS]:
            return Removal("xml", f"has {_XML} in the first {_XML_CHARACTERS} characters")
        if self.generated and is_generated(text):
            return Removal("generated", "its head says that it is generated")
        lengths = [len(line) for line in text.splitlines()]
        if self.max_line_length is not None and (longest := max(lengths)) > self.max_line_length:
            return Removal("long_line", f"a line of {longest} characters, more than {self.max_line_length}")
        if self.max_mean_line_length is not None and sum(lengths) > self.max_mean_line_length * len(lengths):
            mean = sum(lengths) / len(lengths)
            return Removal("long_lines", f"lines of {mean:.1f} characters, more than {self.max_mean_line_length}")
        if self.min_alphanumeric is not None:
            found = sum(map(str.isalnum, text)) / len(text)
            if found < self.min_alphanumeric:
                return Removal("few_letters", f"{found:.3f} letters and digits, less than {self.min_alphanumeric}")
        if language == "html" and self.min_visible_text is not None:
            visible = _visible_characters(text)
            if visible <= self.min_visible_text * len(text) or visible <= self.min_visible_characters:
                return Removal("little_visible_text", f"{visible} of {len(text)} characters are visible")
        longest_data = len(text) if self.max_data_characters is None else self.max_data_characters
        if language in _DATA and not self.min_data_characters <= len(text) <= longest_data:
            return Removal("data", f"{len(text)} characters of {language}")
        return None

    def _license(self, document: Document) -> Removal | None:
        if not self.licenses:
            return None
        found = license_of_metadata(document.metadata)
        if not found:
            return Removal("unknown_license", "no licence") if self.unknown_license == "remove" else None
        if allows(found, wanted_licenses(self.licenses)):
            return None
        return Removal("license", f"{' or '.join(found)} is not among those wanted")


def _language(document: Document) -> str:
    """Return the language of a file in small letters, by its metadata or its name; empty if unknown."""
    known = document.metadata
    for name in ("programming_language", "lang", "language"):
        if isinstance(value := known.get(name), str) and value:
            return value.lower()
    for name in ("path", "max_stars_repo_path"):
        if isinstance(value := known.get(name), str) and value:
            suffix = value.lower().rpartition(".")[2]
            by_suffix = {"htm": "html", "xhtml": "html", "yml": "yaml", "xsl": "xslt"}.get(suffix, suffix)
            return (programming_language(value.rpartition("/")[2]) or by_suffix).lower()
    return "html" if document.markup else ""


def _visible_characters(page: str) -> int:
    """Return the characters of a page's text, without scripts and styles, as BeautifulSoup's `get_text` has them."""
    from resiliparse.parse.html import HTMLTree, NodeType, traverse_dom

    found = 0

    def enter(context: Any) -> None:
        nonlocal found
        node = context.node
        if node.type == NodeType.TEXT and (node.parent is None or node.parent.tag not in ("script", "style")):
            found += len(node.value)

    traverse_dom(HTMLTree.parse(page).document, enter)
    return found
