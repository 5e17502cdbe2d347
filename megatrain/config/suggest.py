"""Suggest the closest existing name in messages about unknown names. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches


def did_you_mean(prefix: str, given: str, known: Sequence[str]) -> str:
    """Return `"; did you mean <prefix><name>?"` for the closest known name, or an empty string."""
    found = get_close_matches(given.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def next_step(*commands: str) -> str:
    """Return the line that says what to type after a command."""
    return "next: " + "  or  ".join(commands)


def nearest_key(given: str, helps: Mapping[str, str], groups: Sequence[str]) -> str | None:
    """Return the dotted key or the group that an unknown name most likely means. `helps` maps each key to its meaning.

    Tried in this order: a key with the same last part in another group; a group's name; a similar spelling of the last
    part, in the named group first; a similar spelling of the whole name; a key whose meaning contains the words of the
    last part (learning_rate → lr).
    """
    group, _, leaf = given.lower().rpartition(".")
    keys = sorted(helps, key=lambda key: not (group and key.startswith(group + ".")))
    leaves = {key: key.rpartition(".")[2] for key in keys}
    for key in keys:
        if leaves[key] == leaf and leaf != "name":
            return key
    if not group and (found := get_close_matches(leaf, groups, n=1, cutoff=0.6)):
        return f"{found[0]}=<choice>"
    if found := get_close_matches(leaf, leaves.values(), n=1, cutoff=0.7):
        return next(key for key in keys if leaves[key] == found[0])
    own_group = any(key.startswith(group + ".") for key in keys)
    if not own_group and (found := get_close_matches(given.lower(), keys, n=1, cutoff=0.75)):
        return found[0]
    words = [word for word in leaf.split("_") if len(word) > 2]
    for key in keys:
        meaning = helps[key].lower().replace("-", " ")
        if words and all(word in meaning for word in words):
            return key
    return None
