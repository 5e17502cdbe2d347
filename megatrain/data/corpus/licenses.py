"""Whether the licence of a document of code is among those wanted, by its metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

FIELDS = ("license", "licenses", "detected_licenses", "max_stars_repo_licenses")
"""Fields of metadata that hold an SPDX expression or a list of identifiers: ours first, then the Stack's."""

PERMISSIVE = frozenset(
    {
        *("0bsd", "afl-3.0", "apache-2.0", "artistic-2.0", "blueoak-1.0.0", "bsd-2-clause", "bsd-2-clause-patent"),
        *("bsd-3-clause", "bsl-1.0", "cc0-1.0", "isc", "mit", "mit-0", "ms-pl", "ncsa", "postgresql", "psf-2.0"),
        *("python-2.0", "unicode-dfs-2016", "unlicense", "upl-1.0", "wtfpl", "x11", "zlib"),
    }
)
"""SPDX identifiers, in small letters, of common permissive licences: what `permissive` stands for."""

_UNKNOWN = ("", "unknown", "none", "noassertion", "other", "no_license")


def license_of_metadata(metadata: Mapping[str, Any]) -> list[str]:
    """Return the alternatives of a document's licence: SPDX expressions, none if it is unknown."""
    for name in FIELDS:
        value = metadata.get(name)
        found = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
        if known := [one for one in found if isinstance(one, str) and one.strip().lower() not in _UNKNOWN]:
            return known
    return []


def allows(expressions: Iterable[str], wanted: frozenset[str]) -> bool:
    """Whether an SPDX expression can be met with licences of `wanted` (in small letters): one of OR, each of AND."""
    return any(_met(_tokens(expression), wanted) for expression in expressions)


def wanted_licenses(names: Iterable[str]) -> frozenset[str]:
    """Return identifiers in small letters, with `permissive` spelt out."""
    lower = {name.lower() for name in names}
    return frozenset(lower - {"permissive"}) | (PERMISSIVE if "permissive" in lower else frozenset())


def _tokens(expression: str) -> list[str]:
    return re.findall(r"[()]|[^\s()]+", expression.lower())


def _met(tokens: list[str], wanted: frozenset[str]) -> bool:
    """Evaluate an expression: AND binds stronger than OR, and WITH names an exception, which only permits more."""

    def either() -> bool:
        met = both()
        while tokens and tokens[0] == "or":
            tokens.pop(0)
            met = both() or met
        return met

    def both() -> bool:
        met = one()
        while tokens and tokens[0] == "and":
            tokens.pop(0)
            met = one() and met
        return met

    def one() -> bool:
        if not tokens:
            return False
        token = tokens.pop(0)
        if token == "(":
            met = either()
            if tokens and tokens[0] == ")":
                tokens.pop(0)
            return met
        if len(tokens) > 1 and tokens[0] == "with":
            del tokens[:2]
        return token in wanted or token.removesuffix("+") in wanted

    met = either()
    return met and not tokens  # what is left is no SPDX expression
