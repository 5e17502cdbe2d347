"""Decode the bytes of a web page, whatever its encoding. Extracts nothing."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

_BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_WIDER = {"gbk": "gb18030", "gb2312": "gb18030", "big5": "big5hkscs", "shift_jis": "cp932", "euc-kr": "cp949"}
"""Python's codecs for what browsers take these names for: supersets."""


def decode_html(page: bytes, charset: str | None = None) -> tuple[str, bool]:
    """Return a page's text, and whether it has bytes that no encoding explains (they become U+FFFD).

    The byte order mark decides; then UTF-8 is tried, because a page that is valid UTF-8 is hardly anything else, then
    `charset`, which its server named, what the page names itself, and what its bytes look like.
    """
    names = list(_encodings(page, charset))
    for name in names:
        try:
            return page.decode(name), False
        except UnicodeDecodeError:
            continue
    return page.decode(_least_damaged(page, names), errors="replace"), True


def _least_damaged(page: bytes, names: list[str]) -> str:
    return min(names, key=lambda name: page.decode(name, errors="replace").count("\ufffd"))


def _encodings(page: bytes, charset: str | None) -> Iterator[str]:
    """Yield the encodings to try, the most probable first."""
    from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

    for mark, name in _BYTE_ORDER_MARKS:
        if page.startswith(mark):
            yield name
            return
    shifted = b"\x1b$" in page or b"\x1b(" in page  # ISO-2022-JP: its bytes are all ASCII
    found = [] if shifted else ["utf-8"]
    if charset and (known := map_encoding_to_html5(charset, fallback_utf8=False)):
        found.append(known)
    found += [str(detect_encoding(page, from_html_meta=meta)) for meta in (True, False)]
    yield from dict.fromkeys(_WIDER.get(name.lower(), name.lower()) for name in found)
