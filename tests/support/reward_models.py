"""A small reward model of random weights, with a tokenizer and a chat template of its own."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from megatrain.checkpoint.manifest import Identity
from megatrain.checkpoint.store import write
from megatrain.config import ModelConfig, TokenizerConfig
from megatrain.data.train_byte_level_bpe import train_byte_level_bpe
from megatrain.model.init import build_model
from support.records import at


def write_reward_model(folder: Path, seed: int = 3, output: str = "score", max_seq_len: int = 128) -> Path:
    """Write a checkpoint of a model with one score, and return its folder."""
    texts = ["Ask me for a word, a letter or a number, and I say it."] * 40
    config = TokenizerConfig(kind="byte_level_bpe", vocab_size=280, chat_template="llama3")
    tokenizer = train_byte_level_bpe(iter(texts), config)
    model = ModelConfig(
        num_layers=2, num_heads=2, num_kv_heads=1, hidden_size=16, ffn_size=24, init_std=0.5,
        vocab_size=tokenizer.vocab_size, max_seq_len=max_seq_len, output=output,
    )  # fmt: skip
    folder.mkdir(parents=True)
    tokenizer.save(folder / "tokenizer")
    state = {f"model.{name}": value.detach() for name, value in build_model(model, seed).named_parameters()}
    write(folder, state, at(0, identity=Identity({"model": asdict(model)})), None)
    return folder
