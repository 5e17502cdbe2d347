"""Write what all programs in a comparison share: a dataset of random tokens in a folder, and the job as JSON.

This runs as its own process, so that the process that starts the programs imports neither torch nor the config. The
JSON has the checked config (model, optimizer, sizes), the path of the tokens, and the equivalent arguments of
`megatrain train`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatrain.config.compose import compose
from megatrain.data.card import Card, TokenizerCard, card_of_written, fingerprint
from megatrain.data.indexed import IndexedWriter, token_dtype
from megatrain.model.count import flops_per_token, num_parameters

VOCABULARY = 8192
"""The vocabulary if the config leaves it to a tokenizer."""

DOCUMENT = 1000
"""Tokens per document, unless the job's documents are masked."""

END = 0
"""The token that ends a document of a job whose documents are masked."""

MOST_TOKENS = 2**25
"""The dataset's size limit; a longer job reads the tokens more than once."""


def main() -> None:
    """Write the folder and print the job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chain", action="store_true", help="tokens that a model can learn to predict")
    parser.add_argument("--documents", type=int, help="mean tokens of a document, which an end token can tell apart")
    parser.add_argument("overrides", nargs="*", default=[])
    arguments = parser.parse_args()
    print(json.dumps(prepare(arguments.folder, arguments.overrides, arguments.chain, arguments.documents)))


def prepare(folder: Path, overrides: list[str], chain: bool = False, document: int | None = None) -> dict[str, object]:
    """Write the dataset `<folder>/data/random` and return the job.

    With `document`, each token ends a document with probability 1 / `document`, and `train.mask_documents` is possible.
    """
    words = ["data=files", "data.name=random", f"data.dir={folder / 'data'}", *overrides]
    config = compose("train", words)
    if config.model.vocab_size is None:
        words.append(f"model.vocab_size={VOCABULARY}")
        config = compose("train", words)
    loop = config.train
    needed = loop.steps * loop.global_batch_size * loop.seq_len + 1
    num_tokens = max(min(needed, MOST_TOKENS), loop.global_batch_size * loop.seq_len + 1)
    ids = (chained if chain else uniform)(num_tokens, config.model.vocab, config.seed)
    if document is None:
        ends = np.append(np.arange(DOCUMENT, len(ids), DOCUMENT), len(ids))
    else:
        ids[ids == END] = END + 1
        ids[np.random.default_rng(config.seed).random(len(ids)) < 1 / document] = END
        ids[-1] = END
        ends = np.flatnonzero(ids == END) + 1
    tokenizer = None if document is None else TokenizerCard("hf", "random", config.model.vocab, END)
    path = write(folder / "data" / "random", ids, ends, tokenizer)
    return {
        "words": words,
        "model": {**asdict(config.model), "kv_heads": config.model.kv_heads, "head_dim": config.model.head_dim}
        | {"ffn_dim": config.model.ffn_dim},
        "optim": asdict(config.optim),
        "precision": config.precision.name,
        "compile": config.compile,
        "seed": config.seed,
        "steps": loop.steps,
        "global_batch": loop.global_batch_size,
        "micro_batch": loop.micro_batch_size,
        "seq_len": loop.seq_len,
        "tokens": str(path),
        "dtype": ids.dtype.name,
        "num_parameters": num_parameters(config.model),
        "flops_per_token": flops_per_token(config.model, loop.seq_len),
    }


def uniform(num_tokens: int, vocab: int, seed: int) -> np.ndarray:
    """Return independent random tokens, in which nothing can be learned."""
    return np.random.default_rng(seed).integers(0, vocab, num_tokens).astype(token_dtype(vocab))


def chained(num_tokens: int, vocab: int, seed: int) -> np.ndarray:
    """Return tokens of which every eighth is random and each other one is a fixed permutation of its predecessor."""
    generator = np.random.default_rng(seed)
    follows = generator.permutation(vocab)
    rows = [generator.integers(0, vocab, -(-num_tokens // 8))]
    for _ in range(7):
        rows.append(follows[rows[-1]])
    return np.stack(rows, axis=1).reshape(-1)[:num_tokens].astype(token_dtype(vocab))


def write(folder: Path, ids: np.ndarray, ends: np.ndarray, tokenizer: TokenizerCard | None) -> Path:
    """Write a prepared dataset (docs/reference/data_format.md) whose documents end at `ends`; return its `.bin`."""
    folder.mkdir(parents=True)
    with IndexedWriter(folder / "train", ids.dtype) as writer:
        writer.add(ids, np.diff(ends, prepend=0))
        writer.finish()
    splits = {"train": card_of_written(writer, 2 * len(ids))}
    Card("random", fingerprint(splits), splits, tokenizer, {"kind": "random tokens"}).save(folder)
    return folder / "train.bin"


if __name__ == "__main__":
    main()
