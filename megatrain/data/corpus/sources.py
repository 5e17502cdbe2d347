"""Open the source that `data.kind` names."""

from __future__ import annotations

from collections.abc import Callable

from megatrain.config import DataConfig
from megatrain.data.corpus.files_source import FilesSource
from megatrain.data.corpus.hub_source import HuggingFaceSource
from megatrain.data.corpus.source import Source
from megatrain.data.corpus.stdlib_source import StdlibSource
from megatrain.data.corpus.toy_source import ToySource


def open_source(config: DataConfig) -> Source:
    """Open the source that `data.kind` names and check its paths.

    Raises `ConfigError`, `DataError` or `EnvironmentFault`.
    """
    kinds: dict[str, Callable[[DataConfig], Source]] = {
        "python_stdlib": StdlibSource,
        "files": FilesSource,
        "code": FilesSource,
        "chat": FilesSource,
        "pairs": FilesSource,
        "prompts": FilesSource,
        "huggingface": HuggingFaceSource,
        "toy": ToySource,
    }
    return kinds[config.kind](config)
