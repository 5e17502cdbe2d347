"""`megatrain evaluate`: a model's loss, perplexity and bits per byte on a prepared dataset or a text file.

The windows and the loss are those of the evaluation during training, so the results are comparable.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from megatrain.config import EvaluateConfig
from megatrain.data.batch import MicroBatch
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.loader import count_windows, heldout_batches
from megatrain.data.progress_line import LINE_EVERY_S
from megatrain.data.prompts import holds_prompts
from megatrain.distributed.devices import device_by_name
from megatrain.engine.common import evaluate as sum_losses
from megatrain.errors import ConfigError, DataError
from megatrain.interop.load_model import Loaded, load
from megatrain.kernels.choice import choose
from megatrain.training.evaluation import Evaluation
from megatrain.verbs.ensembles import build, load_others
from megatrain.verbs.evaluate_pairs import evaluate_pairs, print_pairs
from megatrain.verbs.evaluation_checks import EXAMPLES, TASKS, WIN_RATE, kind_of_evaluation
from megatrain.verbs.evaluation_sources import Source, mixed_sources, open_source
from megatrain.verbs.printer import Printer

OTHERS = {
    TASKS: "megatrain.verbs.evaluate_tasks:evaluate_tasks",
    EXAMPLES: "megatrain.verbs.evaluate_examples:evaluate_examples",
    WIN_RATE: "megatrain.verbs.evaluate_win_rate:evaluate_win_rate",
}
"""The functions of evaluations other than the loss on text, which are imported when they are called."""


@dataclass(frozen=True)
class Windows:
    """How text is read: `seq_len` tokens at a time (None: as many as the model takes), and what its documents see."""

    seq_len: int | None
    mask_documents: bool
    reset_positions: bool


@dataclass(frozen=True)
class MixedSource:
    """A source by its name in a mixture, as `Evaluation` takes it."""

    source: str
    opened: Source

    @property
    def weight(self) -> float:
        """The weight of its loss in the mean."""
        return self.opened.weight

    @property
    def bytes_per_token(self) -> float | None:
        """Mean UTF-8 bytes per token."""
        return self.opened.num_bytes / self.opened.num_tokens if self.opened.num_bytes else None


def evaluate(config: EvaluateConfig) -> None:
    """Score the models of `path` and `paths` by what the config asks for: their loss on text, or tasks.

    On a terminal a few lines or a table show the result. Elsewhere standard output gets one line of JSON (of several
    models `{"models": [...]}`), and standard error the lines.

    Raises:
        ConfigError: the dataset, tokenizer or sequence length does not fit the model.
        DataError: the dataset is damaged, or the text is not UTF-8.
        CheckpointError: there is no intact model.
    """
    kind = kind_of_evaluation(config)
    if kind in OTHERS:
        module, _, name = OTHERS[kind].partition(":")
        getattr(import_module(module), name)(config)
        return
    results = []
    for path in [config.path, *config.paths]:
        loaded = load(Path(path), config.step)
        others = load_others(loaded, config.ensemble)
        own = replace(config, path=path)
        if not others and (pairs := find_pairs(own, loaded)) is not None:
            seq_len = choose_sequence_length(own, [loaded], windows_of(loaded))
            results.append(evaluate_pairs(own, loaded, pairs, seq_len))
            print_pairs(results[-1])
        else:
            results.append(evaluate_loss(own, loaded, others))
            print_result(results[-1], " and ".join(model.describe() for model in (loaded, *others)))
    if not sys.stdout.isatty():
        print(json.dumps(results[0] if len(results) == 1 else {"models": results}), flush=True)
    if len(results) > 1:
        names = ("loss", "perplexity", "bits_per_byte", "accuracy")
        columns = [name for name in names if all(one.get(name) is not None for one in results)]
        rows = [[one["checkpoint"], *(f"{one[name]:.6f}" for name in columns)] for one in results]
        Printer(stderr=not sys.stdout.isatty()).table("side by side", ["model", *columns], rows)


def find_pairs(config: EvaluateConfig, loaded: Loaded) -> IndexedDataset | None:
    """Return the dataset to evaluate on if it has preference pairs, else None.

    Raises ConfigError if it has none, but the model has nothing else to be scored by.
    """
    if config.data is None or Path(config.data).is_dir():
        if mixed_sources(config, loaded):
            return None
        tokens = open_source(config, loaded).tokens
        if isinstance(tokens, IndexedDataset) and tokens.card.has_pairs:
            return tokens
        if isinstance(tokens, IndexedDataset) and holds_prompts(tokens.card):
            raise ConfigError(
                f"{tokens.card.name} holds prompts without replies, which give no loss; give data=<a dataset or a text "
                "file>, or judge what the model writes: prompts=<a file> judge=<a reward> paths=[<another model>]"
            )
    if loaded.config.output == "score":
        raise ConfigError(
            f"{loaded.folder} is a reward model, which gives no token a probability; give data=<a dataset of pairs>, "
            "prepared with data=pairs"
        )
    return None


def evaluate_loss(
    config: EvaluateConfig, loaded: Loaded, others: Sequence[Loaded] = (), windows: Windows | None = None
) -> dict[str, Any]:
    """Return the scores of a model on text, or of its ensemble with others. It reads in its own windows, or in others.

    `loss` is the mean cross-entropy in nats a token, end-of-document tokens included. `bits_per_byte` is
    loss x tokens / (ln 2 x bytes); the bytes are those of the normalised text, as in a dataset's card. A model that was
    trained on a mixture gets these scores for each of its sources, and their weighted mean as training has it.
    """
    mixture = mixed_sources(config, loaded)
    sources = mixture or {"": open_source(config, loaded)}
    windows = windows or windows_of(loaded)
    seq_len = choose_sequence_length(config, [loaded, *others], windows)
    device = device_by_name(config.device)
    ends = {name: find_end_of_document(windows, source) for name, source in sources.items()}
    mode = "reference" if loaded.run_config().get("kernels") == "reference" else "auto"
    model = build([loaded, *others], device, choose(mode, device, torch.float32, loaded.config.hidden_size, False))
    started = time.perf_counter()
    scores, total = {}, Evaluation()
    for name, source in sources.items():
        num_batches = -(-count_windows(source.tokens, seq_len) // config.batch_size)
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
            end_of_document=ends[name],
            reset_positions=windows.reset_positions,
        )
        what = f"evaluating {name}".strip()
        loss_sum, tokens = sum_losses(model, _with_progress(batches, num_batches, what), device)
        if mixture and not tokens:
            print(f"note: {name}: no token counts in the loss, so it is left out of the mean", file=sys.stderr)
            continue
        scores[name] = compute_scores(float(loss_sum), int(tokens), source)
        total.add(MixedSource(name, source), float(loss_sum), int(tokens))
    if not scores:
        raise DataError(f"no token of {', '.join(sources)} counts in the loss; give split=train, or another data=...")
    result = {
        "checkpoint": str(loaded.folder),
        "step": loaded.manifest.step if loaded.manifest else None,
        "data": f"the mixture of {', '.join(sources)} ({config.split})" if mixture else sources[""].name,
        "seq_len": seq_len,
        **(mean_scores(total, scores) if mixture else scores[""]),
        "seconds": time.perf_counter() - started,
    }
    if mixture:
        weights = sum(sources[name].weight for name in scores)
        result["sources"] = {
            name: {"weight": sources[name].weight / weights, **found} for name, found in scores.items()
        }
    if others:
        result["ensemble"] = [str(other.folder) for other in others]
    return result


def mean_scores(total: Evaluation, scores: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the scores of a mixture: the weighted mean of its sources' losses, as in training, and their sums."""
    sizes = [found["bytes"] for found in scores.values()]
    detail = total.detail()
    return {
        "loss": detail["heldout_loss"],
        "perplexity": detail["perplexity"],
        "bits_per_byte": detail.get("bits_per_byte"),
        "tokens": total.tokens,
        "bytes": None if None in sizes else sum(sizes),
    }


