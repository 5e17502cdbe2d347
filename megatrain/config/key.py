"""Declare a config key, and list the keys of a schema. Imports no torch."""

from __future__ import annotations

from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any


def key(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    each_minimum: float | None = None,
    each_below: float | None = None,
    each_choices: tuple[Any, ...] | None = None,
    path: bool = False,
) -> Any:
    """Declare a config key: its default, its meaning (with unit) and the values it allows.

    `minimum` and `maximum` are inclusive, `above` and `below` exclusive; `each_minimum` (inclusive) and `each_below`
    (exclusive) bound the elements of a list,
    `each_choices` lists them. `path` marks paths of files and folders, in which `~` is home. A default
    of `MISSING` makes the key mandatory.
    """
    metadata = {
        name: value
        for name, value in {
            "help": help,
            "choices": choices,
            "minimum": minimum,
            "above": above,
            "maximum": maximum,
            "below": below,
            "each_minimum": each_minimum,
            "each_below": each_below,
            "each_choices": each_choices,
            "path": path or None,
        }.items()
        if value is not None
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    if default is MISSING:
        return field(default="???", metadata=metadata)  # OmegaConf's mark for a mandatory value
    return field(default=default, metadata=metadata)


def walk(schema: type, prefix: str = "") -> dict[str, Any]:
    """Return every key of a verb's schema: dotted name to dataclass field, without the groups themselves."""
    import typing

    hints = typing.get_type_hints(schema)
    found: dict[str, Any] = {}
    for f in fields(schema):
        if is_dataclass(hints[f.name]):
            found.update(walk(hints[f.name], f"{prefix}{f.name}."))
        else:
            found[f"{prefix}{f.name}"] = f
    return found
