"""Start another Python process of megatrain that imports nothing from the working directory. Imports no torch.

`python -m` puts the working directory first on the module path, where a user's `json.py` or a folder `megatrain` would
be imported. This file is run by its path instead. It loads the same megatrain as the process that starts it.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from typing import NoReturn

SAFE_PATH = "PYTHONSAFEPATH"
"""Environment variable that keeps the working directory off the module path, from Python 3.11 on."""


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of megatrain, as `python -m module arguments` would."""
    return [sys.executable, os.path.abspath(__file__), module, *arguments]


def drop_working_directory(package: str) -> None:
    """Remove the working directory that `python -m` put on the module path, unless `package` was imported from it."""
    added = None if getattr(sys.flags, "safe_path", False) else sys.path[0]
    if added in ("", os.getcwd()) and os.path.dirname(package) != os.getcwd():
        del sys.path[0]


def _main() -> NoReturn:
    """Run the module that the first argument names."""
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the folder of this file
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    spec = importlib.util.spec_from_file_location("megatrain", os.path.join(package, "__init__.py"))
    assert spec is not None and spec.loader is not None
    sys.modules["megatrain"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["megatrain"])
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    _main()
