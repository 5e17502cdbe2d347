"""The native engine, built on torch alone: FSDP2 or replicas x tensor and sequence x pipeline x context parallelism.

The optimizer updates fp32 masters: this rank's block of each parameter. Summing, clipping and checking gradients need
no host sync, except that in fp16 the loss scale reads one flag.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatrain.checkpoint.manifest import EngineCounters
from megatrain.checkpoint.naming import parameter_key
from megatrain.checkpoint.piece import Piece
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
    on_device,
    scaled_loss,
)
from megatrain.engine.protocol import Measured, StepResult
from megatrain.kernels.choice import Kernels
from megatrain.kernels.cross_entropy import cross_entropy_sum
from megatrain.kernels.distillation import distillation_of_logits
from megatrain.kernels.linear_log_probs import label_log_probs
from megatrain.model.count import run_shapes, trained_shapes
from megatrain.model.fp8 import use_fp8
from megatrain.model.init import initial_block
from megatrain.model.lora import add_adapters
from megatrain.optim.adamw import parameter_groups
from megatrain.optim.loss_scale import LossScaler
from megatrain.optim.objective import LossMeter, Objective
from megatrain.optim.optimizers import build_optimizer, create_slots
from megatrain.optim.slots import Slot, slots_of
from megatrain.parallel import plan
from megatrain.parallel.context import split_sequences
from megatrain.parallel.layout import Layout, head_in_chunks
from megatrain.parallel.mesh import make_groups
from megatrain.parallel.pipeline import Stage, StepInputs
from megatrain.parallel.recompute import recompute_blocks
from megatrain.parallel.schedules import Pipeline
from megatrain.parallel.sharding import before_backward, forget_gathered, local, shard
from megatrain.parallel.stages import stage_layers
from megatrain.parallel.tensor import cut_tensors
from megatrain.parallel.vocabulary import (
    vocabulary_parallel_cross_entropy,
    vocabulary_parallel_distillation,
    vocabulary_parallel_label_gap,
    vocabulary_parallel_log_probs,
)

EVALUATED_AT_ONCE = 16
"""Held-out micro-batches that are evaluated together, so that a pipeline stays busy."""


@dataclass
class LocalParameter:
    """One parameter as this rank holds it.

    `master` (fp32) is the block of `sizes` at `origin` in the whole parameter of `shape`. If `parameter` is fp32 too,
    they share memory. `in_norm` is false if the gradient norm counts another copy. `slots` are the optimizer's states.
    """

    name: str
    parameter: nn.Parameter
    master: nn.Parameter
    shape: tuple[int, ...]
    origin: tuple[int, ...]
    sizes: tuple[int, ...]
    in_norm: bool
    slots: tuple[Slot, ...]

    @property
    def first_element(self) -> int:
        """The index of this block's first element in the flattened whole parameter."""
        strides = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        return sum(start * stride for start, stride in zip(self.origin, strides, strict=True))

    @property
    def is_trained(self) -> bool:
        """Whether training changes it: with low-rank layers, all others are frozen."""
        return self.parameter.requires_grad

    @property
    def is_copied(self) -> bool:
        """Whether the model computes with a lower-precision copy of the master."""
        return self.master.data_ptr() != local(self.parameter).data_ptr()

    @property
    def slot_shapes(self) -> list[tuple[Slot, tuple[int, ...]]]:
        """The optimizer's states, each with the shape of this rank's block of it."""
        return [(slot, slot.block(self.shape, self.origin, self.sizes)[1]) for slot in self.slots]


