"""A native step never makes the host wait for the device.

On a GPU torch itself raises where the host waits. On a CPU, where nothing has to be waited for, the test counts the
reads that would wait on a GPU: `item()`, `bool()`, `float()`, `tolist()` and operators whose result has a size that
depends on values.
"""

from __future__ import annotations

import traceback
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megatrain
from megatrain.config import ModelConfig, TrainConfig
from megatrain.data.batch import MicroBatch
from megatrain.distributed.world import World
from megatrain.engine.native import NativeEngine
from megatrain.kernels.adamw_update import adamw_step_
from megatrain.kernels.attention import Documents
from megatrain.optim.objective import NextToken

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")


PACKAGE = str(Path(megatrain.__file__).parent)
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2}
"""Operators that hand values, or a size that depends on them, to the host."""

ON_THE_HOST = {NextToken.count.__name__, adamw_step_.__name__}
"""Functions that may read: the labels before they are moved to the device, and what a kernel does on a GPU."""


class HostReads(TorchDispatchMode):
    """Records who reads a tensor's values: the innermost function of megatrain."""

    def __init__(self):
        super().__init__()
        self.readers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in READS:
            stack = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
            self.readers.append(next((frame.name for frame in reversed(stack) if frame.name[0] != "<"), "torch"))
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_waits():
    """Fail where the host waits for the device, or would wait if there were one."""
    if HAS_GPU:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with HostReads() as reads:
            yield
        assert set(reads.readers) <= ON_THE_HOST, f"these functions read a tensor of the device: {reads.readers}"


@pytest.mark.parametrize(
    ("norm", "compiled", "moments", "masked"),
    [
        ("rmsnorm", False, "fp32", True),
        ("rmsnorm", True, "bf16", False),
        ("layernorm", False, "bf16", False),
        ("layernorm", True, "fp32", True),
    ],
)  # every pair of the first three choices
def test_a_step_never_waits_for_the_device(norm, compiled, moments, masked):
    config = TrainConfig()
    config.model = ModelConfig(
        num_layers=2, num_heads=4, hidden_size=64, vocab_size=1003, norm=norm, max_seq_len=64,
        activation="swiglu" if norm == "rmsnorm" else "gelu", position="rope" if norm == "rmsnorm" else "learned",
    )  # fmt: skip
    config.engine.name, config.precision.name, config.compile = "native", "bf16", compiled
    config.optim.moments = moments
    config.train.micro_batch_size, config.train.global_batch_size, config.train.seq_len = 2, 4, 64
    engine = NativeEngine(config, World(0, 1, 0, DEVICE, None), NextToken())
    ids = torch.randint(0, 1003, (2, 65))
    documents = Documents([[1, 40, 23], [64]]) if masked else None
    batch = MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), documents=documents)
    if HAS_GPU:
        batch = batch.pin_memory()
    losses = []
    for step in range(1, 6):
        with no_host_waits() if step >= 4 else nullcontext():  # compiled and warm
            result = engine.train_step([batch, batch], 1e-3, step)
        losses.append(float(result.loss_sum) / int(result.tokens))
        assert bool(result.updated)
    assert losses[-1] < losses[0]
