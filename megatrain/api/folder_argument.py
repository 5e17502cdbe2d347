"""Check the path of a folder that a Python program gives. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatrain.config.choices import home
from megatrain.errors import ConfigError
from megatrain.verbs.places import require


def existing_path(path: Any) -> Path:
    """Return a path, with `~` as home. Raises `ConfigError` if it is no path, or there is nothing there."""
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"path: expected the path of a folder, as text or a pathlib.Path, given {path!r}")
    found = home(f"path={path}", str(path))
    require("path", found)
    return found
