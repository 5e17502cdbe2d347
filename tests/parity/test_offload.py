"""Masters, moments and parameters in host memory or on a disk: DeepSpeed's offload gives the result of one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from support.jobs import batches, compare, gather, gpt2, layout_job, parity_steps
from support.ranks import run_ranks
from support.records import at

from megatrain.checkpoint.store import CheckpointStore, load_into, verify
from megatrain.engine.build import build_engine
from megatrain.parallel.rules import check

BUILD_S = 600
"""Seconds that the first rank may need to build DeepSpeed's asynchronous input and output."""


def has_libaio():
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible(verbose=False)


def on_disk(test):
    """Mark a test that needs DeepSpeed's asynchronous input and output, which is compiled at its first use."""
    reason = "engine.offload=nvme needs libaio: apt-get install libaio-dev g++"
    return pytest.mark.slow_build(pytest.mark.skipif(not has_libaio(), reason=reason)(test))


def job(place, zero, parameters, folder):
    """Return a job whose shards on two ranks exceed one megabyte, DeepSpeed's threshold for swapping."""
    config = layout_job("deepspeed", micro=4, zero=zero)
    config.model = gpt2(hidden_size=192, num_heads=4, num_layers=4)
    config.engine.offload, config.engine.offload_parameters = place, parameters
    config.engine.nvme_path = str(folder) if place == "nvme" else None
    check(config, 2)
    return config


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    config = layout_job(micro=8)
    config.model = gpt2(hidden_size=192, num_heads=4, num_layers=4)
    return run_ranks(parity_steps, 1, config, str(tmp_path_factory.mktemp("one")))[0]


@pytest.mark.parametrize(
    ("place", "zero", "parameters"),
    [
        ("cpu", 1, False),
        ("cpu", 2, False),
        ("cpu", 3, False),
        ("cpu", 3, True),
    ],
)
def test_offload_gives_the_result_of_one_process(place, zero, parameters, one_process, tmp_path):
    config = job(place, zero, parameters, tmp_path / "nvme")
    compare(run_ranks(parity_steps, 2, config, str(tmp_path), timeout_s=BUILD_S), one_process)


@on_disk
def test_offload_to_a_disk_gives_the_result_of_one_process(one_process, tmp_path):
    """The swapped tensors are on the disk."""
    config = job("nvme", 3, False, tmp_path / "nvme")
    compare(run_ranks(parity_steps, 2, config, str(tmp_path), timeout_s=BUILD_S), one_process)
    swapped = sum(path.stat().st_size for path in (tmp_path / "nvme").rglob("*.swp"))
    assert swapped >= 3 * 4 * 1.5e6, "masters and both moments of 1.8 million parameters"


def move(world, first, second, folder):
    """Run two steps and a save under `first`, then two more under `second` from its checkpoint; return losses and
    states."""
    told = []
    for config in (first, second):
        engine = build_engine(config, world)
        if told:
            saved = Path(folder) / "checkpoints" / "step_00000002"
            manifest = verify(saved, world)
            load_into(saved, manifest, engine.state(), world)
            engine.restore(manifest.counters)
        states = [gather(engine, Path(folder) / f"{len(told)}", world)]
        losses = []
        for step in (1, 2, 3, 4)[2 * bool(told) :]:
            if step == 3 and not told:
                CheckpointStore(Path(folder) / "checkpoints", world).save(engine.state(), at(2, engine.counters()))
                states.append(gather(engine, Path(folder) / "saved", world))
            result = engine.train_step(batches(config, step, world.rank, world.size), 1e-3, step)
            losses.append(float(result.loss_sum))
        told.append((losses, states))
    return told if world.rank == 0 else None


@on_disk
@pytest.mark.parametrize("order", ["to the disk", "from the disk"])
def test_a_checkpoint_moves_between_memory_and_disk_offload(order, tmp_path):
    """A run saved with shards in memory continues with shards on disk, and the reverse: bit-equal, the same losses."""
    configs = [job("none", 3, False, tmp_path), job("nvme", 3, False, tmp_path / "nvme")]
    first, second = configs if order == "to the disk" else reversed(configs)
    (losses, (_, saved)), (again, (loaded,)) = run_ranks(move, 2, first, second, str(tmp_path), timeout_s=BUILD_S)[0]
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in saved.items())
    assert again == pytest.approx(losses[2:], rel=1e-6)


@on_disk
def test_a_killed_build_does_not_block_forever(monkeypatch, tmp_path):
    """Its lock file is named once it is older than the longest wait."""
    from deepspeed.accelerator import get_accelerator

    from megatrain.engine.deepspeed_config import wait_for_asynchronous_io as _wait_for_asynchronous_io
    from megatrain.errors import EnvironmentFault

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (1, 1))
    with pytest.raises(EnvironmentFault, match=f"{lock} is older than launch.timeout_s=30 s"):
        _wait_for_asynchronous_io(get_accelerator(), 30)
    lock.unlink()
    _wait_for_asynchronous_io(get_accelerator(), 30)
