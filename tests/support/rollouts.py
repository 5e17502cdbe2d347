"""A random language model, prompts and a reward, for runs that learn from their own replies."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from megatrain.checkpoint.manifest import Identity
from megatrain.checkpoint.store import write
from megatrain.config import ModelConfig, TokenizerConfig
from megatrain.data.train_byte_level_bpe import train_byte_level_bpe
from megatrain.model.init import build_model
from support.records import at

OWN = """
def vowels(completions, answer):
    return [sum(text.count(letter) for letter in "aeiou") / 8 for text in completions]
"""


def write_base_and_prompts(folder: Path) -> None:
    """Write `base`, `questions.jsonl` and the reward `own.py:vowels` into a folder."""
    texts = [f"What is number {n}? The answer is {n * 7}." for n in range(300)]
    config = TokenizerConfig(kind="byte_level_bpe", vocab_size=300, chat_template="chatml")
    tokenizer = train_byte_level_bpe(iter(texts), config)
    model = ModelConfig(
        num_layers=2, num_heads=2, num_kv_heads=2, hidden_size=32, ffn_size=48,
        vocab_size=tokenizer.vocab_size, max_seq_len=128, init_std=0.3,
    )  # fmt: skip
    (folder / "base").mkdir()
    tokenizer.save(folder / "base" / "tokenizer")
    state = {f"model.{key}": value.detach() for key, value in build_model(model, seed=5).named_parameters()}
    write(folder / "base", state, at(0, identity=Identity({"model": asdict(model)})), None)
    (folder / "own.py").write_text(OWN)
    lines = [json.dumps({"prompt": f"What is number {n}?", "answer": str(n * 7)}) for n in range(40)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