class NativeEngine:
    """`Engine` built on torch's parallelism, for every layout that the layout table allows."""

    def __init__(self, config: TrainConfig, world: World, objective: Objective) -> None:
        self.config = config
        self.world = world
        self.layout = Layout.of(config, world.size)
        self.place = self.layout.coordinate(world.rank)
        self.share = DataShare(self.layout, world)
        self.groups = make_groups(self.layout, world.rank, world.device) if world.size > 1 else None
        self.is_sharded = self.layout.dp_cp_size > 1
        self.compute = DTYPES[config.precision.name]
        self.scaler = LossScaler.from_config(config.precision)
        self.accumulate_in_master = (
            not self.is_sharded
            and self.compute != torch.float32
            and DTYPES[config.precision.accumulate_dtype] == torch.float32
        )
        self.reduces_in_fp32 = config.precision.name == "fp32" or config.precision.reduce_dtype == "fp32"
        self.inputs = StepInputs()
        self.meter = LossMeter(objective, world.device)
        self.stages = self._build_stages()
        self.held = [held for stage in self.stages.values() for held in self._hold(stage)]
        self.trained = [held for held in self.held if held.is_trained]
        self.tied = self._tied()
        if self.accumulate_in_master:
            self._accumulate_into_masters()
        groups = parameter_groups(((held.name, held.master, len(held.shape)) for held in self.trained), config.optim)
        places = {held.master: (held.name, held.first_element) for held in self.trained}
        self.optimizer = build_optimizer(groups, config.optim, config.seed, places)
        self._create_slots(step=0)
        self._initialise()
        if config.compile:
            for stage in self.stages.values():
                compile_blocks(stage)
        self.pipeline = None
        if self.groups and self.groups.pp is not None:
            self.pipeline = Pipeline(self.layout, self.stages, self.groups.pp, self._examples())

    # ------------------------------------------------------------------------------------------- construction

    def _build_stages(self) -> dict[int, Stage]:
        """Return this rank's pipeline stages by number: split and allocated, but not initialised."""
        layers = stage_layers(self.config, self.layout.num_stages)
        kernels = choose_kernels(self.config, self.world.device)
        stages: dict[int, Stage] = {}
        for index in self.layout.stages_of(self.place.pp):
            with torch.device("meta"):
                stage = Stage(
                    *(self.config.model, layers[index], self.layout.num_stages, index, kernels),
                    *(self.inputs, self.meter, self.config.method.name in WITH_VALUES),
                )
                if self.config.method.lora.rank:
                    add_adapters(stage, self.config.method.lora)
            self._set_losses(stage, kernels)
            stage.detach_embedding = self.config.compile and self.layout.tp > 1
            if self.groups and self.groups.cp is not None:
                split_sequences(stage, self.layout.cp_kind, self.groups.cp)
            if self.config.precision.name == "fp8":
                use_fp8(stage.blocks, self.world.device)
            if self.groups and self.groups.tp is not None:
                cut_tensors(stage, self.groups.tensor_mesh)
            recompute_blocks(stage.blocks, self.config.train.recompute)
            if self.groups and self.is_sharded:
                shard(stage, stage.units(), self.layout.zero, self.groups, self.config.precision)
            else:
                stage.to(self.compute)
            stages[index] = stage.to_empty(device=self.world.device).train()
        return stages

    def _set_losses(self, stage: Stage, kernels: Kernels) -> None:
        """Give a stage the functions of the logits that give losses and log-probabilities; none if its head does."""
        if self.groups is None or self.groups.tp is None:
            if not head_in_chunks(self.config, self.layout):
                stage.loss, stage.log_probs = cross_entropy_sum, label_log_probs
                stage.distilled = distillation_of_logits
            return
        vocab = self.config.model.vocab
        first, _ = plan.chunk(vocab, self.layout.tp, self.place.tp)
        place: dict[str, Any] = {"first": first, "group": self.groups.tp}
        stage.loss = partial(vocabulary_parallel_cross_entropy, **place, kernels=kernels)
        stage.label_gap = partial(vocabulary_parallel_label_gap, **place, vocab=vocab)
        stage.distilled = partial(vocabulary_parallel_distillation, **place, vocab=vocab)
        stage.log_probs = partial(vocabulary_parallel_log_probs, **place, kernels=kernels)

    def _hold(self, stage: Stage) -> Iterator[LocalParameter]:
        """Yield a stage's parameters with their coordinates in the whole model."""
        shapes = run_shapes(self.config.model, self.config.method)
        shares = plan.shares(self.layout.grid.sizes, self.place._asdict())
        mesh = self.groups.mesh if self.groups else None
        shards = mesh["shard"].size() if mesh and self.is_sharded else 1
        shard_rank = mesh["shard"].get_local_rank() if mesh and self.is_sharded else 0
        is_replica = mesh is not None and mesh["replicate"].get_local_rank() > 0
        for own_name, parameter in stage.named_parameters():
            name = stage.single_device_name(own_name)
            shape = shapes[name]
            origin, sizes = plan.block(name, shape, shares)
            start, length = plan.chunk(sizes[0], shards, shard_rank)
            origin, sizes = (origin[0] + start, *origin[1:]), (length, *sizes[1:])
            here = local(parameter).detach()
            assert tuple(here.shape) == sizes, (name, tuple(here.shape), sizes)
            whole_on_tp = plan.cut_dimension(name) is None
            in_norm = not is_replica and not (whole_on_tp and self.place.tp > 0) and own_name == name
            master = nn.Parameter(here if here.dtype == torch.float32 else here.float())
            slots = slots_of(self.config.optim, name, shape) if parameter.requires_grad else ()
            yield LocalParameter(name, parameter, master, shape, origin, sizes, in_norm, slots)

    def _tied(self) -> list[LocalParameter]:
        """Return this rank's copies (none, one or two) of the tied weight that the first and last stage share."""
        if not self.config.model.ties_head or self.layout.num_stages == 1:
            return []
        return [held for held in self.held if held.name == "embed.weight"]

    def _accumulate_into_masters(self) -> None:
        """Add each low-precision gradient to the fp32 gradient of its master as soon as autograd has computed it."""
        for held in self.trained:

            def add(parameter: Tensor, held: LocalParameter = held) -> None:
                """Add the parameter's gradient to its master's, in fp32 and of the same shape, and free it."""
                gradient = self._local_gradient(held)
                if held.master.grad is None:
                    held.master.grad = gradient.float()
                else:
                    held.master.grad += gradient
                parameter.grad = None

            held.parameter.register_post_accumulate_grad_hook(add)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Fill each master with the values that a single process would have, bit for bit."""
        for held in self.held:
            values = initial_block(self.config.model, held.name, held.shape, self.config.seed, held.origin, held.sizes)
            held.master.copy_(values.view(held.sizes))
        self._refresh()

    @torch.no_grad()
    def _refresh(self, some: list[LocalParameter] | None = None) -> None:
        """Copy the masters (by default all) into the parameters that the model computes with."""
        copied = [held for held in (self.held if some is None else some) if held.is_copied]
        if copied:
            torch._foreach_copy_([local(held.parameter) for held in copied], [held.master for held in copied])

    def _examples(self) -> tuple[Tensor, Tensor]:
        """Return meta tensors with the shapes of the first stage's input and of activations between stages."""
        rows = self.config.train.micro_batch_size
        length = self.config.train.seq_len // self.layout.cp
        tokens = torch.empty(rows, length, dtype=torch.int64, device="meta")
        hidden = torch.empty(
            rows, length // self.layout.tp, self.config.model.hidden_size, dtype=self.compute, device="meta"
        )
        return tokens, hidden

    # ------------------------------------------------------------------------------------------- work

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float, step: int) -> StepResult:
        """See `Engine.train_step`."""
        mine = list(self.share.slices(micro_batches))
        batches = [micro_batch.to(self.world.device) for micro_batch in mine]
        tokens = self.share.sum(on_device(self.meter.count(mine), self.world.device))
        dp_cp_rank = self.layout.dp_cp_rank(self.world.rank)
        seeds = [
            dropout_seed(self.config.seed, step, index, dp_cp_rank, self.place.tp) for index in range(len(batches))
        ]
        factor = loss_factor(self.scaler.scale, tokens)
        self.inputs.load(batches, seeds)
        if self.pipeline:
            self.world.heartbeat.enter("forward")  # includes the backward pass: the schedule interleaves them
            loss_sum = self.pipeline.train(batches, lambda loss: scaled_loss(loss, factor))
        else:
            loss_sum = self._train_without_pipeline(batches, factor)
        self.world.heartbeat.enter("update")
        loss_sum, scalars, grad_norm, finite = self._update(loss_sum, lr, step)
        if self.scaler.enabled:
            self.scaler.update(overflow=not bool(finite))
        return StepResult(
            loss_sum=loss_sum,
            tokens=tokens,
            grad_norm=grad_norm,
            updated=finite,
            aux={
                **mean_scalars(self.meter.objective.scalar_names, scalars, tokens),
                **({"loss_scale": torch.tensor(self.scaler.scale)} if self.scaler.enabled else {}),
            },
        )

    def _train_without_pipeline(self, micro_batches: list[MicroBatch], factor: Tensor) -> Tensor:
        """Run every micro-batch forward and backward; return this rank's summed loss."""
        (stage,) = self.stages.values()
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.world.device)
        for index, micro_batch in enumerate(micro_batches):
            before_backward(stage, self.layout.zero, index == len(micro_batches) - 1, self.reduces_in_fp32)
            self.world.heartbeat.enter("forward")
            loss = stage(micro_batch.tokens, index)
            self.world.heartbeat.enter("backward")
            scaled_loss(loss, factor).backward()
            loss_sum += loss.detach()
        return loss_sum

    def _local_gradient(self, held: LocalParameter) -> Tensor:
        """Return this rank's block of a parameter's gradient."""
        gradient = held.parameter.grad
        assert gradient is not None, f"{held.name} took no part in the step"
        if isinstance(gradient, DTensor):
            assert isinstance(held.parameter, DTensor)
            if gradient.placements != held.parameter.placements:  # only the embedding's, replicated: a local slice
                gradient = gradient.redistribute(placements=held.parameter.placements)
        return local(gradient)

    @torch.no_grad()
    def _update(self, loss_sum: Tensor, lr: float, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clip the gradients and apply them if their norm is finite.

        The fused optimizer clips and skips through its `grad_scale` and `found_inf`, so clipping costs no extra pass
        and no host sync. Return the job's summed loss, the objective's summed scalars, the norm before clipping, and
        whether that norm was finite.
        """
        for held in self.trained:
            if not self.accumulate_in_master:
                held.master.grad, held.parameter.grad = self._local_gradient(held).float(), None
        self._sum_gradients_of_slices()
        self._sum_tied_gradients()
        counted = [held.master.grad for held in self.held if held.in_norm and held.master.grad is not None]
        norm = torch.nn.utils.get_total_norm(counted).to(self.world.device) / self.scaler.scale
        scalars = self.meter.take()
        if self.world.size > 1:
            has_loss = self.place.tp == 0 and self.layout.num_stages - 1 in self.stages
            totals = torch.cat([torch.stack([norm.double() ** 2, loss_sum.double() * has_loss]), scalars * has_loss])
            totals = self.world.all_reduce_sum(totals)
            norm, loss_sum, scalars = totals[0].sqrt().float(), totals[1].float(), totals[2:]
        finite = torch.isfinite(norm)
        limit = self.config.optim.grad_clip
        shrink = (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)
        self.optimizer.grad_scale = self.scaler.scale / shrink  # type: ignore[attr-defined]  # divides gradients
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
        self.optimizer.train_step = step  # type: ignore[attr-defined]  # for LowMomentsAdamW
        self.optimizer.step()
        for held in self.trained:
            held.master.grad = None
        self._refresh(self.trained)
        return loss_sum, scalars, norm, finite

    def _sum_gradients_of_slices(self) -> None:
        """All-reduce gradients that each tensor rank computed from only its slice of the sequence, or its heads."""
        if self.groups is None or self.groups.tp is None:
            return
        parts = [held.master.grad for held in self.held if plan.is_summed(held.name) and held.master.grad is not None]
        if not parts:
            return
        together = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(together, group=self.groups.tp)
        for part, total in zip(parts, together.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view_as(part))

    def _sum_tied_gradients(self) -> None:
        """Sum the gradients of a tied embedding and head on two stages, so that both copies stay equal."""
        gradients = [held.master.grad for held in self.tied if held.master.grad is not None]
        if len(gradients) == 2:  # this rank holds both the first and the last stage
            gradients[0] += gradients[1]
            gradients[1].copy_(gradients[0])
        elif gradients:
            assert self.groups is not None and self.groups.ends is not None
            dist.all_reduce(gradients[0], group=self.groups.ends)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        for stage in self.stages.values():
            stage.eval()
        with torch.no_grad():
            yield
        for stage in self.stages.values():
            stage.train()

    def evaluate(self, batches: Iterable[MicroBatch]) -> tuple[Tensor, Tensor]:
        """See `Engine.evaluate`."""
        measured = self.measure(batches)
        return measured.loss_sum, measured.count

    def measure(self, batches: Iterable[MicroBatch]) -> Measured:
        """See `Engine.measure`."""
        names = self.meter.objective.scalar_names
        totals = torch.zeros(2 + len(names), dtype=torch.float64, device=self.world.device)
        waiting: list[MicroBatch] = []
        with self._evaluating():
            for batch in batches:
                waiting.append(batch)
                if len(waiting) == EVALUATED_AT_ONCE:
                    totals += self._evaluate_some(waiting)
                    waiting = []
            if waiting:
                totals += self._evaluate_some(waiting)
        return Measured.of(self.world.all_reduce_sum(totals), names)

    def _evaluate_some(self, micro_batches: list[MicroBatch]) -> Tensor:
        """Return this rank's summed loss, number of terms and scalars, float64 `[2 + scalars]`."""
        mine = list(self.share.slices(micro_batches))
        batches = [micro_batch.to(self.world.device) for micro_batch in mine]
        self.inputs.load(batches, [None] * len(batches))
        if self.pipeline:
            loss_sum = self.pipeline.evaluate(batches)
        else:
            (stage,) = self.stages.values()
            losses = [stage(batch.tokens, index) for index, batch in enumerate(batches)]
            loss_sum = torch.stack(losses).double().sum()
        scalars = self.meter.take()
        has_loss = self.place.tp == 0 and self.layout.num_stages - 1 in self.stages
        tokens = self.meter.count(mine) if self.share.is_counted else 0
        counted = on_device(tokens, loss_sum.device).double()
        return torch.cat([torch.stack([loss_sum.double() * has_loss, counted]), scalars * has_loss])

    # ------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Tensor]:
        """See `Engine.state`."""
        state: dict[str, Tensor] = {}
        for held in self._saved():
            state[parameter_key(held.name)] = _piece(held.master.detach(), held.shape, held.origin, held.sizes)
            for slot in held.slots:
                tensor = self.optimizer.state[held.master][slot.name]
                block = slot.block(held.shape, held.origin, held.sizes)
                state[f"optim.{slot.name}.{held.name}"] = _piece(tensor, slot.shape, *block)
        return state

    def _create_slots(self, step: int) -> None:
        """Create the optimizer's missing states (zeros) for every parameter, and set the step count."""
        create_slots(self.optimizer, ((held.master, held.slot_shapes) for held in self.trained), step)

    def _saved(self) -> list[LocalParameter]:
        """Return the parameters to save. If this rank has two copies of a tied weight, only one is saved."""
        return [held for held in self.held if len(self.tied) < 2 or held is not self.tied[1]]

    @torch.no_grad()
    def _match_tied(self) -> None:
        """Copy a tied weight and its states to the second copy on this rank, which a checkpoint does not contain."""
        if len(self.tied) == 2:
            first, second = self.tied
            second.master.copy_(first.master)
            for slot in first.slots:
                states = self.optimizer.state
                states[second.master][slot.name].copy_(states[first.master][slot.name])

    def counters(self) -> EngineCounters:
        """See `Engine.counters`."""
        step = int(next(iter(self.optimizer.state.values()))["step"])
        shapes = trained_shapes(self.config.model, self.config.method)
        return engine_counters(self.config.optim.name, self.optimizer.param_groups, shapes, step, self.scaler)

    def restore(self, counters: EngineCounters | None) -> None:
        """See `Engine.restore`."""
        step = counters.optimizer.step if counters and counters.optimizer else 0
        self._create_slots(step)
        self._match_tied()
        for stage in self.stages.values():
            forget_gathered(stage)
        self.scaler.load(counters.loss_scale if counters else None)
        self._refresh()


def _piece(tensor: Tensor, shape: tuple[int, ...], origin: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """Return a block of a tensor with its coordinates, or the tensor itself if the block is the whole tensor."""
    return tensor if sizes == shape else Piece(tensor.view(-1), 0, shape, origin, sizes)
