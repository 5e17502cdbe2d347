"""Datasets of the Hugging Face hub, streamed, and local folders in their format."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatrain.config import DataConfig
from megatrain.data.corpus.conversations import FIELDS, find_conversation
from megatrain.data.corpus.decoding import find_text
from megatrain.data.corpus.file_search import saved_to_disk
from megatrain.data.corpus.record import Problem, Record
from megatrain.data.corpus.shard import Shard
from megatrain.data.corpus.source import Source, num_bytes, require_library
from megatrain.data.hub import one_line_a_wait
from megatrain.errors import ConfigError, DataError, EnvironmentFault


class HuggingFaceSource(Source):
    """A streamed dataset from the Hugging Face hub, or from a local folder in its format, one document per row."""

    total_bytes = None

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        if not config.hf_path:
            raise ConfigError("data.hf_path: missing; give a hub name such as allenai/c4, or a local folder")
        self.identity = {
            "kind": config.kind,
            "path": config.hf_path,
            "config": config.hf_config,
            "split": config.hf_split,
        }
        self._datasets = require_library("datasets", "data.kind=huggingface")
        place = f"data.hf_path={config.hf_path}, data.hf_config={config.hf_config}, data.hf_split={config.hf_split}"
        try:
            with one_line_a_wait(f"data.hf_path={config.hf_path}"):
                self._rows = self._load(config)
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{place}: {_first_line(error)}") from error
        except (ConnectionError, OSError) as error:
            raise EnvironmentFault(
                f"{place}: the hub could not be reached ({_first_line(error)}); check the network, or give a folder "
                "with the dataset's files"
            ) from error
        columns = self._rows.column_names
        if columns is not None and not {config.text_column, config.text_column.split(".")[0], *FIELDS} & set(columns):
            raise ConfigError(f"data.text_column={config.text_column}: {config.hf_path} has {', '.join(columns)}")

    def _load(self, config: DataConfig) -> Any:
        """Return the rows of the hub's dataset, of a folder in its format, or of a folder written by `save_to_disk`."""
        folder = Path(str(config.hf_path)).expanduser()
        if not saved_to_disk(folder):
            return self._datasets.load_dataset(config.hf_path, config.hf_config, split=config.hf_split, streaming=True)
        rows = self._datasets.load_from_disk(str(folder))
        if isinstance(rows, dict):
            if config.hf_split not in rows:
                raise ValueError(f"Unknown split {config.hf_split!r}; the folder has {', '.join(rows)}")
            return rows[config.hf_split]
        return rows

    def shards(self) -> Iterator[Shard]:
        """Yield the whole dataset as one part."""
        yield Shard()

    def read(self, shard: Shard) -> Iterator[Record]:
        """Yield the rows. Raises `DataError` for a bad row, `EnvironmentFault` if the connection is lost."""
        column, path = self.config.text_column, self.config.hf_path
        number = 0
        try:
            with one_line_a_wait(f"data.hf_path={path}"):
                for number, row in enumerate(self._rows, start=1):
                    text = find_text(row, column)
                    self.progress.bytes += 0 if isinstance(text, Problem) else num_bytes(text)
                    kind = None if find_conversation(row, column) is None else "conversation"
                    yield from self.field(text, f"{path}, row {number}", row, kind)
        except (ConnectionError, TimeoutError) as error:
            raise EnvironmentFault(f"{path}: connection lost after row {number} ({_first_line(error)})") from error
        except (OSError, EOFError, zlib.error, ValueError, self._datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{path}: cannot be read after row {number} ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
