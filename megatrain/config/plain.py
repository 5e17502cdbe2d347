"""Values as people read them, on the console, in messages and in reports. Imports no torch."""

from __future__ import annotations

from typing import Any

MOST = 8
"""Most items of a list or mapping that are shown."""


def plain(value: Any, digits: int | None = None) -> str:
    """Return a value in plain words: `null`, `true`, text as it is, `[a, b]`, `web 0.7, code 0.3`, `''`.

    Floats get so many significant `digits` (None: all).
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return str(value) if digits is None else f"{value:.{digits}g}"
    if isinstance(value, (list, tuple)):
        return f"[{_listed([plain(item, digits) for item in value])}]"
    if value in ("", {}):
        return repr(value)  # that something is empty must be seen
    if isinstance(value, dict):
        return _listed([f"{name} {plain(item, digits)}" for name, item in value.items()])
    return str(value)


def _listed(items: list[str]) -> str:
    return ", ".join([*items[:MOST], *([f"... {len(items)} in all"] if len(items) > MOST else [])])
