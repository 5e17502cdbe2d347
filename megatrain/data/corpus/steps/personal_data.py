"""Mask personal data and secrets: each find is replaced by a word for its kind, the same wherever it stands.

Checksums and validity are checked where a kind has them, so most numbers that merely look alike stay. Names and postal
addresses are not looked for.
"""

from __future__ import annotations

import datetime
import functools
import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from megatrain.config import key
from megatrain.data.corpus.document import Document, Removal, Step
from megatrain.data.corpus.source import require_library
from megatrain.errors import ConfigError

Spans = Iterator[tuple[int, int]]

KINDS = ("secret", "email", "ip", "iban", "card", "national_id", "phone")
"""In the order in which they are looked for: a part of a find is not found again as another kind."""


@dataclass(frozen=True)
class PersonalData(Step):
    """Replace personal data and secrets by a word for their kind, such as `<EMAIL>`.

    E-mail addresses; IPv4 and IPv6 addresses; bank accounts (IBAN) and cards by checksum; US social security numbers,
    UK national insurance numbers and Chinese resident ids (date and check digit); phone numbers that the numbering
    plans of `regions` allow; keys and tokens of known forms, private keys, and passwords that are assigned in quotes.
    """

    name: ClassVar[str] = "personal_data"
    shows_before: ClassVar[bool] = False
    kinds: list[str] = key(list(KINDS), "kinds to mask", each_choices=KINDS)
    public_addresses_only: bool = key(True, "leave IP addresses that are not reachable from the internet")
    regions: list[str] = key(["US", "GB", "CN"], "countries whose national phone numbers are looked for")

    def __post_init__(self) -> None:
        if "phone" in self.kinds:
            _phonenumbers(tuple(self.regions))

    def apply(self, document: Document) -> Removal | None:
        """Mask the finds and count them by kind."""
        document.text, found = self.mask(document.text)
        for kind, number in found.items():
            document.count(kind, number)
        return None

    def mask(self, text: str) -> tuple[str, dict[str, int]]:
        """Return the text with the finds replaced, and their number by kind."""
        found = {}
        for kind in KINDS:
            if kind in self.kinds:
                text, found[kind] = _mask(text, f"<{kind.upper()}>", self._spans(kind, text))
        return text, found

    def _spans(self, kind: str, text: str) -> Spans:
        if kind == "phone":
            return _phones(text, tuple(self.regions))
        if kind == "ip":
            return _addresses(text, self.public_addresses_only)
        return _FINDERS[kind](text)


def _mask(text: str, word: str, spans: Spans) -> tuple[str, int]:
    """Return the text with the spans replaced, which are sorted and apart, and their number."""
    parts, at, found = [], 0, 0
    for start, stop in spans:
        if start < at:
            continue
        parts += [text[at:start], word]
        at, found = stop, found + 1
    return ("".join([*parts, text[at:]]), found) if found else (text, 0)


# ---------------------------------------------------------------------------------------------------- secrets

_SECRET = re.compile(
    r"-----BEGIN (?P<what>[A-Z ]{0,20}PRIVATE KEY)-----[A-Za-z0-9+/=\s:,-]{1,20000}-----END (?P=what)-----"
    r"|\b(?:A3T[A-Z0-9]|AKIA|ASIA)[A-Z0-9]{16}\b"  # Amazon
    r"|\bgh[pousr]_[A-Za-z0-9]{36,255}\b|\bgithub_pat_[A-Za-z0-9_]{60,100}\b|\bglpat-[A-Za-z0-9_-]{20,50}"
    r"|\bxox[abeoprs]-[A-Za-z0-9-]{10,250}"  # Slack
    r"|\bAIza[A-Za-z0-9_-]{35}|\bya29\.[A-Za-z0-9_-]{20,400}"  # Google
    r"|\b(?:sk|rk)_live_[A-Za-z0-9]{20,250}\b|\bsk-[A-Za-z0-9_-]{20,250}|\bhf_[A-Za-z0-9]{30,40}\b"
    r"|\beyJ[A-Za-z0-9_-]{8,4000}\.eyJ[A-Za-z0-9_-]{8,8000}\.[A-Za-z0-9_-]{10,2000}"  # JSON web tokens
)
_ASSIGNED = re.compile(
    r"(?i:api[_-]?key|secret|passw(?:or)?d|token|access[_-]?key)[\"']?\s{0,4}[:=]\s{0,4}"
    r"([\"'])(?P<value>[^\s\"']{12,200})\1"
)


def _secrets(text: str) -> Spans:
    spans = [match.span() for match in _SECRET.finditer(text)]
    for match in _ASSIGNED.finditer(text):
        value = match["value"]
        if any(map(str.isdigit, value)) and any(map(str.isalpha, value)):  # prose and placeholders have no digits
            spans.append(match.span("value"))
    return iter(sorted(spans))


# ---------------------------------------------------------------------------------------------------- e-mail

_AFTER_AT = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}(?:[A-Za-z]{2,24}|xn--[A-Za-z0-9-]{2,59})\b"
)


def _emails(text: str) -> Spans:
    """Yield addresses of RFC 5321's usual form: looked for around each @, so the time is linear in the text."""
    at = text.find("@")
    while at >= 0:
        stop = _AFTER_AT.match(text, at + 1)
        local = _local_part(text[max(0, at - 64) : at]) if stop else 0
        if stop and local:
            yield at - local, stop.end()
        at = text.find("@", at + 1)


def _local_part(before: str) -> int:
    """Return the length of the local part at the end of the text before an @, 0 if there is none."""
    length = 0
    for letter in reversed(before):
        if not (letter.isascii() and (letter.isalnum() or letter in "!#$%&'*+/=?^_`{|}~.-")):
            break
        length += 1
    local = before[len(before) - length :].lstrip(".'`/={|&?*#!$^~")
    return len(local) if local and not local.endswith(".") and ".." not in local else 0


