"""`megatrain evaluate`: a model's loss, perplexity and bits per byte on a prepared dataset or a text file.

The windows and the loss are those of the evaluation during training, so the results are comparable.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from megatrain.checkpoint.find import own_dataset
from megatrain.config import EvaluateConfig
from megatrain.data.batch import MicroBatch
from megatrain.data.corpus.normalise import normalise
from megatrain.data.dataset import Dataset
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.loader import heldout_batches
from megatrain.data.progress_line import LINE_EVERY_S
from megatrain.data.tokenizer import Tokenizer
from megatrain.distributed.devices import device_by_name
from megatrain.engine.common import evaluate as sum_losses
from megatrain.errors import ConfigError, DataError
from megatrain.interop.load_model import Loaded, load
from megatrain.kernels.choice import choose


@dataclass(frozen=True)
class Source:
    """What to evaluate on.

    `num_tokens` tokens encode a text of `num_bytes` UTF-8 bytes (None if unknown). `end_of_document` is the token that
    ends a document (None if unknown).
    """

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
    """Print the result: a few lines on a terminal; elsewhere one line of JSON, and the lines on standard error.

    `loss` is the mean cross-entropy in nats a token, end-of-document tokens included. `bits_per_byte` is
    loss x tokens / (ln 2 x bytes); the bytes are those of the normalised text, as in a dataset's card.

    Raises:
        ConfigError: the dataset, tokenizer or sequence length does not fit the model.
        DataError: the dataset is damaged, or the text is not UTF-8.
        CheckpointError: there is no intact model.
    """
    loaded = load(Path(config.path), config.step)
    source = open_source(config, loaded)
    seq_len = choose_sequence_length(config, loaded)
    device = device_by_name(config.device)
    end = find_end_of_document(loaded, source)
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
    loss_sum, tokens = sum_losses(model, _with_progress(batches, num_batches), device)
    seconds = time.perf_counter() - started
    result = {
        "checkpoint": str(loaded.folder),
        "step": loaded.manifest.step if loaded.manifest else None,
        "data": source.name,
        "seq_len": seq_len,
        **compute_scores(float(loss_sum), int(tokens), source),
        "seconds": seconds,
    }
    print_result(result, loaded)


def compute_scores(loss_sum: float, tokens: int, source: Source) -> dict[str, Any]:
    """Return loss, perplexity and bits per byte of `tokens` labels whose cross-entropies sum to `loss_sum` nats."""
    loss = loss_sum / tokens
    bits_per_byte = num_bytes = None
    if source.num_bytes:
        bits_per_byte = loss * source.num_tokens / (math.log(2) * source.num_bytes)
        whole = tokens >= source.num_tokens - 1  # a dataset's first token is never predicted
        num_bytes = source.num_bytes if whole else round(source.num_bytes * tokens / source.num_tokens)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": bits_per_byte,
        "tokens": tokens,
        "bytes": num_bytes,
    }


def print_result(result: dict[str, Any], loaded: Loaded) -> None:
    """Print a summary for people; where standard output is no terminal, it gets JSON for programs instead."""
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
    to_terminal = sys.stdout.isatty()
    print("\n".join(lines), file=sys.stdout if to_terminal else sys.stderr, flush=True)
    if not to_terminal:
        print(json.dumps(result), flush=True)


def choose_sequence_length(config: EvaluateConfig, loaded: Loaded) -> int:
    """Return `seq_len`, or that of training, or the model's maximum. Raises ConfigError above the maximum."""
    longest = loaded.config.max_seq_len
    seq_len = config.seq_len or loaded.run_config().get("train", {}).get("seq_len") or longest
    if seq_len > longest:
        raise ConfigError(f"seq_len={seq_len} is longer than the model's maximum; give seq_len={longest} or less")
    return int(seq_len)


def find_end_of_document(loaded: Loaded, source: Source) -> int | None:
    """Return the token that ends a document, or None if the model was trained without `train.mask_documents`.

    Raises ConfigError if it is needed but unknown.
    """
    if not loaded.run_config().get("train", {}).get("mask_documents"):
        return None
    if source.end_of_document is None:
        raise ConfigError(
            f"data: the model was trained with train.mask_documents=true, but {source.name} has no tokenizer, so "
            f"the ends of its documents are unknown; give data=<a text file or a dataset prepared with the "
            "model's tokenizer>"
        )
    return source.end_of_document


