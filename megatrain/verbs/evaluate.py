"""`megatrain evaluate`: a model's loss, perplexity and bits per byte on a prepared dataset or a text file.

The windows and the loss are those of the evaluation inside the training loop, so that the figures can be compared.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from megatrain.config import EvaluateConfig
from megatrain.data.batch import MicroBatch
from megatrain.data.dataset import Dataset
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.loader import heldout_batches
from megatrain.data.normalise import normalise
from megatrain.data.tokenizer import Tokenizer
from megatrain.distributed.devices import device_by_name
from megatrain.engine.common import evaluate as sum_over
from megatrain.errors import ConfigError, DataError
from megatrain.interop.load_model import Loaded, load, own_dataset
from megatrain.kernels.choice import choose


@dataclass(frozen=True)
class Source:
    """What is evaluated: its tokens, the UTF-8 bytes of its text (None where unknown), how many tokens stand for them, and the
    token that ends a document (None where unknown)."""

    name: str
    tokens: Dataset
    num_bytes: int | None
    num_tokens: int
    end_of_document: int | None


class TextTokens:
    """A text's token ids in memory, as a `Dataset`."""

    def __init__(self, path: Path, ids: list[int]) -> None:
        self.name = str(path)
        self.num_tokens = len(ids)
        self._ids = np.array(ids, dtype=np.int64)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return token ids `[start, start + count)`."""
        return self._ids[start : start + count].copy()

    def place(self, token: int) -> str:
        """Return the token's index; ids of a text have no offset in its file."""
        return f"token {token}"


