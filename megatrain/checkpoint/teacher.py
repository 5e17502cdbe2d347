"""Whether a model can be the teacher of a run (`method=distill`). Imports no torch."""

from __future__ import annotations

from pathlib import Path

from megatrain.checkpoint.find import model_of, peek, tokenizer_folder
from megatrain.config import ModelConfig, TrainConfig
from megatrain.data.card import Card
from megatrain.data.tokenizer import saved_meta
from megatrain.errors import ConfigError

KEY = "method.teacher"


def check_teacher(folder: Path, model: ModelConfig, tokenizer: str | None, config: TrainConfig, card: Card) -> None:
    """Refuse a teacher whose probabilities are of other tokens, or that cannot read the run's sequences.

    `model` and `tokenizer` (a fingerprint; None if unknown) are the teacher's. The run's vocabulary size is known.

    Raises:
        ConfigError: with both values.
    """
    mine, loop = config.model, config.train
    if model.output != mine.output:
        raise ConfigError(f"{KEY}={folder} is a reward model, which predicts no tokens; give a language model")
    theirs = card.tokenizer.fingerprint if card.tokenizer else None
    if model.vocab != mine.vocab:
        raise ConfigError(
            f"{KEY}={folder} has a vocabulary of {model.vocab:,} tokens, and the model one of {mine.vocab:,}; "
            "both must read the same tokens: give a teacher of the dataset's tokenizer, or prepare the data with the "
            "teacher's"
        )
    if None not in (theirs, tokenizer) and theirs != tokenizer:
        raise ConfigError(
            f"{KEY}={folder} has another tokenizer (fingerprint {tokenizer}) than the dataset {card.name} (fingerprint "
            f"{theirs}), so its probabilities are of other tokens; prepare the data with the teacher's tokenizer"
        )
    if model.max_seq_len < loop.seq_len:
        raise ConfigError(
            f"{KEY}={folder} reads at most {model.max_seq_len:,} tokens, fewer than train.seq_len={loop.seq_len}; give "
            f"train.seq_len={model.max_seq_len}"
        )
    cp = config.parallel.cp
    if cp > 1 and model.sliding_window is not None:
        raise ConfigError(f"{KEY}={folder} has a sliding window, which needs parallel.cp=1, given {cp}")
    if cp > 1 and config.parallel.cp_kind == "ulysses" and (model.num_heads % cp or model.kv_heads % cp):
        raise ConfigError(
            f"{KEY}={folder} has {model.num_heads} heads and {model.kv_heads} key-value heads, which parallel.cp={cp} "
            "cannot divide; use parallel.cp_kind=ring, or another parallel.cp"
        )


def check_recorded_teacher(config: TrainConfig, card: Card) -> None:
    """Check the teacher of a run if it is a run or a checkpoint; ranks check a Hugging Face folder. Raises ConfigError.

    A checkpoint that cannot be read is left to the ranks, which say what is wrong.
    """
    found = peek(Path(str(config.method.teacher)))
    if found is None:
        return
    place = tokenizer_folder(*found)
    check_teacher(found[0], model_of(*found), saved_meta(place)["fingerprint"] if place else None, config, card)
