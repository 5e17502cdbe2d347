"""Check that all ranks of a job were started with the same config and read the same data."""

from __future__ import annotations

import json
from dataclasses import asdict

import xxhash

from megatrain.config import TrainConfig
from megatrain.config.flatten import flatten
from megatrain.distributed.world import World
from megatrain.errors import ConfigError

HOST_SPECIFIC = ("launch.", "data.dir", "data.workers", "run.dir", "engine.nvme_path")
"""Prefixes of the keys that may differ between ranks."""


def check_agreement(config: TrainConfig, dataset_fingerprint: str, world: World) -> None:
    """Refuse to train if ranks have different configs or datasets.

    Raises:
        ConfigError: on every rank, naming the ranks and the first keys that differ from rank 0's.
    """
    mine = {key: value for key, value in flatten(asdict(config)).items() if not key.startswith(HOST_SPECIFIC)}
    mine["data (fingerprint)"] = dataset_fingerprint
    fingerprint = xxhash.xxh3_64_hexdigest(json.dumps(mine, sort_keys=True, default=str).encode())
    if len(set(world.all_gather_json(fingerprint))) == 1:
        return
    configs = world.all_gather_json(mine)
    differences = []
    for rank, other in enumerate(configs):
        keys = [key for key in {**configs[0], **other} if other.get(key) != configs[0].get(key)]
        differences += [f"rank {rank} has {key}={other.get(key)}, rank 0 {configs[0].get(key)}" for key in keys[:3]]
    raise ConfigError(
        f"the ranks disagree on the config: {'; '.join(differences[:8])}. Start all of them with the same command"
    )