def evaluate(config: EvaluateConfig) -> None:
    """Print the result: a few lines on standard error, one line of JSON on standard output.

    `loss` is the mean cross-entropy in nats a token, ends of documents included. `bits_per_byte` is that mean times the
    text's tokens over its bytes times ln 2; the bytes are those of the normalised text, as in a dataset's card.

    Raises:
        ConfigError: a dataset, tokenizer or sequence length that does not fit the model.
        DataError: a damaged dataset, or a text that is not UTF-8.
        CheckpointError: no model that is whole.
    """
    loaded = load(Path(config.path))
    source = open_source(config, loaded)
    seq_len = sequence_length(config, loaded)
    device = device_by_name(config.device)
    end = end_of_document(loaded, source)
    mode = "reference" if loaded.run_config().get("kernels") == "reference" else "auto"
    model = loaded.build(device, choose(mode, device, torch.float32, loaded.config.hidden_size, compiled=False))
    windows = -(-(source.tokens.num_tokens - 1) // seq_len)
    num_batches = -(-windows // config.batch_size)
    if config.max_batches is not None:
        num_batches = min(num_batches, config.max_batches)
    batches = heldout_batches(
        source.tokens,
        seq_len=seq_len,
        micro_batch_size=config.batch_size,
        dp_rank=0,
        dp_size=1,
        max_samples=num_batches * config.batch_size,
        vocab_size=loaded.config.vocab,
        end_of_document=end,
    )
    started = time.perf_counter()
    loss_sum, tokens = sum_over(model, _with_bar(batches, num_batches), device)
    seconds = time.perf_counter() - started
    result = {
        "checkpoint": str(loaded.folder),
        "step": loaded.manifest.step if loaded.manifest else None,
        "data": source.name,
        "seq_len": seq_len,
        **scores(float(loss_sum), int(tokens), source),
        "seconds": seconds,
    }
    show(result, loaded)


def scores(loss_sum: float, tokens: int, source: Source) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of `tokens` labels whose cross-entropy adds up to `loss_sum` nats."""
    loss = loss_sum / tokens
    bits_per_byte = num_bytes = None
    if source.num_bytes:
        bits_per_byte = loss * source.num_tokens / (math.log(2) * source.num_bytes)
        whole = tokens >= source.num_tokens - 1  # a dataset's first token is given, not predicted
        num_bytes = source.num_bytes if whole else round(source.num_bytes * tokens / source.num_tokens)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": bits_per_byte,
        "tokens": tokens,
        "bytes": num_bytes,
    }


def show(result: dict[str, Any], loaded: Loaded) -> None:
    """Lines for people on standard error, JSON for programs on standard output."""
    bits, num_bytes = result["bits_per_byte"], result["bytes"]
    lines = [
        f"{loaded.describe()} on {result['data']}",
        f"  loss           {result['loss']:.6f} nats a token",
        f"  perplexity     {result['perplexity']:.4f}",
        f"  bits per byte  {f'{bits:.6f}' if bits is not None else 'unknown: the size of the text is not recorded'}",
        f"  tokens         {result['tokens']:,}",
        f"  bytes          {f'{num_bytes:,}' if num_bytes is not None else 'unknown'}",
        f"  seconds        {result['seconds']:.2f}",
    ]
    print("\n".join(lines), file=sys.stderr)
    print(json.dumps(result), flush=True)


def sequence_length(config: EvaluateConfig, loaded: Loaded) -> int:
    """Tokens a window: as asked for, as in training, or the longest the model takes. Raises ConfigError beyond that."""
    longest = loaded.config.max_seq_len
    seq_len = config.seq_len or loaded.run_config().get("train", {}).get("seq_len") or longest
    if seq_len > longest:
        raise ConfigError(f"seq_len={seq_len} is longer than the model takes; give seq_len={longest} or less")
    return int(seq_len)


def end_of_document(loaded: Loaded, source: Source) -> int | None:
    """The token that ends a document, where the model was trained to see one document at a time. ConfigError if unknown."""
    if not loaded.run_config().get("train", {}).get("mask_documents"):
        return None
    if source.end_of_document is None:
        raise ConfigError(
            f"data: the model was trained with train.mask_documents=true, and {source.name} names no tokenizer, so that nobody "
            f"knows where its documents end; give data=<a text file or a dataset prepared with the model's tokenizer>"
        )
    return source.end_of_document


# ---------------------------------------------------------------------------------------------------- what to read


def open_source(config: EvaluateConfig, loaded: Loaded) -> Source:
    """The text to evaluate: `data`, or the run's own dataset."""
    if config.data is None:
        return open_dataset(_own_dataset(loaded), config.split, loaded)
    path = Path(config.data)
    if path.is_dir():
        return open_dataset(path, config.split, loaded)
    return open_text(path, loaded.need_tokenizer())


def open_dataset(folder: Path, split: str, loaded: Loaded) -> Source:
    """A split of a prepared dataset. Raises ConfigError where another tokenizer made it."""
    dataset = IndexedDataset.open(folder, split, verify=True)
    maker, mine = dataset.card.tokenizer, loaded.tokenizer
    if maker and mine and maker.fingerprint != mine.fingerprint:
        raise ConfigError(
            f"data={folder} was made by another tokenizer than the model's (fingerprints {maker.fingerprint} and "
            f"{mine.fingerprint}): its ids mean other text; give the text itself (data=<file>) or prepare it with "
            f"tokenizer.path={loaded.tokenizer_dir}"
        )
    if dataset.num_tokens < 2:
        raise DataError(f"{dataset.bin_path}: {dataset.num_tokens} tokens; there is nothing to predict")
    end = dataset.card.tokenizer.end_of_document if dataset.card.tokenizer else None
    return Source(f"{folder} ({split})", dataset, dataset.split_card.bytes, dataset.num_tokens, end)


def open_text(path: Path, tokenizer: Tokenizer) -> Source:
    """A text file as one document, between two end-of-document tokens: the first is given, the last is predicted."""
    try:
        text = normalise(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start}); give a text file or a prepared dataset"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not text:
        raise DataError(f"{path}: no text in it")
    end = tokenizer.end_of_document
    ids = [end, *tokenizer.encode(text), end]
    return Source(str(path), TextTokens(path, ids), len(text.encode()), len(ids) - 1, end)


def _own_dataset(loaded: Loaded) -> Path:
    """The dataset of the run that made the model. Raises ConfigError where it has none, DataError where it changed."""
    data = loaded.run_config().get("data")
    if loaded.manifest is None or not data:
        raise ConfigError(
            f"data: {loaded.folder} names no dataset of its own; give data=<prepared dataset or text file>"
        )
    folder = Path(data["dir"]) / data["name"]
    if not folder.exists():
        raise ConfigError(f"data: the run's dataset {folder} is not there; give data=<prepared dataset or text file>")
    if own_dataset(loaded.manifest) is None:
        raise DataError(
            f"{folder} is no longer the dataset that the model was trained on (its fingerprint was "
            f"{loaded.manifest.identity.dataset_fingerprint}); give data={folder} to evaluate on it all the same"
        )
    return folder


def _with_bar(batches: Iterable[MicroBatch], total: int) -> Iterable[MicroBatch]:
    console = Console(stderr=True)
    return track(batches, "evaluate", total=total, console=console, transient=True, disable=not console.is_terminal)
