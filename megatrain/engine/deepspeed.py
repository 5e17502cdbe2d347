"""The DeepSpeed engine: ZeRO 0 to 3 over data- and context-parallel ranks, x tensor parallel with AutoTP's layers.

DeepSpeed reduces, shards and updates. We decide what DeepSpeed leaves open: loss normalised by all terms of the step
(tokens, for next-token prediction), our loss-scale rule, no update from non-finite gradients (DeepSpeed would apply
them at stage 0 in fp32). `deepspeed_state.py` maps its state to global coordinates; `deepspeed_config.py` writes its
config.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.checkpoint.manifest import EngineCounters
from megatrain.config import WITH_VALUES, TrainConfig
from megatrain.data.batch import MicroBatch
from megatrain.distributed.world import World
from megatrain.engine.common import (
    DTYPES,
    DataShare,
    choose_kernels,
    compile_blocks,
    dropout_seed,
    engine_counters,
    loss_factor,
    mean_scalars,
    measure,
    on_device,
    scaled_loss,
    summed_loss,
)
from megatrain.engine.deepspeed_config import (
    deepspeed_config,
    start_deepspeed,
    updates_blindly,
    wait_for_asynchronous_io,
)
from megatrain.engine.deepspeed_state import DeepSpeedState
from megatrain.engine.protocol import Measured, StepResult
from megatrain.errors import EnvironmentFault
from megatrain.model.count import run_shapes, trained_shapes
from megatrain.model.gpt import GPT
from megatrain.model.lora import add_adapters
from megatrain.optim.adamw import parameter_groups
from megatrain.optim.loss_scale import LossScaler
from megatrain.optim.objective import LossMeter, Objective
from megatrain.optim.optimizers import build_optimizer
from megatrain.parallel import plan
from megatrain.parallel.context import split_sequences
from megatrain.parallel.layout import Layout, num_micro_batches
from megatrain.parallel.mesh import make_groups
from megatrain.parallel.recompute import recompute_blocks


class DeepSpeedEngine:
    """`Engine` that wraps DeepSpeed's engine. The process group must already exist."""

    def __init__(self, config: TrainConfig, world: World, objective: Objective) -> None:
        deepspeed = start_deepspeed(world)
        _check_accelerator(config, world)
        self.config = config
        self.world = world
        self.scaler = LossScaler.from_config(config.precision)
        self.meter = LossMeter(objective, world.device)
        self.layout = Layout.of(config, world.size)
        self.place = self.layout.coordinate(world.rank)
        self.share = DataShare(self.layout, world)
        self.tensor_group = None
        if self.layout.tp > 1:
            from megatrain.parallel.autotp import make_tensor_group  # imports DeepSpeed, which must be started first

            self.tensor_group = make_tensor_group(self.layout.tp)
        loop = config.train
        micro_batches = num_micro_batches(loop.global_batch_size, loop.micro_batch_size, self.layout.dp)
        document = deepspeed_config(config, micro_batches, world.device.type)
        model = self._build_model(deepspeed, document)
        recompute_blocks(model.blocks, config.train.recompute)
        self.shapes = run_shapes(config.model, config.method)
        groups = parameter_groups(
            ((name, p, len(self.shapes[name])) for name, p in model.named_parameters() if p.requires_grad), config.optim
        )
        optimizer = build_optimizer(groups, config.optim, config.seed)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=document, dist_init_required=False
        )
        if self.tensor_group is not None:
            # This hook would pickle every rank's batch in the first forward pass to compare them; batch_hash already
            # does that.
            self.engine.first_dataloader_check.remove()
        self.optimizer = self.engine.optimizer
        shares = plan.shares(self.layout.grid.sizes, self.place._asdict())
        self.states = DeepSpeedState(self.engine, config, self.shapes, shares, world.device)
        self.states.create_slots(step=0)
        self.states.initialise()
        if config.compile:
            compile_blocks(model)
        self.engine.train()

    def _build_model(self, deepspeed: Any, document: dict[str, Any]) -> GPT:
        """Return the model with memory allocated but parameters not initialised.

        With tensor parallelism, each rank allocates its block of one layer after another. At stage 3 without tensor
        parallelism, each parameter is partitioned as soon as it is created.
        """
        kernels, has_values = choose_kernels(self.config, self.world.device), self.config.method.name in WITH_VALUES
        if self.config.parallel.zero == 3 and self.tensor_group is None:
            # Pass no dtype, so that DeepSpeed uses the config's: given float32 on a CPU, it would choose bfloat16.
            with deepspeed.zero.Init(config_dict_or_path=document):
                model = GPT(self.config.model, kernels, has_values)
                self._add_adapters(model)
            self._split_sequences(model)
            return model
        with torch.device("meta"):
            model = GPT(self.config.model, kernels, has_values)
            self._add_adapters(model)
            model.to(DTYPES[self.config.precision.name])
        self._split_sequences(model)
        if self.tensor_group is None:
            model.to_empty(device=self.world.device)
        else:
            from megatrain.parallel.autotp import cut_layers

            cut_layers(model, self.tensor_group, self.world.device)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)  # DeepSpeed compares and copies them before they are initialised
        return model

    def _add_adapters(self, model: GPT) -> None:
        if self.config.method.lora.rank:
            add_adapters(model, self.config.method.lora)

    def _split_sequences(self, model: GPT) -> None:
        """Apply context parallelism. DeepSpeed treats context ranks as data ranks: they hold the same parameters."""
        if self.layout.cp > 1:
            context = make_groups(self.layout, self.world.rank, self.world.device).cp
            assert context is not None
            split_sequences(model, self.layout.cp_kind, context)

    # ------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Tensor]:
        """See `Engine.state`."""
        return self.states.tensors()

    def counters(self) -> EngineCounters:
        """See `Engine.counters`."""
        groups = self.states.inner.param_groups
        shapes = trained_shapes(self.config.model, self.config.method)
        return engine_counters(self.config.optim.name, groups, shapes, self.states.step_count(), self.scaler)

    def restore(self, counters: EngineCounters | None) -> None:
        """See `Engine.restore`."""
        self.states.write_back()
        self.states.create_slots(counters.optimizer.step if counters and counters.optimizer else 0)
        self.scaler.load(counters.loss_scale if counters else None)
        self.states.refresh()

    # ------------------------------------------------------------------------------------------- work

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float, step: int) -> StepResult:
        """See `Engine.train_step`."""
        self.states.copies.clear()
        micro_batches = list(self.share.slices(micro_batches))
        tokens = self.share.sum(on_device(self.meter.count(micro_batches), self.world.device))
        # DeepSpeed averages gradients over the ranks that hold the same parameters.
        factor = loss_factor(self.layout.dp_cp_size, tokens)
        dp_cp_rank = self.layout.dp_cp_rank(self.world.rank)
        for group in self.states.inner.param_groups:
            group["lr"] = lr
        if self.scaler.enabled:
            self.optimizer.loss_scale = self.scaler.scale
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.world.device)
        updated, grad_norm = False, float("nan")
        for index, micro_batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            self.engine.set_gradient_accumulation_boundary(is_last)
            seed = dropout_seed(self.config.seed, step, index, dp_cp_rank)
            self.world.heartbeat.enter("forward")
            batch = micro_batch.to(self.world.device)
            loss = summed_loss(self.engine, batch, seed, self.meter, self.engine.module)
            self.world.heartbeat.enter("backward")
            self.engine.backward(scaled_loss(loss, factor), scale_wrt_gas=False)
            loss_sum += loss.detach()
            if is_last:
                self.world.heartbeat.enter("update")
                updated, grad_norm = self._finish_step()
            else:
                self.engine.step()
        self.scaler.update(overflow=not updated)
        names, scalars = self.meter.objective.scalar_names, self.meter.take()
        if names:
            scalars = self.share.sum(scalars)
        return StepResult(
            loss_sum=self.share.sum(loss_sum),
            tokens=tokens,
            grad_norm=torch.tensor(grad_norm),
            updated=torch.tensor(updated),
            aux={
                **mean_scalars(names, scalars, tokens),
                **({"loss_scale": torch.tensor(self.scaler.scale)} if self.scaler.enabled else {}),
            },
        )

    def _finish_step(self) -> tuple[bool, float]:
        """Apply the reduced gradients if they are finite; return whether they were applied, and their norm."""
        if not updates_blindly(self.config):
            self.engine.step()
            return bool(self.engine.was_step_applied()), float(self.engine.get_global_grad_norm())
        norm = self._gradient_norm()
        is_finite = bool(torch.isfinite(norm))
        if is_finite:
            if self.config.optim.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(self.engine.module.parameters(), self.config.optim.grad_clip, norm)
            self.engine.step()
        else:
            self.engine.zero_grad()
        return is_finite, float(norm)

    def _gradient_norm(self) -> Tensor:
        """Return the norm of all gradients at stage 0 in fp32. Gradients held by all tensor ranks are counted once."""
        gradients = {name: p.grad for name, p in self.engine.module.named_parameters() if p.grad is not None}
        if self.tensor_group is None:
            return torch.nn.utils.get_total_norm(gradients.values())
        counted = [g for name, g in gradients.items() if plan.cut_dimension(name) is not None or self.place.tp == 0]
        squared = torch.nn.utils.get_total_norm(counted) ** 2
        dist.all_reduce(squared, group=self.tensor_group)
        return squared.sqrt()

    def evaluate(self, batches: Iterable[MicroBatch]) -> tuple[Tensor, Tensor]:
        """See `Engine.evaluate`."""
        measured = self.measure(batches)
        return measured.loss_sum, measured.count

    def measure(self, batches: Iterable[MicroBatch]) -> Measured:
        """See `Engine.measure`."""
        totals = measure(self.engine.module, self.share.slices(batches), self.world.device, self.meter)
        return Measured.of(self.share.sum(totals), self.meter.objective.scalar_names)


def _check_accelerator(config: TrainConfig, world: World) -> None:
    """Refuse a config that DeepSpeed cannot run on this device.

    Raises:
        EnvironmentFault: fp16 without fp16 arithmetic, or offload to a disk without asynchronous I/O.
    """
    from deepspeed.accelerator import get_accelerator

    if config.precision.name == "fp16" and not get_accelerator().is_fp16_supported():
        raise EnvironmentFault(
            f"precision=fp16 under engine=deepspeed needs a device with fp16 arithmetic, which this "
            f"{world.device.type} does not have; use precision=bf16 or precision=fp32"
        )
    if config.engine.offload == "nvme":
        wait_for_asynchronous_io(get_accelerator(), config.launch.timeout_s)
