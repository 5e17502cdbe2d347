"""What every engine needs and none owns: dropout seeds, dtypes, token counts. No library of a particular engine here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from megatrain.checkpoint.manifest import EngineCounters, OptimizerGroup, OptimizerState
from megatrain.config import TrainConfig
from megatrain.data.batch import MicroBatch
from megatrain.errors import EnvironmentFault
from megatrain.kernels import IGNORE_INDEX
from megatrain.kernels.choice import Kernels, choose
from megatrain.kernels.support import KernelError
from megatrain.model.dtypes import DTYPES as DTYPES
from megatrain.model.gpt import GPT
from megatrain.optim.adamw import decays
from megatrain.optim.loss_scale import LossScaler
from megatrain.parallel.stages import ZERO_BUBBLE


def dropout_seed(seed: int, step: int, micro_batch: int, dp_cp_rank: int, tensor_rank: int = 0) -> int:
    """Seed of one micro-batch's dropout masks. A pure function, so no random state has to be saved.

    `dp_cp_rank` differs between ranks that work on other tokens, `tensor_rank` between ranks that hold another slice of
    their activations; it is 0 where activations are whole.
    """
    key = f"dropout:{seed}:{step}:{micro_batch}:{dp_cp_rank}" + (f":{tensor_rank}" if tensor_rank else "")
    return xxhash.xxh3_64_intdigest(key.encode()) >> 1


def count_tokens(micro_batches: Sequence[MicroBatch]) -> int:
    """Labels that count, over one rank's micro-batches (their weights, where there are any, left out)."""
    return sum(int((micro_batch.labels != IGNORE_INDEX).sum()) for micro_batch in micro_batches)


def sum_loss(model: nn.Module, micro_batch: MicroBatch, seed: int | None) -> Tensor:
    """The model's summed loss over one micro-batch, fp32 scalar."""
    loss: Tensor = model(
        micro_batch.tokens,
        micro_batch.labels,
        loss_weights=micro_batch.loss_weights,
        positions=micro_batch.positions,
        document_ids=micro_batch.document_ids,
        dropout_seed=seed,
    )
    return loss


def on_device(number: int, device: torch.device) -> Tensor:
    """An int64 scalar, filled in there: a copy from the host would have it wait for the device."""
    return torch.full((), number, dtype=torch.int64, device=device)


def loss_factor(scale: float, tokens: Tensor) -> Tensor:
    """`scale / max(1, tokens)`, fp32 scalar: what a micro-batch's summed loss is multiplied by. The host does not wait."""
    return (scale / tokens.clamp(min=1).double()).float()


def scaled_loss(loss: Tensor, factor: Tensor) -> Tensor:
    """What a micro-batch runs backward: `factor` times its loss, and where that loss is not finite, NaN times it.

    Every gradient then is NaN, also where those of a loss that overflowed would have been finite, so that the one veto
    on the gradient norm covers the loss too, on all ranks and without the host looking at it.
    """
    return loss * factor.where(torch.isfinite(loss), torch.full_like(factor, float("nan")))


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[MicroBatch], device: torch.device) -> tuple[Tensor, Tensor]:
    """Summed loss (float64) and counted tokens (int64) of this rank's `batches`, the model in evaluation mode meanwhile."""
    was_training = model.training
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    for batch in batches:
        tokens += count_tokens([batch])
        loss_sum += sum_loss(model, batch.to(device), None)
    model.train(was_training)
    return loss_sum, on_device(tokens, device)


def compile_blocks(model: GPT) -> None:
    """torch.compile each block by itself: one graph for all of them, and short compile times."""
    for block in model.blocks.children():
        block.compile()


def choose_kernels(config: TrainConfig, device: torch.device) -> Kernels:
    """The operations that a run's model computes with.

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
    groups: list[dict[str, Any]], shapes: Mapping[str, tuple[int, ...]], step: int, scaler: LossScaler
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
    return EngineCounters(OptimizerState("adamw", step, saved), scaler.state())
