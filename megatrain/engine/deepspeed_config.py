"""Configure and start DeepSpeed for a run."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from megatrain.config import TrainConfig
from megatrain.distributed.world import World
from megatrain.errors import EnvironmentFault

_LOG = logging.getLogger("megatrain")


def deepspeed_config(config: TrainConfig, num_micro_batches: int, device: str = "cpu") -> dict[str, Any]:
    """Return DeepSpeed's JSON config for a run.

    It gives the micro-batch size and the accumulation steps, because DeepSpeed miscounts a global batch size.
    """
    precision = config.precision
    document: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        # at stage 0 in fp32 our engine clips, after it has checked the norm
        "gradient_clipping": 0.0 if updates_blindly(config) else config.optim.grad_clip,
        "zero_allow_untested_optimizer": config.optim.name != "adamw",
        "steps_per_print": 2**62,
        "communication_data_type": precision.reduce_dtype,
        "data_types": {"grad_accum_dtype": precision.accumulate_dtype},
        "zero_optimization": {
            "stage": config.parallel.zero,
            # DeepSpeed's linear function rounds bf16 differently from torch's
            "memory_efficient_linear": False,
            # this option's fragment mapping is wrong for some world sizes: a resume would load wrong moments
            "round_robin_gradients": False,
        },
    }
    if config.engine.offload != "none":
        place: dict[str, Any] = {"device": config.engine.offload, "pin_memory": device == "cuda"}
        if config.engine.offload == "nvme":  # one folder per run: every run uses the same file names
            assert config.engine.nvme_path is not None, "the layout table refuses nvme without a path"
            run = Path(config.run.dir, config.run.name or "run").absolute()
            folder = f"{run.name}-{xxhash.xxh3_64_hexdigest(str(run).encode())}"
            place["nvme_path"] = str(Path(config.engine.nvme_path) / folder)
        document["zero_optimization"]["offload_optimizer"] = place
        if config.engine.offload_parameters:
            document["zero_optimization"]["offload_param"] = place
        # torch's fused AdamW, which all other layouts use, also runs on host tensors
        document["zero_force_ds_cpu_optimizer"] = False
    if config.parallel.tp > 1:
        document["tensor_parallel"] = {"autotp_size": config.parallel.tp}
    if precision.name == "bf16":
        document["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if precision.name == "fp16":  # a static scale, which LossScaler changes
        document["fp16"] = {"enabled": True, "loss_scale": precision.initial_loss_scale}
    return document


def updates_blindly(config: TrainConfig) -> bool:
    """Whether DeepSpeed would apply a non-finite update: stage 0 in fp32 has no optimizer wrapper that checks."""
    return config.parallel.zero == 0 and config.precision.name == "fp32"


def wait_for_asynchronous_io(accelerator: Any, timeout_s: float) -> None:
    """Check that DeepSpeed can build its asynchronous I/O, and wait for other processes that are building it.

    Raises:
        EnvironmentFault: libaio is missing, or a killed build left its lock, for which torch would wait forever.
    """
    if not accelerator.create_op_builder("AsyncIOBuilder").is_compatible(verbose=False):
        raise EnvironmentFault(
            "engine.offload=nvme needs libaio's headers and a C++ compiler; on Debian and Ubuntu: apt-get install "
            "libaio-dev g++; or use engine.offload=cpu"
        )
    from torch.utils.cpp_extension import _get_build_directory

    for extension in ("pin_memory", "async_io"):
        lock = Path(_get_build_directory(extension, False)) / "lock"
        if lock.exists():
            _LOG.warning("waiting for another process to build %s (%s), %g s at most", extension, lock, timeout_s)
        started, age = time.monotonic(), 0.0
        with suppress(FileNotFoundError):
            age = time.time() - lock.stat().st_mtime  # read once: someone may set the clock while we wait
        while lock.exists():
            if age + time.monotonic() - started > timeout_s:
                raise EnvironmentFault(
                    f"{lock} is older than launch.timeout_s={timeout_s:g} s: a build that was killed left it. Remove it"
                )
            time.sleep(0.2)


def start_deepspeed(world: World) -> Any:
    """Import DeepSpeed, initialise it over the existing process group, and return its module."""
    os.environ["DS_ACCELERATOR"] = world.device.type
    os.environ["LOCAL_RANK"] = str(world.local_rank)  # DeepSpeed reads it even if the process group exists
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed's shared-memory all-reduce is for inference only, but the first start would compile it. A killed
    # compilation leaves a lock for which all later starts wait forever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=None, dist_init_required=False, verbose=False)
    return deepspeed
