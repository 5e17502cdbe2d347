"""A dataset with a real tokenizer, a run of one native process on it, and checkpoints of random models."""

import logging
import random
import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from support.records import at

from megatrain.checkpoint.manifest import Identity
from megatrain.checkpoint.store import write
from megatrain.config import ModelConfig, TokenizerConfig, TrainConfig
from megatrain.data.card import Card, TokenizerCard, card_of_written, fingerprint
from megatrain.data.indexed import IndexedWriter
from megatrain.data.train_sentencepiece import train_sentencepiece
from megatrain.distributed.world import leave
from megatrain.model.init import build_model
from megatrain.training.rank import run

torch.set_num_threads(1)

SEQ_LEN = 16
MODELS = {
    "llama": {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "ffn_size": 48},
    "gpt2": {
        "num_layers": 2,
        "num_heads": 2,
        "hidden_size": 32,
        "norm": "layernorm",
        "position": "learned",
        "activation": "gelu",
        "bias": True,
        "tie_embeddings": True,
    },
}


def texts(count: int, seed: int) -> list[str]:
    """Return documents of words with some accents and symbols."""
    words = ["the", "naïve", "model", "reads", "東京", "and", "writes", "(self,", "value)", "->", "None:", "zürich\n"]
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(words, k=40)) for _ in range(count)]


@pytest.fixture(scope="session")
def tokenizer():
    return train_sentencepiece(iter(texts(50, 0)), TokenizerConfig(vocab_size=400))


@pytest.fixture(scope="session")
def prepare(tokenizer):
    """Return a function that writes a prepared dataset of documents of words: `prepare(folder, documents, heldout)`."""

    def write_dataset(folder: Path, train: list[str], heldout: list[str]) -> Path:
        folder.mkdir()
        cards = {}
        for split, documents in (("train", train), ("heldout", heldout)):
            writer = IndexedWriter(folder / split, np.dtype(np.uint16))
            for text in documents:
                ids = [*tokenizer.encode(text), tokenizer.end_of_document]
                writer.add(np.asarray(ids, dtype=np.uint16), np.array([len(ids)], np.int32))
            writer.finish()
            cards[split] = card_of_written(writer, sum(len(text.encode()) for text in documents))
        tokenizer.save(folder / "tokenizer")
        maker = TokenizerCard(tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.end_of_document)
        Card(name=folder.name, fingerprint=fingerprint(cards), splits=cards, tokenizer=maker).save(folder)
        return folder

    return write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, prepare) -> Path:
    """Return a prepared dataset of documents of words."""
    return prepare(tmp_path_factory.mktemp("data") / "words", texts(20, 1), texts(5, 2))


@pytest.fixture(scope="session")
def second_dataset(dataset, tmp_path_factory, prepare) -> Path:
    """Return a smaller dataset of the same tokenizer, in another folder."""
    return prepare(tmp_path_factory.mktemp("more_data") / "more", texts(9, 7), texts(3, 8))


def train(config: TrainConfig) -> int:
    """Run a job in this process and clean up after it."""
    caught = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    log = logging.getLogger("megatrain")
    handlers = list(log.handlers)
    try:
        return run(config)
    finally:
        leave()
        for number, handler in caught.items():
            signal.signal(number, handler)
        for handler in set(log.handlers) - set(handlers):
            log.removeHandler(handler)
            handler.close()


def job(dataset: Path, runs: Path, **changes) -> TrainConfig:
    """Return the config of a run of four steps that saves every second step and evaluates at the end."""
    config = TrainConfig()
    config.run.name, config.run.dir = "first", str(runs)
    config.model = ModelConfig(**MODELS["llama"], max_seq_len=64, init_std=0.1)
    config.data.name, config.data.dir = dataset.name, str(dataset.parent)
    config.engine.name, config.parallel.zero, config.tracking.name = "native", 0, "none"
    config.launch.device = "cpu"
    config.train.steps, config.train.seq_len, config.train.global_batch_size = 4, SEQ_LEN, 4
    config.checkpoint.every = 2
    for name, value in changes.items():
        group, _, key = name.partition("__")
        setattr(getattr(config, group), key, value)
    return config


@pytest.fixture(scope="session")
def make_job(dataset):
    """Return a function that returns the config of a changed `job` under a folder."""
    return lambda runs, **changes: job(dataset, runs, **changes)


@pytest.fixture(scope="session")
def run_job():
    """Return the function that runs a config in this process and returns the exit code."""
    return train


@pytest.fixture(scope="session")
def train_job(dataset):
    """Return a function that trains a changed `job` under a folder and returns its exit code."""
    return lambda runs, **changes: train(job(dataset, runs, **changes))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, train_job) -> Path:
    """Return the folder of a finished run. Tests must not change it."""
    runs = tmp_path_factory.mktemp("runs")
    assert train_job(runs) == 0
    return runs / "first"


@pytest.fixture(scope="session")
def family(tmp_path_factory, tokenizer):
    """Save a random model of a family with its tokenizer; return the checkpoint's folder, its config and the model."""
    known = {}

    def make(name: str):
        if name not in known:
            config = ModelConfig(**MODELS[name], vocab_size=tokenizer.vocab_size, max_seq_len=64, init_std=0.3)
            model = build_model(config, seed=5)
            folder = tmp_path_factory.mktemp(name) / "checkpoint"
            folder.mkdir()
            tokenizer.save(folder / "tokenizer")
            state = {f"model.{key}": value.detach() for key, value in model.named_parameters()}
            write(folder, state, at(0, identity=Identity({"model": asdict(config)})), None)
            known[name] = folder, config, model
        return known[name]

    return make
