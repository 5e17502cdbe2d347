"""The JSON config that DeepSpeed is given for a run."""

from __future__ import annotations

import pytest

from megatrain.config import EngineConfig, OptimConfig, ParallelConfig, PrecisionConfig, RunConfig, TrainConfig
from megatrain.config import TrainLoopConfig as Loop
from megatrain.engine.deepspeed_config import deepspeed_config, updates_blindly, wait_for_asynchronous_io
from megatrain.errors import EnvironmentFault


def config(zero=1, precision="bf16", **sections):
    return TrainConfig(
        parallel=sections.pop("parallel", ParallelConfig(zero=zero)),
        precision=PrecisionConfig(name=precision, reduce_dtype="fp32", accumulate_dtype="fp32"),
        train=Loop(micro_batch_size=3, global_batch_size=12),
        optim=OptimConfig(grad_clip=0.7),
        **sections,
    )


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_sizes_and_stage(zero):
    document = deepspeed_config(config(zero), num_micro_batches=4)
    assert document["train_micro_batch_size_per_gpu"] == 3 and document["gradient_accumulation_steps"] == 4
    assert "train_batch_size" not in document  # DeepSpeed miscounts it
    assert document["zero_optimization"]["stage"] == zero
    assert not document["zero_optimization"]["round_robin_gradients"]
    assert "offload_optimizer" not in document["zero_optimization"] and "tensor_parallel" not in document


@pytest.mark.parametrize(
    ("precision", "present"),
    [("fp32", {}), ("bf16", {"bf16"}), ("fp16", {"fp16"})],
)
def test_one_precision_is_switched_on(precision, present):
    document = deepspeed_config(config(precision=precision), 1)
    assert {"bf16", "fp16"} & document.keys() == set(present)
    assert document["communication_data_type"] == "fp32" and document["data_types"] == {"grad_accum_dtype": "fp32"}


def test_the_fp16_scale_is_static_so_that_our_rule_moves_it():
    document = deepspeed_config(config(precision="fp16"), 1)
    assert document["fp16"] == {"enabled": True, "loss_scale": PrecisionConfig().initial_loss_scale}


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_stage_0_in_fp32_is_clipped_by_our_engine(zero, precision):
    """There DeepSpeed would apply a non-finite update."""
    job = config(zero, precision)
    ours = zero == 0 and precision == "fp32"
    assert updates_blindly(job) == ours
    assert deepspeed_config(job, 1)["gradient_clipping"] == (0.0 if ours else 0.7)


def test_tensor_parallel_size_is_passed_on():
    document = deepspeed_config(config(parallel=ParallelConfig(zero=1, tp=2)), 1)
    assert document["tensor_parallel"] == {"autotp_size": 2}


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_offload_to_the_cpu_keeps_the_fused_optimizer(device, pinned):
    document = deepspeed_config(config(2, engine=EngineConfig(name="deepspeed", offload="cpu")), 1, device)
    zero = document["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": pinned} and "offload_param" not in zero
    assert document["zero_force_ds_cpu_optimizer"] is False


def nvme(run):
    engine = EngineConfig(name="deepspeed", offload="nvme", nvme_path="/disk", offload_parameters=True)
    return deepspeed_config(config(3, engine=engine, run=RunConfig(dir="runs", name=run)), 1)["zero_optimization"]


def test_offload_to_a_disk_has_one_folder_a_run():
    """The files have the same names in every run."""
    one, other = nvme("one"), nvme("other")
    assert one["offload_param"] == one["offload_optimizer"] and one["offload_optimizer"]["device"] == "nvme"
    assert one["offload_optimizer"]["nvme_path"].startswith("/disk/one-")
    assert one["offload_optimizer"]["nvme_path"] != other["offload_optimizer"]["nvme_path"]
    assert one == nvme("one")


class Accelerator:
    """Says whether the asynchronous I/O can be built."""

    def __init__(self, compatible):
        self.compatible = compatible

    def create_op_builder(self, name):
        return self

    def is_compatible(self, verbose):
        return self.compatible


def test_a_missing_libaio_is_named_with_its_remedy():
    with pytest.raises(EnvironmentFault, match="apt-get install libaio-dev"):
        wait_for_asynchronous_io(Accelerator(compatible=False), 1.0)


def test_a_lock_that_a_killed_build_left_ends_the_wait(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.utils.cpp_extension._get_build_directory", lambda name, verbose: str(tmp_path))
    wait_for_asynchronous_io(Accelerator(compatible=True), 0.01)
    (tmp_path / "lock").touch()
    with pytest.raises(EnvironmentFault, match="Remove it"):
        wait_for_asynchronous_io(Accelerator(compatible=True), 0.01)
