"""A prepared dataset as a choice of the group `data`: `data=<its name>` or `data=<its folder>`. Imports no torch.

It means `data=files data.name=<name> data.dir=<the folder above>`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatrain.config.choices import YAML, choices_of, home

CARD = "card.json"
"""File of a dataset's folder that is written last: a folder without it is no prepared dataset yet."""

TRAINING = ("train", "tune", "layouts")
"""Verbs whose dataset is a prepared one; the others read the source that the group names."""


def find_dataset(value: str, data_dir: str, folders: Sequence[Path] = ()) -> Path | None:
    """Return the folder of the prepared dataset that `data=<value>` names; None if it names none.

    A value with a slash is a path. Any other is a choice of the group, a name in `data_dir`, or a path, in this order.
    Raises ConfigError for the home of an unknown user.
    """
    place = home(f"data={value}", value)
    if "/" not in value:
        if value in choices_of("data", folders):
            return None
        named = home(f"data.dir={data_dir}", data_dir) / value
        place = named if (named / CARD).is_file() else place
    if not (place / CARD).is_file():
        return None
    return place.resolve() if place.name in ("", "..") else place


def same_place(first: str, second: str) -> bool:
    """Return whether two paths, or two names, lead to the same place."""
    return os.path.realpath(Path(first).expanduser()) == os.path.realpath(second)


def advice_on_place(value: str) -> str:
    """Return what to type for a folder or file of text that is given as a choice of data; empty if it is none."""
    place = home(f"data={value}", value)
    if not place.exists() or place.suffix in YAML:
        return ""
    quoted = shlex.quote(value)
    if (place / CARD).is_file():
        return f"data={value} is a dataset that is prepared already; to train on it: megatrain train data={quoted}"
    return f"data={value} is no prepared dataset; if it is text, prepare it first: megatrain prepare {quoted}"