# ---------------------------------------------------------------------------------------------------- what to read


def open_source(config: EvaluateConfig, loaded: Loaded) -> Source:
    """Open the text to evaluate on: `data`, or the dataset of the model's run."""
    if config.data is None:
        return open_dataset(training_dataset(loaded), config.split, loaded)
    path = Path(config.data)
    if path.is_dir():
        return open_dataset(path, config.split, loaded)
    return open_text(path, loaded.need_tokenizer())


def open_dataset(folder: Path, split: str, loaded: Loaded) -> Source:
    """Open a split of a prepared dataset. Raises ConfigError if it was made with another tokenizer."""
    dataset = IndexedDataset.open(folder, split, verify=True)
    theirs, ours = dataset.card.tokenizer, loaded.tokenizer
    if theirs and ours and theirs.fingerprint != ours.fingerprint:
        raise ConfigError(
            f"data={folder} was prepared with another tokenizer than the model's (fingerprints "
            f"{theirs.fingerprint} and {ours.fingerprint}), so its ids mean other text; give the text itself "
            f"(data=<file>) or prepare it with tokenizer.path={loaded.tokenizer_dir}"
        )
    if dataset.num_tokens < 2:
        raise DataError(f"{dataset.name}: {dataset.num_tokens} tokens are too few to predict any; give a larger split")
    end = dataset.card.tokenizer.end_of_document if dataset.card.tokenizer else None
    return Source(f"{folder} ({split})", dataset, dataset.split_card.bytes, dataset.num_tokens, end)


def open_text(path: Path, tokenizer: Tokenizer) -> Source:
    """Open a text file as one document that follows BOS (if the model's documents do) or an end of document.

    That token is given; the end of the document is predicted.
    """
    try:
        text = normalise(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start}); give a text file or a prepared dataset"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not text:
        raise DataError(f"{path} holds no text; give another file")
    end = tokenizer.end_of_document
    ids = [*(tokenizer.start() or [end]), *tokenizer.encode(text), end]
    return Source(str(path), TextTokens(path, ids), len(text.encode()), len(ids) - 1, end)


def training_dataset(loaded: Loaded) -> Path:
    """Return the dataset that the model was trained on.

    Raises ConfigError if there is none, DataError if it changed.
    """
    data = loaded.run_config().get("data")
    if loaded.manifest is None or not data:
        raise ConfigError(f"data: {loaded.folder} does not record a dataset; give data=<prepared dataset or text file>")
    if loaded.manifest.identity.mixture is not None:
        places = [place if "/" in place else str(Path(data["dir"]) / place) for place in data["mixture"]]
        raise ConfigError(
            f"data: the model was trained on a mixture; give one of its datasets: data={' or '.join(places)}"
        )
    folder = Path(data["dir"]) / str(data["name"])
    if not folder.exists():
        raise ConfigError(f"data: the run's dataset {folder} does not exist; give data=<prepared dataset or text file>")
    if own_dataset(loaded.manifest) is None:
        raise DataError(
            f"{folder} is no longer the dataset that the model was trained on (its fingerprint was "
            f"{loaded.manifest.identity.dataset_fingerprint}); give data={folder} to evaluate on it anyway"
        )
    return folder


def _with_progress(batches: Iterable[MicroBatch], total: int) -> Iterable[MicroBatch]:
    """Return the batches, shown as a bar on a terminal, else as a line every `LINE_EVERY_S`."""
    console = Console(stderr=True)
    if console.is_terminal:
        return track(batches, "evaluate", total=total, console=console, transient=True)
    return _with_lines(batches, total)


def _with_lines(batches: Iterable[MicroBatch], total: int) -> Iterator[MicroBatch]:
    told = time.monotonic()
    for done, batch in enumerate(batches):
        if time.monotonic() - told >= LINE_EVERY_S:
            told = time.monotonic()
            print(f"evaluate: {done} of {total} batches ({100 * done / total:.0f}%)", file=sys.stderr, flush=True)
        yield batch
