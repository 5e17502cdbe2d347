"""A native step never has the host wait for a GPU. On a CPU, where there is nothing to wait for, that such a step learns."""

from __future__ import annotations

import pytest
import torch

from megatrain.config import ModelConfig, TrainConfig
from megatrain.data.batch import MicroBatch
from megatrain.distributed.world import World
from megatrain.engine.native import NativeEngine

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")


def watched(mode):
    """Has torch raise where the host waits, or not."""
    if HAS_GPU:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_a_step_hands_all_its_work_over_without_a_wait(norm, compiled, moments):
    config = TrainConfig()
    config.model = ModelConfig(
        num_layers=2, num_heads=4, hidden_size=64, vocab_size=1003, norm=norm, max_seq_len=64,
        activation="swiglu" if norm == "rmsnorm" else "gelu", position="rope" if norm == "rmsnorm" else "learned",
    )  # fmt: skip
    config.engine.name, config.precision.name, config.compile = "native", "bf16", compiled
    config.optim.moments = moments
    config.train.micro_batch_size, config.train.global_batch_size, config.train.seq_len = 2, 4, 64
    engine = NativeEngine(config, World(0, 1, 0, DEVICE, None))
    ids = torch.randint(0, 1003, (2, 65))
    batch = MicroBatch(*(t.contiguous().pin_memory() if HAS_GPU else t.contiguous() for t in (ids[:, :-1], ids[:, 1:])))
    losses = []
    for step in range(1, 6):
        if step == 4:  # compiled and warm
            watched("error")
        try:
            result = engine.train_step([batch, batch], 1e-3, step)
        finally:
            watched("default")
        losses.append(float(result.loss_sum) / int(result.tokens))
        assert bool(result.updated)
    assert losses[-1] < losses[0]
