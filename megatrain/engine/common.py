"""Code that all engines share: dropout seeds, losses and their scaling, sums over the job, kernels, counters."""

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
from megatrain.model.ensemble import Ensemble
from megatrain.model.gpt import GPT
from megatrain.optim.loss_scale import LossScaler
from megatrain.optim.objective import LossMeter, NextToken, OutputHead
from megatrain.optim.slots import decays
from megatrain.parallel.context import local_slice
from megatrain.parallel.layout import Layout
from megatrain.parallel.stages import ZERO_BUBBLE


def dropout_seed(seed: int, step: int, micro_batch: int, dp_cp_rank: int, tensor_rank: int = 0) -> int:
    """Return the seed of one micro-batch's dropout masks. It is a pure function, so no random state is saved.

    `dp_cp_rank` differs between ranks that process different tokens. `tensor_rank` differs between ranks that hold
    different slices of the activations; it is 0 if activations are not split.
    """
    key = f"dropout:{seed}:{step}:{micro_batch}:{dp_cp_rank}" + (f":{tensor_rank}" if tensor_rank else "")
    return xxhash.xxh3_64_intdigest(key.encode()) >> 1


def summed_loss(
    model: nn.Module, micro_batch: MicroBatch, seed: int | None, meter: LossMeter, head: OutputHead
) -> Tensor:
    """Return the objective's summed loss of a micro-batch, an fp32 scalar. `model` may wrap `head`."""
    loss: Tensor = model(
        micro_batch.tokens,
        positions=micro_batch.positions,
        documents=micro_batch.documents,
        dropout_seed=seed,
        finish=lambda hidden: meter(head, hidden, micro_batch),
    )
    return loss


def mean_scalars(names: Sequence[str], sums: Tensor, count: Tensor) -> dict[str, Tensor]:
    """Divide an objective's job-wide `sums` by the step's `count` terms; return the means by name."""
    return {name: total.float() for name, total in zip(names, sums / count.clamp(min=1), strict=True)}


class DataShare:
    """This rank's share of a step's data, and job-wide sums of values that ranks compute on their shares."""

    def __init__(self, layout: Layout, world: World) -> None:
        self.layout, self.world = layout, world
        self.place = layout.coordinate(world.rank)

    @property
    def is_counted(self) -> bool:
        """Whether job-wide sums include this rank: tensor ranks and pipeline stages share data, so only one counts."""
        return self.place.tp == 0 and self.place.pp == 0

    def slices(self, micro_batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield this rank's slice of each micro-batch's sequences; without context parallelism, all of it."""
        layout = self.layout
        for micro_batch in micro_batches:
            if layout.cp == 1:
                yield micro_batch
            else:
                yield local_slice(micro_batch, layout.cp_kind, self.place.cp, layout.cp)

    def sum(self, values: Tensor) -> Tensor:
        """Return the job-wide sum of `values`, counting each share of the data once."""
        return self.world.all_reduce_sum(values if self.is_counted else torch.zeros_like(values))


def on_device(number: int, device: torch.device) -> Tensor:
    """Return an int64 scalar, filled on the device: copying it from the host would make the host wait."""
    return torch.full((), number, dtype=torch.int64, device=device)


def loss_factor(scale: float, tokens: Tensor) -> Tensor:
    """Return `scale / max(1, tokens)`, an fp32 scalar that multiplies summed losses, without a host sync."""
    return (scale / tokens.clamp(min=1).double()).float()


def scaled_loss(loss: Tensor, factor: Tensor) -> Tensor:
    """Return `factor * loss` for the backward pass. If the loss is not finite, the factor is NaN.

    This makes every gradient NaN, so the gradient-norm check also catches a bad loss, without a host sync.
    """
    return loss * factor.where(torch.isfinite(loss), torch.full_like(factor, float("nan")))


@torch.no_grad()
def measure(model: GPT | Ensemble, batches: Iterable[MicroBatch], device: torch.device, meter: LossMeter) -> Tensor:
    """Evaluate this rank's `batches`; return the summed loss, the number of its terms and the objective's sums.

    They are float64 `[2 + scalars]`.
    """
    was_training = model.training
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    for batch in batches:
        count += meter.count([batch])
        loss_sum += summed_loss(model, batch.to(device), None, meter, model)
    model.train(was_training)
    return torch.cat([torch.stack([loss_sum, on_device(count, device).double()]), meter.take()])


def evaluate(model: GPT | Ensemble, batches: Iterable[MicroBatch], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the summed next-token loss (float64) of `batches`, and the number of its terms (int64)."""
    totals = measure(model, batches, device, LossMeter(NextToken(), device))
    return totals[0], totals[1].long()


def compile_blocks(model: GPT) -> None:
    """Compile each block separately: all blocks share one graph, so compiling is fast."""
    for block in model.blocks.children():
        block.compile()


def choose_kernels(config: TrainConfig, device: torch.device) -> Kernels:
    """Choose the kernels of a run's model.

    Raises:
        EnvironmentFault: `kernels=triton`, but Triton cannot run here.
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
    """Build `Engine.counters` from an optimizer's groups, the parameters' global shapes and the number of updates."""
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
