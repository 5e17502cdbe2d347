"""Nested configs as dotted keys. Imports no torch."""

from __future__ import annotations

from typing import Any

MAPPINGS = ("data.mixture",)
"""Keys whose value is itself a dictionary."""


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by their dotted keys: `{"a": {"b": 1}}` gives `{"a.b": 1}`.

    The value of a key in MAPPINGS stays whole.
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and f"{prefix}{name}" not in MAPPINGS:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
