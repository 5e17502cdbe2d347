"""The DeepSpeed engine: ZeRO 0 to 3 over data-parallel and context-parallel ranks, x tensor parallel (AutoTP's layers).

DeepSpeed reduces, shards and updates; what it leaves open is decided here: the loss is normalised by the tokens of the
whole step, the loss scale follows our one rule, non-finite gradients never reach the parameters (stage 0 in fp32 would
apply them), and every piece of state is exposed by its global coordinates.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from megatrain.checkpoint.manifest import EngineCounters
from megatrain.checkpoint.piece import Piece
from megatrain.config import TrainConfig
from megatrain.data.batch import MicroBatch
from megatrain.distributed.world import World
from megatrain.engine.common import (
    DTYPES,
    choose_kernels,
    compile_blocks,
    count_tokens,
    dropout_seed,
    engine_counters,
    evaluate,
    loss_factor,
    on_device,
    scaled_loss,
    sum_loss,
)
from megatrain.engine.protocol import StepResult
from megatrain.errors import EnvironmentFault
from megatrain.model.count import parameter_shapes
from megatrain.model.gpt import GPT
from megatrain.model.init import initial_block
from megatrain.optim.adamw import MOMENTS, adamw, parameter_groups
from megatrain.optim.loss_scale import LossScaler
from megatrain.parallel import plan
from megatrain.parallel.context import local_slice, make_attend
from megatrain.parallel.layout import Layout, num_micro_batches
from megatrain.parallel.mesh import make_groups
from megatrain.parallel.recompute import recompute_blocks

_LOG = logging.getLogger("megatrain")


def deepspeed_config(config: TrainConfig, num_micro_batches: int, device: str = "cpu") -> dict[str, Any]:
    """DeepSpeed's JSON config for a run. Sizes are given as micro batch and accumulation; a global one is miscounted."""
    precision = config.precision
    document: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        # stage 0 in fp32 is clipped here, after our own look at the norm
        "gradient_clipping": 0.0 if _updates_blindly(config) else config.optim.grad_clip,
        "zero_allow_untested_optimizer": False,
        "steps_per_print": 2**62,
        "communication_data_type": precision.reduce_dtype,
        "data_types": {"grad_accum_dtype": precision.accumulate_dtype},
        "zero_optimization": {
            "stage": config.parallel.zero,
            # its own linear function rounds bf16 differently from torch's
            "memory_efficient_linear": False,
            # the fragment mapping of this option is wrong for some world sizes, and a resume would load wrong moments
            "round_robin_gradients": False,
        },
    }
    if config.engine.offload != "none":
        place: dict[str, Any] = {"device": config.engine.offload, "pin_memory": device == "cuda"}
        if config.engine.offload == "nvme":  # a folder a run, for file names in it are the same in every run
            assert config.engine.nvme_path is not None, "the layout table refuses nvme without a path"
            run = Path(config.run.dir, config.run.name or "run").absolute()
            folder = f"{run.name}-{xxhash.xxh3_64_hexdigest(str(run).encode())}"
            place["nvme_path"] = str(Path(config.engine.nvme_path) / folder)
        document["zero_optimization"]["offload_optimizer"] = place
        if config.engine.offload_parameters:
            document["zero_optimization"]["offload_param"] = place
        # torch's fused AdamW runs on host tensors too, and is the one of every other layout
        document["zero_force_ds_cpu_optimizer"] = False
    if config.parallel.tp > 1:
        document["tensor_parallel"] = {"autotp_size": config.parallel.tp}
    if precision.name == "bf16":
        document["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if precision.name == "fp16":  # a static scale, which LossScaler moves
        document["fp16"] = {"enabled": True, "loss_scale": precision.initial_loss_scale}
    return document


def _updates_blindly(config: TrainConfig) -> bool:
    """Whether DeepSpeed would apply a non-finite update: stage 0 in fp32 has no optimizer wrapper that looks."""
    return config.parallel.zero == 0 and config.precision.name == "fp32"


def _wait_for_asynchronous_io(accelerator: Any, timeout_s: float) -> None:
    """See that DeepSpeed can build what reads and writes the disk, and that nobody's half-finished build blocks it.

    Raises:
        EnvironmentFault: libaio is missing, or the lock of a build that was killed is in the way: torch would wait for ever.
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
            age = time.time() - lock.stat().st_mtime  # once: while waiting, somebody may set the clock
        while lock.exists():
            if age + time.monotonic() - started > timeout_s:
                raise EnvironmentFault(
                    f"{lock} is older than launch.timeout_s={timeout_s:g} s: a build that was killed left it. Remove it"
                )
            time.sleep(0.2)


def _slots(name: str) -> list[tuple[str | None, str]]:
    """DeepSpeed's key and the checkpoint's for a parameter's master and its moments."""
    return [(None, f"model.{name}"), *((moment, f"optim.{moment}.{name}") for moment in MOMENTS)]


def start_deepspeed(world: World) -> Any:
    """Import DeepSpeed and put it over the process group that exists; returns its module."""
    os.environ["DS_ACCELERATOR"] = world.device.type
    os.environ["LOCAL_RANK"] = str(world.local_rank)  # DeepSpeed reads it whoever made the process group
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Its shared-memory all-reduce serves inference alone. It would be compiled at every first start, and a compilation
    # that was killed leaves a lock on which all later ones wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=None, dist_init_required=False, verbose=False)
    return deepspeed


class DeepSpeedEngine:
    """`Engine` over DeepSpeed's. The process group must exist already."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        deepspeed = start_deepspeed(world)
        from deepspeed.accelerator import get_accelerator

        if config.precision.name == "fp16" and not get_accelerator().is_fp16_supported():
            raise EnvironmentFault(
                f"precision=fp16 under engine=deepspeed needs a device with fp16 arithmetic, this {world.device.type} "
                f"has none; use precision=bf16 or precision=fp32"
            )
        if config.engine.offload == "nvme":
            _wait_for_asynchronous_io(get_accelerator(), config.launch.timeout_s)
        self.config = config
        self.world = world
        self.stage = config.parallel.zero
        self.scaler = LossScaler.from_config(config.precision)
        self.copies: dict[str, Tensor] = {}  # what `state` has read from a disk
        self.layout = Layout.of(config, world.size)
        self.place = self.layout.coordinate(world.rank)
        self.tensor_group = None
        if self.layout.tp > 1:
            from megatrain.parallel.autotp import make_tensor_group  # imports DeepSpeed, which needs the lines above

            self.tensor_group = make_tensor_group(self.layout.tp)
        document = deepspeed_config(
            config,
            num_micro_batches(config.train.global_batch_size, config.train.micro_batch_size, self.layout.dp),
            world.device.type,
        )
        model = self._build_model(deepspeed, document)
        recompute_blocks(model.blocks, config.train.recompute)
        self.shapes = parameter_shapes(config.model)
        self.shares = plan.shares(self.layout.grid.sizes, self.place._asdict())
        groups = parameter_groups(
            ((name, p, len(self.shapes[name])) for name, p in model.named_parameters()), config.optim
        )
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=adamw(groups, config.optim), config=document, dist_init_required=False
        )
        if self.tensor_group is not None:
            # at the first forward pass it would send every rank's batch through pickle to compare them; batch_hash tells
            self.engine.first_dataloader_check.remove()
        self.optimizer = self.engine.optimizer
        self.inner: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        self._materialise(step=0)
        self._initialise()
        if config.compile:
            compile_blocks(model)
        self.engine.train()

    def _build_model(self, deepspeed: Any, document: dict[str, Any]) -> GPT:
        """The model with memory but without values.

        A tensor rank makes its block of each layer in turn; under stage 3 without tensor ranks each parameter is cut as
        soon as it exists.
        """
        kernels = choose_kernels(self.config, self.world.device)
        if self.stage == 3 and self.tensor_group is None:
            # without a dtype it takes the config's; given float32 on a CPU it would choose bfloat16
            with deepspeed.zero.Init(config_dict_or_path=document):
                model = GPT(self.config.model, kernels)
            self._cut_sequences(model)
            return model
        with torch.device("meta"):
            model = GPT(self.config.model, kernels).to(DTYPES[self.config.precision.name])
        self._cut_sequences(model)
        if self.tensor_group is None:
            model.to_empty(device=self.world.device)
        else:
            from megatrain.parallel.autotp import cut_layers

            cut_layers(model, self.tensor_group, self.world.device)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)  # DeepSpeed compares and copies them before their values are filled in
        return model

    def _cut_sequences(self, model: GPT) -> None:
        """Context parallelism. To DeepSpeed context ranks are data ranks: they hold the same parameters."""
        if self.layout.cp > 1:
            context = make_groups(self.layout, self.world.rank, self.world.device).cp
            assert context is not None
            for block in model.blocks.children():
                block.attn.attend = make_attend(self.layout.cp_kind, context)  # type: ignore[union-attr]

    # ------------------------------------------------------------------------------------------- state

    def _masters(self) -> list[Tensor]:
        """The fp32 tensors that the inner optimizer updates."""
        return [p for group in self.inner.param_groups for p in group["params"]]

    def _flat_masters(self) -> list[Tensor]:
        for name in (
            "fp32_partitioned_groups_flat",  # stage 3
            "single_partition_of_fp32_groups",  # stages 1 and 2
            "fp32_groups_flat_partition",  # stage 1 in bf16 with fp32 accumulation
        ):
            if hasattr(self.optimizer, name):
                return list(getattr(self.optimizer, name))
        return self._masters()

    def _is_swapped(self, group: int) -> bool:
        """Whether a sub-group's masters and moments are on a disk (engine.offload=nvme), out of its update."""
        return self.stage == 3 and self.optimizer._swappable_optimizer_subgroup(group)

    @contextmanager
    def _resident(self, group: int) -> Iterator[None]:
        """A sub-group's masters and moments in memory, and written back to the disk they live on, if they do."""
        if not self._is_swapped(group):
            yield
            return
        self.optimizer._optimizer_states_and_gradient_swap_in(group)
        try:
            yield
        finally:
            self.optimizer._optimizer_states_and_gradient_swap_out(group)

    def _sub_groups(self) -> list[tuple[int, list[tuple[str, nn.Parameter]]]]:
        """The parameters by the sub-group that is updated, and swapped, at once; one group below stage 3."""
        members: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.engine.module.named_parameters():
            group = 0
            if self.stage == 3:
                group, *_ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            members.setdefault(group, []).append((name, parameter))
        return sorted(members.items())

    def _materialise(self, step: int) -> None:
        """Make AdamW's states, which are otherwise born in the first step, and set its step count."""
        for group, master in enumerate(self._flat_masters()):
            with self._resident(group):
                state = self.inner.state[master]
                for moment in MOMENTS:
                    if moment not in state:
                        state[moment] = torch.zeros_like(master)
                state["step"] = torch.tensor(float(step), dtype=torch.float32, device=master.device)
        if hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _fragment(self, parameter: Any, slot: str | None) -> tuple[Tensor, int]:
        """This rank's fp32 piece of a parameter (or of one of its moments), flat, and where it starts."""
        if hasattr(parameter, "ds_id"):  # stage 3
            group, offset, length = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            master = self.optimizer.fp32_partitioned_groups_flat[group]
            flat = (master.detach() if slot is None else self.inner.state[master][slot]).narrow(0, offset, length)
            start = self.optimizer._get_param_partition_rank(parameter) * flat.numel()
            held = max(0, min(start + flat.numel(), parameter.ds_numel) - start)
            return flat[:held], min(start, parameter.ds_numel)
        if hasattr(parameter, "_hp_mapping"):  # stages 1 and 2
            mapping = parameter._hp_mapping
            if mapping is None:
                return torch.empty(0, device=self.world.device), 0
            return mapping.get_hp_fragment(slot), mapping.lp_fragment_address.start
        master = self._whole_master(parameter)
        return (master.detach() if slot is None else self.inner.state[master][slot]).view(-1), 0

    def _whole_master(self, parameter: nn.Parameter) -> Tensor:
        """Stage 0: the fp32 copy of a low-precision parameter, or the parameter itself."""
        if hasattr(self.optimizer, "fp32_groups"):
            for low, high in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True):
                for candidate, master in zip(low, high, strict=True):
                    if candidate is parameter:
                        return master
        return parameter

    def state(self) -> dict[str, Tensor]:
        """See `Engine.state`."""
        state: dict[str, Tensor] = {}
        for group, members in self._sub_groups():
            with self._resident(group):
                for name, parameter in members:
                    for slot, key in _slots(name):
                        flat, start = self._fragment(parameter, slot)
                        if self._is_swapped(group):
                            flat = self.copies[key] = flat.clone()
                        state[key] = Piece(flat, start, self.shapes[name], *self._block(name))
        return state

    @torch.no_grad()
    def _write_back(self) -> None:
        """Put on the disk what was written into the copies that `state` gave of what lives there."""
        for group, members in self._sub_groups():
            if self.copies and self._is_swapped(group):
                with self._resident(group):
                    for name, parameter in members:
                        for slot, key in _slots(name):
                            self._fragment(parameter, slot)[0].copy_(self.copies[key])
        self.copies.clear()

    def _block(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Origin and shape of this tensor rank's block of a parameter."""
        return plan.block(name, self.shapes[name], self.shares)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Fill each rank's piece of each parameter with the bits that one process would have."""
        for group, members in self._sub_groups():
            with self._resident(group):
                for name, parameter in members:
                    flat, start = self._fragment(parameter, None)
                    place = (*self._block(name), start, start + flat.numel())
                    flat.copy_(initial_block(self.config.model, name, self.shapes[name], self.config.seed, *place))
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        """Bring the copies that compute up to the fp32 masters, on every rank."""
        optimizer = self.optimizer
        if self.stage == 3:
            for group in range(len(optimizer.fp16_partitioned_groups_flat)):
                with self._resident(group):
                    optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if persistent := optimizer.persistent_parameters:  # small parameters that stay gathered
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)
        elif hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
        elif hasattr(optimizer, "fp32_groups"):
            for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for parameter, master in zip(low, high, strict=True):
                    parameter.data.copy_(master.data)

    def counters(self) -> EngineCounters:
        """See `Engine.counters`."""
        step = int(self.inner.state[self._flat_masters()[0]]["step"])
        return engine_counters(self.inner.param_groups, self.shapes, step, self.scaler)

    def restore(self, counters: EngineCounters | None) -> None:
        """See `Engine.restore`."""
        self._write_back()
        self._materialise(counters.optimizer.step if counters and counters.optimizer else 0)
        self.scaler.load(counters.loss_scale if counters else None)
        self._refresh()

    # ------------------------------------------------------------------------------------------- work

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float, step: int) -> StepResult:
        """See `Engine.train_step`."""
        self.copies.clear()
        micro_batches = [self._mine(micro_batch) for micro_batch in micro_batches]
        tokens = self._sum_over_data(on_device(count_tokens(micro_batches), self.world.device))
        # DeepSpeed averages gradients over the ranks that hold the same parameters
        factor = loss_factor(self.layout.dp_cp_size, tokens)
        dp_cp_rank = self.layout.dp_cp_rank(self.world.rank)
        for group in self.inner.param_groups:
            group["lr"] = lr
        if self.scaler.enabled:
            self.optimizer.loss_scale = self.scaler.scale
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.world.device)
        updated, grad_norm = False, float("nan")
        for index, micro_batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            self.engine.set_gradient_accumulation_boundary(last)
            seed = dropout_seed(self.config.seed, step, index, dp_cp_rank)
            self.world.heartbeat.enter("forward")
            loss = sum_loss(self.engine, micro_batch.to(self.world.device), seed)
            self.world.heartbeat.enter("backward")
            self.engine.backward(scaled_loss(loss, factor), scale_wrt_gas=False)
            loss_sum += loss.detach()
            if last:
                self.world.heartbeat.enter("update")
                updated, grad_norm = self._finish_step()
            else:
                self.engine.step()
        self.scaler.update(overflow=not updated)
        return StepResult(
            loss_sum=self._sum_over_data(loss_sum),
            tokens=tokens,
            grad_norm=torch.tensor(grad_norm),
            updated=torch.tensor(updated),
            aux={"loss_scale": torch.tensor(self.scaler.scale)} if self.scaler.enabled else {},
        )

    def _finish_step(self) -> tuple[bool, float]:
        """Apply the reduced gradients, unless they are not finite; whether they were applied, and their norm."""
        if not _updates_blindly(self.config):
            self.engine.step()
            return bool(self.engine.was_step_applied()), float(self.engine.get_global_grad_norm())
        norm = self._gradient_norm()
        finite = bool(torch.isfinite(norm))
        if finite:
            if self.config.optim.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(self.engine.module.parameters(), self.config.optim.grad_clip, norm)
            self.engine.step()
        else:
            self.engine.zero_grad()
        return finite, float(norm)

    def _gradient_norm(self) -> Tensor:
        """Stage 0 in fp32: the norm of all gradients, what is whole on every tensor rank counted once."""
        gradients = {name: p.grad for name, p in self.engine.module.named_parameters() if p.grad is not None}
        if self.tensor_group is None:
            return torch.nn.utils.get_total_norm(gradients.values())
        counted = [g for name, g in gradients.items() if plan.cut_dimension(name) is not None or self.place.tp == 0]
        squared = torch.nn.utils.get_total_norm(counted) ** 2
        dist.all_reduce(squared, group=self.tensor_group)
        return squared.sqrt()

    def evaluate(self, batches: Iterable[MicroBatch]) -> tuple[Tensor, Tensor]:
        """See `Engine.evaluate`."""
        loss_sum, tokens = evaluate(self.engine.module, map(self._mine, batches), self.world.device)
        totals = self._sum_over_data(torch.stack([loss_sum, tokens.double()]))
        return totals[0], totals[1].long()

    def _sum_over_data(self, values: Tensor) -> Tensor:
        """Sum over the whole job of what every rank has counted on its share of the data; tensor ranks share theirs."""
        return self.world.all_reduce_sum(values if self.place.tp == 0 else torch.zeros_like(values))

    def _mine(self, micro_batch: MicroBatch) -> MicroBatch:
        """This rank's slice of the sequences."""
        if self.layout.cp == 1:
            return micro_batch
        return local_slice(micro_batch, self.layout.cp_kind, self.place.cp, self.layout.cp)
