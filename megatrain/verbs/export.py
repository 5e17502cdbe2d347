"""`megatrain export` and `megatrain import`: between our checkpoints and Hugging Face folders.

The conversion itself is huggingface.py's. An imported checkpoint holds weights alone, so a run starts from it
(`checkpoint.init_from`) but cannot continue it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatrain.config import ExportConfig
from megatrain.errors import ConfigError
from megatrain.interop.huggingface import export_model
from megatrain.interop.load_model import Loaded, kind_of, load
from megatrain.model.count import num_parameters


def export_(config: ExportConfig) -> None:
    """Write the Hugging Face folder `out` of a run's newest valid checkpoint, or of one checkpoint.

    Raises:
        ConfigError: `out` exists or cannot be written, or no class of transformers computes this model.
        CheckpointError: no model that is whole.
    """
    out = Path(config.out)
    refuse_existing(out)
    if kind_of(Path(config.path)) == "huggingface":
        raise ConfigError(f"path={config.path} is a Hugging Face folder already")
    loaded = load(Path(config.path))
    tokenizer = loaded.need_tokenizer() if loaded.tokenizer else None
    try:
        export_model(
            loaded.config,
            loaded.weights,
            out,
            dtype=config.dtype,
            tokenizer_dir=loaded.tokenizer_dir,
            end_of_document=tokenizer.end_of_document if tokenizer else None,
        )
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({error.strerror})") from error
    report(loaded, out, config.dtype)


def refuse_existing(out: Path) -> None:
    """Nothing is overwritten. Raises ConfigError where there is something."""
    if out.exists():
        raise ConfigError(f"out={out} exists already; give a folder that does not, or remove it")


def report(loaded: Loaded, out: Path, dtype: str) -> None:
    """What was written, on standard error; the folder alone on standard output."""
    count = num_parameters(loaded.config)
    print(f"{loaded.describe()}: {count:,} parameters, {dtype}", file=sys.stderr)
    if loaded.tokenizer is None:
        print("  without a tokenizer: none was found", file=sys.stderr)
    print(out, flush=True)