# ---------------------------------------------------------------------------------------------------- IP addresses

_IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f]{0,4}:)[0-9A-Fa-f:]{4,39}(?:(?:\d{1,3}\.){3}\d{1,3})?(?![\w:])")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # RFC 4291
_VERSION = re.compile(r"(?i:\b(?:v|ver|version|release|rev|build|chapter|section|figure|table)\b[.:\s]{0,3})\Z")


def _addresses(text: str, public_only: bool) -> Spans:
    spans = []
    for match in _IPV4.finditer(text):
        if _VERSION.search(text, max(0, match.start() - 12), match.start()):
            continue
        if _is_address(match[0], public_only):
            spans.append(match.span())
    for match in _IPV6.finditer(text) if "::" in text or text.count(":") >= 7 else ():
        if match[0].count(":") >= 2 and match[0].strip(":") and _is_address(match[0].rstrip(":") or "::", public_only):
            spans.append(match.span())
    return iter(sorted(spans))


def _is_address(text: str, public_only: bool) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and public_only:
        return address in _GLOBAL_UNICAST  # others are more often code, such as dead::beef
    return address.is_global or not public_only


# ---------------------------------------------------------------------------------------------------- numbers

_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_CARD = re.compile(r"(?<![\w.,+-])(?:3\d|4\d|5\d|6\d|2[1-7]|18)(?:[ -]?\d){11,17}(?![\w]|[.,-]\d)")
_CHINESE_ID = re.compile(r"(?<![A-Za-z0-9_.])[1-9]\d{5}(?:18|19|20)\d{9}[0-9Xx](?![A-Za-z0-9_])")
_SOCIAL_SECURITY = re.compile(r"(?<![\w.-])(?!000|666|9\d\d)\d{3}([- ])(?!00)\d\d\1(?!0000)\d{4}(?![\w-]|\.\d)")
_NATIONAL_INSURANCE = re.compile(r"\b(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z](?: ?\d\d){3} ?[A-D]\b")


def _ibans(text: str) -> Spans:
    for match in _IBAN.finditer(text):
        compact = match[0].replace(" ", "")
        number = "".join(str(int(letter, 36)) for letter in compact[4:] + compact[:4])
        if 15 <= len(compact) <= 34 and int(number) % 97 == 1:  # ISO 13616
            yield match.span()


def _cards(text: str) -> Spans:
    for match in _CARD.finditer(text):
        digits = [int(letter) for letter in match[0] if letter.isdigit()]
        doubled = sum(sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
        if (sum(digits[::-2]) + doubled) % 10 == 0 and len(set(digits)) > 1:  # Luhn's check, ISO/IEC 7812
            yield match.span()


def _national_ids(text: str) -> Spans:
    spans = [match.span() for match in _SOCIAL_SECURITY.finditer(text)]
    spans += [match.span() for match in _NATIONAL_INSURANCE.finditer(text)]
    spans += [match.span() for match in _CHINESE_ID.finditer(text) if _is_chinese_id(match[0].upper())]
    return iter(sorted(spans))


def _is_chinese_id(number: str) -> bool:
    """Check the date of birth and the check digit (GB 11643, ISO 7064 MOD 11-2)."""
    try:
        datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(number[:17]))
    return number[17] == "10X98765432"[total % 11]


# ---------------------------------------------------------------------------------------------------- phone numbers

_PHONE = re.compile(r"(?<![\w.,/=@#-])\+?\(?\d(?:[ ().-]{0,3}\d){6,14}(?![\w-]|[.,/:]\d)")


@functools.cache
def _phonenumbers(regions: tuple[str, ...]) -> Any:
    """Return the library. Raises `ConfigError` for a region that it does not know."""
    library = require_library("phonenumbers", "the cleaning step personal_data", "corpus")
    if unknown := [region for region in regions if region not in library.SUPPORTED_REGIONS]:
        raise ConfigError(
            f"clean.steps: personal_data.regions: unknown {', '.join(unknown)}; give codes of ISO 3166 in capitals: "
            f"{', '.join(sorted(library.SUPPORTED_REGIONS))}"
        )
    return library


def _phones(text: str, regions: tuple[str, ...]) -> Spans:
    for match in _PHONE.finditer(text):
        opened = match[0].startswith("(") and ")" not in match[0]  # the number stands in brackets
        if _is_phone(match[0].removeprefix("(") if opened else match[0], regions):
            yield match.start() + opened, match.end()


def _is_phone(text: str, regions: tuple[str, ...]) -> bool:
    """Whether a number is written as a phone number, and valid in a region or with its country code."""
    library = _phonenumbers(regions)
    digits = sum(map(str.isdigit, text))
    for region in (None,) if text.startswith("+") else regions:
        try:
            number = library.parse(text, region)
        except library.NumberParseException:
            continue
        if not library.is_valid_number(number):
            continue
        if region is None or (region == "CN" and digits == 11 and text[0] == "1"):
            return True
        if digits < len(text):  # plain digits are more often something else
            return _is_grouped(text, number, library)
    return False


def _is_grouped(text: str, number: Any, library: Any) -> bool:
    """Whether the digits are grouped as people write the country's numbers, unlike 12.345.678 or 2024-01-01 10."""
    written = re.findall(r"\d+", text)
    national = re.findall(r"\d+", library.format_number(number, library.PhoneNumberFormat.NATIONAL))
    return written == national or (written[-1] == national[-1] and len(written) >= 2)


_FINDERS: dict[str, Callable[[str], Spans]] = {
    "secret": _secrets,
    "email": _emails,
    "iban": _ibans,
    "card": _cards,
    "national_id": _national_ids,
}
