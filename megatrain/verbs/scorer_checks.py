"""Check that a path holds a reward model, by its config alone. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from megatrain.checkpoint.find import model_of, peek
from megatrain.errors import CheckpointError, ConfigError
from megatrain.interop.path_kind import kind_of
from megatrain.verbs.places import require

_WANTED = "give a reward model: a run of megatrain tune method=reward, a checkpoint of it, or an exported folder"


def check_scorer(given: str, key: str, path: Path) -> None:
    """Refuse a path without a reward model. `given` is the word of the command, `key` its key.

    Raises:
        ConfigError: there is no such path, or it holds no model, or a language model.
        CheckpointError: it is a run or a checkpoint that cannot be read.
    """
    require(key, path)
    kind = kind_of(path)
    if kind == "huggingface":
        if not _scores(path):
            raise ConfigError(f"{given}: a language model gives no score; {_WANTED}")
        return
    if kind not in ("run", "checkpoint"):
        raise ConfigError(f"{given}: it is {'a prepared dataset' if kind == 'dataset' else 'no model'}; {_WANTED}")
    found = peek(path)
    if found is None:
        raise CheckpointError(f"{given}: it holds no checkpoint that can be read; megatrain inspect {path} says why")
    if model_of(*found).output != "score":
        raise ConfigError(f"{given}: a language model gives no score; {_WANTED}")


def _scores(folder: Path) -> bool:
    """Return whether a Hugging Face folder says that its model scores; one that cannot be read is refused later."""
    try:
        classes = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return True
    return any(str(name).endswith("ForSequenceClassification") for name in classes)
