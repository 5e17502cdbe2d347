"""Code that all engines share: dropout seeds, losses and their scaling, the choice of kernels, counters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from megatrain.checkpoint.manifest import EngineCounters, OptimizerGroup, OptimizerState
from megatrain.config import TrainConfig
from megatrain.data.batch import MicroBatch
from megatrain.distributed.world import World
from megatrain.errors import EnvironmentFault
from megatrain.kernels.choice import Kernels, choose
from megatrain.kernels.support import KernelError
from megatrain.model.dtypes import DTYPES as DTYPES
from megatrain.model.gpt import GPT
from megatrain.optim.loss_scale import LossScaler
from megatrain.optim.objective import LossMeter, NextToken
from megatrain.optim.slots import decays
from megatrain.parallel.context import local_slice
from megatrain.parallel.layout import Layout
from megatrain.parallel.stages import ZERO_BUBBLE


def dropout_seed(seed: int, step: int, micro_batch: int, dp_cp_rank: int, tensor_rank: int = 0) -> int:
    """Return the seed of one micro-batch's dropout masks. A pure function, so no random state has to be saved.

    `dp_cp_rank` differs between ranks that work on other tokens, `tensor_rank` between ranks that hold another slice of
    their activations; it is 0 where activations are whole.
    """
    key = f"dropout:{seed}:{step}:{micro_batch}:{dp_cp_rank}" + (f":{tensor_rank}" if tensor_rank else "")
    return xxhash.xxh3_64_intdigest(key.encode()) >> 1


def summed_loss(model: nn.Module, micro_batch: MicroBatch, seed: int | None, meter: LossMeter, head: GPT) -> Tensor:
    """Return the objective's summed loss of a micro-batch, an fp32 scalar. `model` may wrap the GPT `head`."""
    loss: Tensor = model(
        micro_batch.tokens,
        positions=micro_batch.positions,
        document_ids=micro_batch.document_ids,
        dropout_seed=seed,
        finish=lambda hidden: meter(head, hidden, micro_batch),
    )
    return loss


def mean_scalars(names: Sequence[str], sums: Tensor, count: Tensor) -> dict[str, Tensor]:
    """Return an objective's scalars as means over the step's `count` terms, from their sums over the whole job."""
    return {name: total.float() for name, total in zip(names, sums / count.clamp(min=1), strict=True)}


class DataShare:
    """This rank's share of a step's data, and sums over the job of what the ranks count on their shares."""

    def __init__(self, layout: Layout, world: World) -> None:
        self.layout, self.world = layout, world
        self.place = layout.coordinate(world.rank)

    @property
    def is_counted(self) -> bool:
        """Whether this rank's counts enter the job's: tensor ranks and pipeline stages share the same data."""
        return self.place.tp == 0 and self.place.pp == 0

    def slices(self, micro_batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield this rank's slice of the sequences of each micro-batch (all of them without context parallelism)."""
        layout = self.layout
        for micro_batch in micro_batches:
            if layout.cp == 1:
                yield micro_batch
            else:
                yield local_slice(micro_batch, layout.cp_kind, self.place.cp, layout.cp)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the job of what each rank counted on its share."""
        return self.world.all_reduce_sum(values if self.is_counted else torch.zeros_like(values))


def on_device(number: int, device: torch.device) -> Tensor:
    """Return an int64 scalar, filled on the device: a copy from the host would make it wait."""
    return torch.full((), number, dtype=torch.int64, device=device)


def loss_factor(scale: float, tokens: Tensor) -> Tensor:
    """Return `scale / max(1, tokens)`, an fp32 scalar that multiplies summed losses. The host does not wait."""
    return (scale / tokens.clamp(min=1).double()).float()


def scaled_loss(loss: Tensor, factor: Tensor) -> Tensor:
    """Return `factor` times a micro-batch's loss, for the backward pass; NaN times the loss if it is not finite.

    A non-finite loss then makes every gradient NaN, so the veto on the gradient norm also covers the loss, on all ranks
    and without a read by the host.
    """
    return loss * factor.where(torch.isfinite(loss), torch.full_like(factor, float("nan")))


@torch.no_grad()
def evaluate(
    model: GPT, batches: Iterable[MicroBatch], device: torch.device, meter: LossMeter | None = None
) -> tuple[Tensor, Tensor]:
    """Return summed loss (float64) and counted terms (int64) of this rank's `batches`, the model in evaluation mode.

    Without a `meter` the loss is that of next-token prediction.
    """
    meter = meter or LossMeter(NextToken(), device)
    was_training = model.training
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    for batch in batches:
        count += meter.count([batch])
        loss_sum += summed_loss(model, batch.to(device), None, meter, model)
    meter.take()
    model.train(was_training)
    return loss_sum, on_device(count, device)


def compile_blocks(model: GPT) -> None:
    """Compile each block by itself: one graph serves all of them, and compiling is quick."""
    for block in model.blocks.children():
        block.compile()


def choose_kernels(config: TrainConfig, device: torch.device) -> Kernels:
    """Return the operations that a run's model computes with.

    Raises:
        EnvironmentFault: `kernels=triton` where Triton cannot run.
    """
    dtype, width = DTYPES[config.precision.name], config.model.hidden_size
    splits_backward = config.parallel.pp > 1 and config.parallel.schedule in ZERO_BUBBLE
    cuts_tensors = config.parallel.tp > 1
    try:
        return choose(config.kernels, device, dtype, width, config.compile, splits_backward, cuts_tensors)
    except KernelError as error:
        raise EnvironmentFault(f"kernels=triton: {error}; use kernels=auto or kernels=reference") from error


def engine_counters(
    optimizer: str, groups: list[dict[str, Any]], shapes: Mapping[str, tuple[int, ...]], step: int, scaler: LossScaler
) -> EngineCounters:
    """Return `Engine.counters` from an optimizer's groups, the parameters' global shapes and the updates applied."""
    members: dict[str, list[str]] = {"decay": [], "no_decay": []}
    for name, shape in shapes.items():
        members["decay" if decays(len(shape)) else "no_decay"].append(name)
    saved = {
        group["name"]: OptimizerGroup(
            members[group["name"]], {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        )
        for group in groups
        if group.get("name") in members
    }
    return EngineCounters(OptimizerState(optimizer, step, saved), scaler.state())
