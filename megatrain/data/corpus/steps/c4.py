"""C4's rules for lines and pages (Raffel et al. 2020, arXiv 1910.10683, 2.2), and mC4's for paragraphs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from megatrain.config import key
from megatrain.data.corpus.document import Document, Removal, Step
from megatrain.data.corpus.splitting import LANGUAGES, require_splitter, splitter

_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@dataclass(frozen=True)
class C4Quality(Step):
    """Keep lines that look like sentences, of pages that have some: C4's rules (Raffel et al. 2020, arXiv 1910.10683).

    Lines go that have a word that is too long, do not end a sentence, have too few words, mention JavaScript, or a
    policy on privacy or cookies; citations such as `[3]` are cut out. Then documents go that have a line with "lorem
    ipsum" or a curly bracket among those that would stay, or too few sentences. Words of a line are what whitespace
    separates, in Chinese what jieba finds.
    """

    name: ClassVar[str] = "c4_quality"
    language: str = key("en", "language that sentences, and in Chinese words, are split by", choices=LANGUAGES)
    min_sentences: int | None = key(5, "fewest sentences of a document; null for any", minimum=0)
    min_line_words: int | None = key(3, "fewest words of a line; null for any", minimum=0)
    max_word_length: int | None = key(1000, "longest word of a line, in characters; null for any", minimum=1)
    end_punctuation: list[str] = key([".", "?", "!", '"', "'"], "what a line must end with; [] for anything")
    citations: bool = key(True, "cut out citations such as [3] and [citation needed]")
    lorem_ipsum: bool = key(True, "remove documents with the words lorem ipsum")
    javascript: bool = key(True, "leave out lines with the word JavaScript")
    curly_bracket: bool = key(True, "remove documents with a {")
    policy: bool = key(True, "leave out lines with phrases of policies on privacy and cookies")

    def __post_init__(self) -> None:
        require_splitter(self.language, self.name)

    def apply(self, document: Document) -> Removal | None:
        """Go through the lines; keep those that the rules keep, and count the others by rule."""
        kept = []
        for line in document.text.splitlines():
            line, rule = self._cut(line.strip())
            lower = line.lower()
            if rule is None:
                if self.lorem_ipsum and "lorem ipsum" in lower:
                    return Removal("lorem_ipsum", "has the words lorem ipsum")
                if self.javascript and "javascript" in lower:
                    rule = "javascript_line"
                elif self.curly_bracket and "{" in line:
                    return Removal("curly_bracket", "has a {")
                elif self.policy and any(phrase in lower for phrase in _POLICIES):
                    rule = "policy_line"
            if rule is None:
                kept.append(line)
            else:
                document.count(rule)
        if self.min_sentences is not None and (found := self._sentences(kept)) < self.min_sentences:
            return Removal("too_few_sentences", f"{found} sentences, fewer than {self.min_sentences}")
        document.text = "\n".join(kept).strip()
        return None

    def _cut(self, line: str) -> tuple[str, str | None]:
        """Return the line without citations, and the rule that its words or its end break, if any."""
        words = line.split() if self.language == "en" else splitter(self.language).words(line)
        longest = self.max_word_length
        if longest is not None and len(line) > longest and any(len(word) > longest for word in words):
            return line, "long_word_line"
        if self.citations:
            line = _CITATION.sub("", line)
        if self.end_punctuation and (not line.endswith(tuple(self.end_punctuation)) or line.endswith("...")):
            return line, "unended_line"
        if self.min_line_words is not None and len(words) < self.min_line_words:
            return line, "short_line"
        return line, None

    def _sentences(self, lines: list[str]) -> int:
        """Return the number of sentences, counted no further than needed; each line has at least one."""
        assert self.min_sentences is not None
        found = len(lines)
        for line in lines:
            if found >= self.min_sentences:
                break
            found += splitter(self.language).sentences(line) - 1
        return found


@dataclass(frozen=True)
class C4Paragraphs(Step):
    """Remove documents with too few long paragraphs: mC4's rule (Xue et al. 2021, arXiv 2010.11934, 3.1).

    A paragraph is a line.
    """

    name: ClassVar[str] = "c4_paragraphs"
    min_paragraphs: int = key(3, "fewest long paragraphs", minimum=1)
    min_characters: int = key(200, "characters of a long paragraph", minimum=1)

    def apply(self, document: Document) -> Removal | None:
        """Count the long paragraphs."""
        found = sum(len(line) >= self.min_characters for line in document.text.split("\n"))
        if found < self.min_paragraphs:
            return Removal("few_paragraphs", f"{found} of {self.min_characters} characters, not {self.min_paragraphs}")
        return None
