"""megatrain pretrains GPT models, from a laptop's CPU to a cluster.

How a run goes on after a fault, which tests show it and what they do not cover: docs/reference/faults.md.
For Python and notebooks: `load`, `Run` and `train` (megatrain/api/, docs/guide/python.md), and `MegatrainError`, the
base class of what they raise.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatrain.api.run_record import Run
    from megatrain.api.start_run import train
    from megatrain.api.trained_model import load
    from megatrain.errors import MegatrainError

__version__ = "0.1.0"
__all__ = ["MegatrainError", "Run", "__version__", "load", "train"]

_HOMES = {
    "MegatrainError": "errors",
    "Run": "api.run_record",
    "load": "api.trained_model",
    "train": "api.start_run",
}
"""The module of each public name. It is imported on first use: the command line needs no torch."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r} (it has {', '.join(sorted(_HOMES))})")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
