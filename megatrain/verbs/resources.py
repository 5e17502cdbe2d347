"""What a training job asks of this machine, against what the machine has. Imports no torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatrain.config import TrainConfig
from megatrain.data.card import Card, with_vocabulary
from megatrain.data.mixed_dataset import open_mixture
from megatrain.distributed import visible_gpus
from megatrain.distributed.rank_environment import usable_cores
from megatrain.errors import EnvironmentFault
from megatrain.model.count import flops_per_token
from megatrain.optim.schedule import samples_before

GPU_VARIABLES = ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
"""Variables that Slurm sets in a job that was given GPUs: their number, and their indices, which begin at 0."""

NO_GPUS = ("SLURM_GPUS_ON_NODE", "0")

CORE_FLOPS = 2e11
"""FLOP/s in fp32 that a core hardly exceeds: two fused multiply-adds of 16 numbers a cycle, at 3 GHz."""

LOW_PRECISION = 10
"""How many times faster a core with matrix units computes in 16 bits, at most."""

SLOW_STEP_S = 60.0


def check_gpus(config: TrainConfig, has_gpu: bool, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse to start ranks that would not find the GPUs they need, or that Slurm gave to this job.

    Raises:
        EnvironmentFault: `launch.device=cuda`, and fewer GPUs than ranks can be seen here; or `launch.device=auto`, and
            the GPUs that Slurm gave are not there.
    """
    needed, host = config.launch.nproc_per_node, socket.gethostname()
    found = visible_gpus.limit(environ) if config.launch.device == "cuda" else None
    if found is not None and found.most < needed:
        raise EnvironmentFault(visible_gpus.too_few("launch.device=cuda", needed, host, found))
    values = ((name, environ.get(name)) for name in GPU_VARIABLES)
    given = next((f"{name}={value}" for name, value in values if value and (name, value) != NO_GPUS), None)
    if config.launch.device == "auto" and not has_gpu and given:
        raise EnvironmentFault(
            f"Slurm gave this job GPUs on {host} ({given}), but there is no device /dev/nvidia*: its "
            f"driver is not loaded, or the container hides it; launch.device=cpu trains on the CPU all the same"
        )


def warnings(config: TrainConfig, has_gpu: bool) -> Iterator[str]:
    """Yield warnings about a job that is too large for its dataset or this machine. The dataset was checked before."""
    mixture = open_mixture(config, samples_before)
    folder = mixture.folder if mixture else Path(config.data.dir) / config.data.name
    card = mixture.card(config.data.name) if mixture else Card.load(folder)
    config = with_vocabulary(config, card, folder)
    loop, ranks, cores = config.train, config.launch.nproc_per_node, usable_cores()
    tokens = loop.global_batch_size * loop.seq_len
    available = card.splits["train"].tokens
    if tokens > available:
        yield (
            f"a step reads {tokens:,} tokens (train.global_batch_size={loop.global_batch_size} x "
            f"train.seq_len={loop.seq_len}), but "
            f"{config.data.name if mixture else folder} has {available:,} to train on: each is read "
            f"{tokens / available:.1f} times a step"
        )
    if has_gpu:
        return
    if ranks > cores:
        yield (
            f"launch.nproc_per_node={ranks} processes share {cores} cores and take turns: give {cores} or fewer, or "
            f"expect a step to take {ranks / cores:.0f} times as long as it would on {ranks} cores"
        )
    nodes = config.launch.num_nodes or 1
    rate = CORE_FLOPS * (1 if config.precision.name == "fp32" else LOW_PRECISION)
    least = tokens * flops_per_token(config.model, loop.seq_len, causal=True) / (rate * cores * nodes)
    if least > SLOW_STEP_S:
        yield (
            f"no GPU is used on {socket.gethostname()} (launch.device={config.launch.device}), and a step of "
            f"{tokens:,} tokens of {config.model.name} takes {cores} cores at least {least / 60:,.0f} minutes; "
            f"launch.device=cuda refuses to train without a GPU"
        )
