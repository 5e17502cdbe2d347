"""What a run keeps beside its weights is taken again only where it still fits."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash

from megatrain.config import TrainConfig
from megatrain.errors import CheckpointError
from megatrain.training.reference import read_reference
from megatrain.training.rollouts import rollout_buffers


def test_a_reference_is_that_of_the_same_settings(tmp_path):
    """With a larger train.seq_len more pairs have log-probabilities; the missing ones would count as 0."""
    kept = np.array([[-1.0, -2.0]], "<f4")
    card = {
        "fingerprint": "data",
        "weights": 7,
        "settings": {"seq_len": 64},
        "checksum": xxhash.xxh3_128_hexdigest(kept.tobytes()),
    }
    (tmp_path / "reference.bin").write_bytes(kept.tobytes())
    (tmp_path / "reference.json").write_text(json.dumps(card))
    assert read_reference(tmp_path, "data", 7, {"seq_len": 128}) is None
    assert read_reference(tmp_path, "data", 7, {"seq_len": 64}).tolist() == kept.tolist()
    assert read_reference(tmp_path, "data", 7).tolist() == kept.tolist()


def test_a_rollout_is_continued_with_its_own_number_of_replies_only():
    config = TrainConfig()
    config.method.name, config.method.updates, config.train.global_batch_size = "grpo", 4, 8
    entry = SimpleNamespace(shape=(8, 2), dtype="int64")
    manifest = SimpleNamespace(step=6, tensors={"buffer.rollout.bounds": entry})
    assert rollout_buffers(config, manifest)["buffer.rollout.bounds"].shape == (8, 2)
    config.train.global_batch_size = 16
    with pytest.raises(CheckpointError, match="step 6 lies in the middle of a rollout of 8 replies"):
        rollout_buffers(config, manifest)