def compute_scores(loss_sum: float, tokens: int, source: Source) -> dict[str, Any]:
    """Return loss, perplexity and bits per byte of `tokens` labels whose cross-entropies sum to `loss_sum` nats.

    Raises DataError if there is no label.
    """
    if not tokens:
        raise DataError(f"{source.name}: no token of what was read counts in the loss; read more with max_batches=null")
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


def print_result(result: dict[str, Any], who: str) -> None:
    """Print a summary for people, on standard error where standard output is for programs."""
    bits, num_bytes = result["bits_per_byte"], result["bytes"]
    lines = [
        f"{who} on {result['data']}",
        f"  loss           {result['loss']:.6f} nats per token",
        f"  perplexity     {result['perplexity']:.4f}",
        f"  bits per byte  {f'{bits:.6f}' if bits is not None else 'unknown, like the size of the text'}",
        f"  tokens         {result['tokens']:,}",
        f"  bytes          {f'{num_bytes:,}' if num_bytes is not None else 'unknown'}",
        f"  seconds        {result['seconds']:.2f}",
    ]
    for name, found in result.get("sources", {}).items():
        bits = found["bits_per_byte"]
        lines.append(
            f"  {name}: loss {found['loss']:.6f}, perplexity {found['perplexity']:.4f}, bits per byte "
            f"{f'{bits:.6f}' if bits is not None else 'unknown'}, weight {found['weight']:.1%}"
        )
    print("\n".join(lines), file=sys.stdout if sys.stdout.isatty() else sys.stderr, flush=True)


