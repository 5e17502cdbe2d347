"""What a job asks of its machine: told before it starts, from the config, the dataset's card and the cores."""

from __future__ import annotations

import pytest

from megatrain.config.compose import compose
from megatrain.data.card import Card, SplitCard, TokenizerCard, fingerprint
from megatrain.distributed import visible_gpus
from megatrain.distributed.visible_gpus import Limit
from megatrain.errors import EnvironmentFault
from megatrain.verbs import resources


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Return a function that composes a job over a dataset of 10,000 tokens, on a machine with two cores."""
    splits = {"train": SplitCard(1, 40_000, 10_000, "uint16", 20_000, 34, "", [])}
    (tmp_path / "d").mkdir()
    Card("d", fingerprint(splits), splits, TokenizerCard("hf", "f", 500, 0)).save(tmp_path / "d")
    monkeypatch.setattr(resources, "usable_cores", lambda: 2)
    return lambda *words: compose(
        "train", ["model=tiny", "data=files", "data.name=d", f"data.dir={tmp_path}", "train.seq_len=64", *words]
    )


def told(config, has_gpu=False):
    return list(resources.warnings(config, has_gpu))


def test_a_job_that_fits_is_told_nothing(job):
    assert told(job("launch.nproc_per_node=2")) == []


def test_more_processes_than_cores(job):
    (warning,) = told(job("launch.nproc_per_node=64", "train.global_batch_size=64", "train.micro_batch_size=1"))
    assert "64 processes share 2 cores" in warning and "32 times" in warning
    assert told(job("launch.nproc_per_node=64", "train.global_batch_size=64"), has_gpu=True) == []


def test_a_step_that_reads_the_dataset_more_than_once(job):
    (warning,) = told(job("train.global_batch_size=400"))
    assert "25,600 tokens" in warning and "10,000" in warning and "2.6 times a step" in warning


def test_a_model_that_a_cpu_hardly_moves(job):
    config = job("model=llama_8b", "model.vocab_size=null", "train.global_batch_size=128")
    (warning,) = told(config)
    assert "llama_8b" in warning and "at least 14 minutes" in warning and "launch.device=cuda" in warning
    assert told(config, has_gpu=True) == []
    config.launch.num_nodes = 7
    assert "at least 2 minutes" in told(config)[0]
    config.precision.name = "bf16"
    assert told(config) == [], "a core with matrix units may be fast enough"


def test_gpus_that_slurm_gave_and_that_are_not_there(job):
    config, given = job(), {"SLURM_GPUS_ON_NODE": "8"}
    with pytest.raises(EnvironmentFault, match=r"SLURM_GPUS_ON_NODE=8.*launch\.device=cpu"):
        resources.check_gpus(config, False, given)
    with pytest.raises(EnvironmentFault, match="SLURM_JOB_GPUS=0"):
        resources.check_gpus(config, False, {"SLURM_JOB_GPUS": "0"})  # the GPU with index 0
    resources.check_gpus(config, True, given)
    resources.check_gpus(config, False, {"SLURM_GPUS_ON_NODE": "0"})
    resources.check_gpus(job("launch.device=cpu"), False, given)


def test_too_few_gpus_are_refused_before_the_ranks_start(job, monkeypatch):
    """A job on GPUs counts its ranks against what can be seen; a job that may use the CPU does not."""
    asked = []
    monkeypatch.setattr(visible_gpus, "limit", lambda environ: asked.append(environ) or Limit(1, "WHY", "DO"))
    resources.check_gpus(job("launch.device=cuda"), True, {})
    resources.check_gpus(job("launch.nproc_per_node=2"), False, {})
    message = r"launch\.device=cuda needs 2 GPUs on .*at most 1 can be used: WHY; DO, or give launch\.nproc_per_node=1$"
    with pytest.raises(EnvironmentFault, match=message):
        resources.check_gpus(job("launch.device=cuda", "launch.nproc_per_node=2"), True, {"A": "1"})
    assert asked == [{}, {"A": "1"}]
