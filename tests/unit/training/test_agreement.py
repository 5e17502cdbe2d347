"""Ranks that were started with other configs are refused before they train, with rank and key."""

from __future__ import annotations

import pytest
from support.ranks import run_ranks

from megatrain.config import TrainConfig
from megatrain.errors import ConfigError
from megatrain.training.agreement import check_agreement


def compare(world, key, value):
    """What rank 1 is told (and every other rank) when it alone has another value."""
    config = TrainConfig()
    fingerprint = "same"
    if world.rank == 1 and key == "fingerprint":
        fingerprint = value
    elif world.rank == 1:
        group, _, name = key.rpartition(".")
        setattr(getattr(config, group) if group else config, name, value)
    try:
        check_agreement(config, fingerprint, world)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("optim.lr", 0.5, "rank 1 has optim.lr=0.5, rank 0 0.0003"),
        ("seed", 7, "rank 1 has seed=7"),
        ("fingerprint", "other", "rank 1 has data (fingerprint)=other"),
        ("launch.timeout_s", 5.0, None),
        ("seed", TrainConfig().seed, None),
    ],
)
def test_every_rank_hears_who_disagrees_and_on_what(key, value, says):
    """All ranks raise, or a peer would wait for one that has gone; what may differ by host is no disagreement."""
    for told in run_ranks(compare, 3, key, value):
        assert (told is None) == (says is None)
        assert says is None or says in told
