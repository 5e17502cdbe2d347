"""Find wikitext that the parser would need hours for, or die of, before it is parsed. Parses nothing itself.

mwparserfromhell reads on to the end of a page for each template, link, tag or table that is never closed, and then
starts again behind it: the time is the sum of the text behind each. Vandalised pages repeat one a hundred thousand
times. In a heading it recurses at each run of equals signs, without a limit: the stack overflows.
"""

from __future__ import annotations

import re

MAX_REREAD = 10_000_000
"""Characters that may be read again for what is never closed: at most some ten seconds, of any mixture of them."""
MAX_EQUALS = 5_000
"""Runs of equals signs in a heading; some 70,000 overflow a stack of 8 MiB."""

_TOKEN = re.compile(
    r"(?P<comment><!--)|<(?P<close>/?)(?P<tag>[a-zA-Z][a-zA-Z0-9]*)(?P<attributes>[^<>]*)|(?P<open_braces>\{\{+)"
    r"|(?P<close_braces>\}\}+)|(?P<open_link>\[\[)(?P<piped>[^\[\]{}<>|\n]*\|)?|(?P<close_link>\]\])"
    r"|(?P<open_url>\[(?=[a-z]*:?//|mailto:))|(?P<close_url>\])|(?P<line>\n)(?:[ \t:]*(?P<table>\{\||\|\}(?!\})))?"
)
_NEVER_CLOSED = frozenset(["br", "wbr", "hr", "meta", "link", "img", "li", "dt", "dd", "th", "td", "tr"])
_AS_IT_IS = frozenset(
    ["nowiki", "pre", "math", "source", "syntaxhighlight", "score", "timeline", "hiero", "ce", "chem", "templatedata"]
)
"""Tags whose contents are no wikitext."""
_HEADING = re.compile(r"^=.*", re.MULTILINE)
_EQUALS = re.compile("=+")


def what_is_too_slow(source: str) -> str | None:
    """Return what makes a page too slow or too dangerous to parse, None if nothing does. Takes linear time."""
    for heading in _HEADING.finditer(source):
        if (runs := sum(1 for _ in _EQUALS.finditer(heading[0]))) > MAX_EQUALS:
            return f"a heading has {runs} runs of equals signs, more than {MAX_EQUALS}"
    unclosed, reread = _unclosed(source)
    if reread > MAX_REREAD:
        return f"{unclosed} templates, links, tags or tables are never closed, which would take too long to parse"
    return None


def _unclosed(source: str) -> tuple[int, int]:
    """Return how many are never closed, and the sum of the characters behind each."""
    text = "\n" + source  # a table may begin the page
    lower = text.lower()
    open_at: dict[str, list[int]] = {}
    ended: set[str] = set()  # what has no end any more: it is not looked for again
    count = total = at = 0

    def skips_to(end: str, after: int) -> int:
        found = -1 if end in ended else lower.find(end, after)
        if found < 0:
            ended.add(end)
        return found

    while match := _TOKEN.search(text, at):
        at, start = match.end(), match.start()
        kind = match.lastgroup
        if match["comment"]:
            if (end := skips_to("-->", at)) >= 0:
                at = end
            else:
                open_at.setdefault("<!--", []).append(start)
        elif tag := (match["tag"] or "").lower():
            if match["close"]:
                _pop(open_at, tag, 1)
            elif tag not in _NEVER_CLOSED and not match["attributes"].rstrip().endswith("/"):
                if tag in _AS_IT_IS and (end := skips_to(f"</{tag}", at)) >= 0:
                    at = end + len(tag) + 2
                else:
                    open_at.setdefault(tag, []).append(start)
        elif braces := match["open_braces"]:
            open_at.setdefault("{{", []).extend([start] * (len(braces) // 2))
        elif braces := match["close_braces"]:
            _pop(open_at, "{{", len(braces) // 2)
        elif match["open_link"]:  # without a text it ends with its line
            open_at.setdefault("[[", []).append(start if match["piped"] else len(text))
        elif match["close_link"]:
            _pop(open_at, "[[", 1)
        elif match["open_url"]:
            open_at.setdefault("[", []).append(start)
        elif match["close_url"]:
            _pop(open_at, "[", 1)
        else:
            assert kind in ("line", "table")
            links = open_at.pop("[", [])  # a link to a URL ends with its line
            count, total = count + len(links), total + sum(start - link for link in links)
            if match["table"] == "{|":
                open_at.setdefault("{|", []).append(start)
            elif match["table"]:
                _pop(open_at, "{|", 1)
    for places in open_at.values():
        count, total = count + len(places), total + sum(len(text) - place for place in places)
    return count, total


def _pop(open_at: dict[str, list[int]], kind: str, number: int) -> None:
    places = open_at.get(kind, [])
    del places[max(0, len(places) - number) :]
