"""Load a user's own function, which a config names as `module:function` or `path.py:function`. Imports no torch."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


class NoFunctionError(Exception):
    """There is no such file, module or function."""


def load_function(name: str) -> Callable[..., Any]:
    """Return the function that `module:function` or `path.py:function` names.

    Raises:
        NoFunctionError: there is none. Errors of the module itself are raised as they are.
    """
    place, _, function = name.rpartition(":")
    module = _of_file(Path(place).expanduser()) if place.endswith(".py") else _imported(place)
    found = getattr(module, function, None)
    if not callable(found):
        has = ", ".join(sorted(name for name, value in vars(module).items() if inspect.isfunction(value))[:8])
        raise NoFunctionError(f"{place} has no function {function}{f' (it has {has})' if has else ''}")
    named: Callable[..., Any] = found
    return named


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise NoFunctionError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and the like look their module up
    spec.loader.exec_module(module)
    return module


def _imported(place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            raise NoFunctionError(f"there is no module {error.name}") from error
        raise
