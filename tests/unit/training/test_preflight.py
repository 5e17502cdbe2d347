"""What preflight reckons with, where no job is large enough to show it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatrain.config import ModelConfig, TrainConfig
from megatrain.training import preflight


@pytest.mark.parametrize("size", [2, 6000, 16384])
def test_the_all_reduce_of_thousands_of_ranks_has_an_exact_sum(size, monkeypatch):
    """In fp32 as the devices add it, whatever the order: no healthy cluster is refused."""
    monkeypatch.setattr(preflight, "ELEMENTS", 1)
    monkeypatch.setattr(preflight, "REPEATS", 1)

    def add_all(values):
        for rank in range(1, size):  # one after the other, as a ring does
            values += torch.ones(1) * preflight._addend(rank)

    world = SimpleNamespace(
        rank=0,
        size=size,
        device=torch.device("cpu"),
        barrier=lambda: None,
        all_reduce_sum=add_all,
        all_gather_json=lambda value: [value],
    )
    assert preflight.check_all_reduce(world) > 0


@pytest.mark.parametrize(
    ("free", "model", "says"),
    [(40_000, {"hidden_size": 16}, "has 40.0 kB left"), (0, {"hidden_size": 1024}, "has 0 bytes left")],
)
def test_too_little_space_is_told_in_units_in_which_it_is_not_zero(tmp_path, monkeypatch, free, model, says):
    config = TrainConfig()
    config.model = ModelConfig(**{"num_layers": 1, "num_heads": 2, "vocab_size": 64, "max_seq_len": 8, **model})
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    problem = preflight.check_disk(config, tmp_path, SimpleNamespace(rank=0))
    assert says in problem and " 0.0" not in problem