def windows_of(loaded: Loaded) -> Windows:
    """Return how a model read its text in training; of one that records no training, whole windows."""
    loop = loaded.run_config().get("train", {})
    return Windows(loop.get("seq_len"), bool(loop.get("mask_documents")), bool(loop.get("reset_positions")))


def choose_sequence_length(config: EvaluateConfig, models: Sequence[Loaded], windows: Windows) -> int:
    """Return `seq_len`, or that of `windows`, or the models' maximum. Raises ConfigError above the maximum."""
    longest = min(model.config.max_seq_len for model in models)
    seq_len = config.seq_len or windows.seq_len or longest
    if seq_len > longest:
        raise ConfigError(f"seq_len={seq_len} is longer than the model's maximum; give seq_len={longest} or less")
    return int(seq_len)


def find_end_of_document(windows: Windows, source: Source) -> int | None:
    """Return the token that ends a document, or None if `windows` are read without `train.mask_documents`.

    Raises ConfigError if it is needed but unknown.
    """
    if not windows.mask_documents:
        return None
    if source.end_of_document is None:
        raise ConfigError(
            f"data: the model was trained with train.mask_documents=true, but {source.name} has no tokenizer, so "
            f"the ends of its documents are unknown; give data=<a text file or a dataset prepared with the "
            "model's tokenizer>"
        )
    return source.end_of_document


def _with_progress(batches: Iterable[MicroBatch], total: int, what: str) -> Iterable[MicroBatch]:
    """Return the batches, shown as a bar on a terminal, else as a line every `LINE_EVERY_S`."""
    console = Console(stderr=True)
    if console.is_terminal:
        return track(batches, what, total=total, console=console, transient=True)
    return _with_lines(batches, total, what)


def _with_lines(batches: Iterable[MicroBatch], total: int, what: str) -> Iterator[MicroBatch]:
    told = time.monotonic()
    for done, batch in enumerate(batches):
        if time.monotonic() - told >= LINE_EVERY_S:
            told = time.monotonic()
            print(f"{what}: {done:,}/{total:,} batches ({100 * done / total:.0f}%)", file=sys.stderr, flush=True)
        yield batch
