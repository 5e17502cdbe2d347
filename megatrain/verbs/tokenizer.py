"""`megatrain tokenizer`: train a tokenizer on a sample of a corpus or of a mixture."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from megatrain.config import TrainTokenizerConfig
from megatrain.config.compose import read_overrides
from megatrain.config.data_config import CHAT_KINDS
from megatrain.config.suggest import next_step
from megatrain.config.tokenizer_config import SMALLEST_VOCABULARY
from megatrain.config.values import quoted
from megatrain.data.corpus.worker_pool import Workers
from megatrain.data.samples import BEST_FIT
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_card import TrainedTokenizerCard
from megatrain.data.tokenizer_sample import TextSample, draw_sample
from megatrain.data.tokenizer_training import check_training, train_tokenizer
from megatrain.distributed.rank_environment import usable_cores
from megatrain.errors import ConfigError, DataError, EnvironmentFault, cannot_write, how_to_install
from megatrain.interop.hf_tokenizer import export_tokenizer
from megatrain.resilience.atomic_file import remove_abandoned, sync_path, temporary_name
from megatrain.verbs.path_checks import check_writable, refuse_existing

_LONGEST = 10**6
"""`model_max_length` for transformers: a tokenizer has no limit of its own."""


_OF_DATASETS = ("data.heldout_fraction", "data.fim_spm_rate", "data.fim_tokens")
"""Keys that some choices of data set, and that have no effect here: refused where the command line gives them."""


def tokenizer(config: TrainTokenizerConfig, overrides: Sequence[str] = ()) -> Path:
    """Train the tokenizer that the config describes, say what to type next, and return its folder.

    `overrides` are those of the command line, and part of `config` already. The folder has the tokenizer, a
    tokenizer.json for transformers' `AutoTokenizer`, and a card. The same text, settings and seed give the same bytes,
    whatever the number of workers.

    Raises:
        ConfigError: settings or paths are wrong, or `out` exists or cannot be made.
        DataError: the text is damaged, or too little for a vocabulary of this size.
        EnvironmentFault: a library is missing, or the disk is full.
    """
    out = Path(config.out)
    refuse_existing(out)
    check_writable("out", out)
    if config.tokenizer.path:
        raise ConfigError("tokenizer.path: names a tokenizer that is trained already; leave it out to train one")
    if config.data.kind in CHAT_KINDS:
        raise ConfigError(
            f"data={config.data.kind}: messages are laid out by a trained tokenizer; to train one, give text "
            "(data=files)"
        )
    if config.clean.dedup == "minhash":
        raise ConfigError("clean.dedup=minhash: of a tokenizer's sample only equal documents are dropped; give exact")
    ignored = {
        "clean.dedup_passages": config.clean.dedup_passages != "none",
        "data.fim_rate": config.data.fim_rate > 0,
        "data.write_text": config.data.write_text,
        "data.chat_template": config.data.chat_template is not None,
        "data.deduplicate": not config.data.deduplicate,
        "data.packing": config.data.packing == BEST_FIT,
        "data.overwrite": config.data.overwrite,
    }
    ignored |= dict.fromkeys(set(_OF_DATASETS) & set(read_overrides("tokenizer", list(overrides)).values), True)
    if given := [key for key, is_given in ignored.items() if is_given]:
        raise ConfigError(f"{given[0]}: has no effect on a tokenizer's sample; leave it out")
    check_training(config.tokenizer)
    if find_spec("transformers") is None:  # before the work
        raise EnvironmentFault(f"megatrain tokenizer needs transformers: {how_to_install('hf')}")
    with Workers(config.data.workers or usable_cores()) as pool:
        sample = draw_sample(config, pool)
    trained = train_tokenizer(iter(sample), config.tokenizer, config.data.bos)
    _check_size(trained, config, sample)
    try:
        _write(trained, TrainedTokenizerCard.of(trained, config, sample), out)
    except OSError as error:
        raise cannot_write(out, error, "out") from error
    size = sum(given.num_bytes for given in sample.sources.values()) / 1e6
    use = ["megatrain", "prepare", "data=...", f"tokenizer={trained.kind}", quoted("tokenizer.path", config.out)]
    compare = ["megatrain", "tokenizers", "<text>", f"tokenizers=[{config.out}]"]
    print(
        f"{out}: trained {trained.vocab_size:,} tokens on {size:.1f} MB of text, fingerprint {trained.fingerprint}\n"
        + next_step(shlex.join(use), shlex.join(compare)),
        file=sys.stderr,
    )
    return out


def _check_size(trained: Tokenizer, config: TrainTokenizerConfig, sample: TextSample) -> None:
    """Raise `DataError` if the sample has fewer tokens than are asked for."""
    asked, found = config.tokenizer.vocab_size, trained.vocab_size
    if found >= asked:
        return
    size = sum(given.num_bytes for given in sample.sources.values())
    more = (
        f"raise tokenizer.train_bytes={config.tokenizer.train_bytes}"
        if size >= config.tokenizer.train_bytes * 0.99
        else "train on more text"
    )
    smaller = f"give tokenizer.vocab_size={found} or less, or " if found >= SMALLEST_VOCABULARY else ""
    raise DataError(
        f"tokenizer.vocab_size={asked}: the sample of {size:,} bytes supports only {found} tokens; {smaller}{more}"
    )


def _write(trained: Tokenizer, card: TrainedTokenizerCard, out: Path) -> None:
    """Write the folder, atomically."""
    remove_abandoned(out.parent)
    partial, own = temporary_name(out), temporary_name(out)
    try:
        own.mkdir(parents=True)
        partial.mkdir()
        trained.save(own)
        export_tokenizer(own, partial, _LONGEST)
        card.save(partial)
        os.rename(partial, out)
        sync_path(out.parent)
    finally:
        for folder in (own, partial):
            shutil.rmtree(folder, ignore_errors=True)
