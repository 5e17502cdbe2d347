"""The native engine: torch alone, one process so far.

Parameters live in the compute precision with fp32 master copies beside them where that is lower; gradients are summed,
clipped and vetoed on the device, without the host waiting for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.config import TrainConfig
from megatrain.data.batch import MicroBatch
from megatrain.engine.base import StepResult
from megatrain.engine.common import (
    DTYPES,
    compile_blocks,
    count_tokens,
    dropout_seed,
    evaluate,
    optimizer_counters,
    sum_loss,
)
from megatrain.launch.world import World
from megatrain.model.gpt import GPT
from megatrain.model.init import initial_values
from megatrain.optim.adamw import MOMENTS, adamw, materialise, parameter_groups
from megatrain.optim.loss_scale import LossScaler


class NativeEngine:
    """`Engine` on one process, without a library between the model and torch."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        assert world.size == 1, "the layout table refuses engine=native on several ranks"
        self.config = config
        self.world = world
        compute = DTYPES[config.precision.name]
        with torch.device("meta"):
            model = GPT(config.model)
        self.model = model.to_empty(device=world.device).to(compute)
        self.model.recompute = config.train.recompute
        self.parameters = dict(self.model.named_parameters())
        self.masters = {
            name: parameter if compute == torch.float32 else nn.Parameter(parameter.detach().float())
            for name, parameter in self.parameters.items()
        }
        self.scaler = LossScaler.from_config(config.precision)
        self.accumulate_in_master = (
            compute != torch.float32 and DTYPES[config.precision.accumulate_dtype] == torch.float32
        )
        if self.accumulate_in_master:
            self._accumulate_into_masters()
        groups = parameter_groups(((name, p, p.dim()) for name, p in self.masters.items()), config.optim)
        self.optimizer = adamw(groups, config.optim)
        materialise(self.optimizer, step=0)
        with torch.no_grad():
            for name, master in self.masters.items():
                values = initial_values(config.model, name, tuple(master.shape), config.seed)
                master.copy_(values.view(master.shape))
        self._refresh()
        if config.compile:
            compile_blocks(self.model)
        self.model.train()

    def _accumulate_into_masters(self) -> None:
        """Sum each micro-batch's low-precision gradient into the fp32 master as soon as autograd has it."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]

            def add(parameter: Tensor, master: nn.Parameter = master) -> None:
                assert parameter.grad is not None
                if master.grad is None:
                    master.grad = parameter.grad.float()
                else:
                    master.grad += parameter.grad
                parameter.grad = None

            parameter.register_post_accumulate_grad_hook(add)

    @torch.no_grad()
    def _refresh(self) -> None:
        """Bring the compute copies up to the masters."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float, step: int) -> StepResult:
        """See `Engine.train_step`."""
        tokens = count_tokens(micro_batches)
        factor = self.scaler.scale / max(1, tokens)
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.world.device)
        for index, micro_batch in enumerate(micro_batches):
            seed = dropout_seed(self.config.seed, step, index, data_rank=0)
            loss = sum_loss(self.model, micro_batch.to(self.world.device), seed)
            (loss * factor).backward()
            loss_sum += loss.detach()
        grad_norm, finite = self._update(lr)
        if self.scaler.enabled:
            self.scaler.update(overflow=not bool(finite))
        return StepResult(
            loss_sum=loss_sum,
            tokens=torch.tensor(tokens, dtype=torch.int64),
            grad_norm=grad_norm,
            updated=finite,
            aux={"loss_scale": torch.tensor(self.scaler.scale)} if self.scaler.enabled else {},
        )

    @torch.no_grad()
    def _update(self, lr: float) -> tuple[Tensor, Tensor]:
        """Clip, veto and apply the gradients; returns the norm before clipping and whether it was finite.

        The veto goes through the fused optimizer's own `found_inf`, so no host has to look at the norm.
        """
        masters = list(self.masters.values())
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and not self.accumulate_in_master:
                assert parameter.grad is not None
                master.grad, parameter.grad = parameter.grad.float(), None
        gradients = [master.grad for master in masters if master.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients) / self.scaler.scale
        finite = torch.isfinite(grad_norm)
        limit = self.config.optim.grad_clip
        shrink = (limit / (grad_norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(grad_norm)
        if limit or self.scaler.scale != 1.0:
            torch._foreach_mul_(gradients, shrink / self.scaler.scale)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
        self.optimizer.step()
        for master in masters:
            master.grad = None
        self._refresh()
        return grad_norm, finite

    def evaluate(self, batches: Iterable[MicroBatch]) -> tuple[Tensor, Tensor]:
        """See `Engine.evaluate`."""
        return evaluate(self.model, batches, self.world)

    def state(self) -> dict[str, Tensor]:
        """See `Engine.state`."""
        state: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            state[f"model.{name}"] = master.detach()
            for moment in MOMENTS:
                state[f"optim.{moment}.{name}"] = self.optimizer.state[master][moment]
        return state

    def counters(self) -> dict[str, Any]:
        """See `Engine.counters`."""
        step = int(next(iter(self.optimizer.state.values()))["step"])
        shapes = {name: tuple(master.shape) for name, master in self.masters.items()}
        return optimizer_counters(self.optimizer.param_groups, shapes, step, self.scaler)

    def restore(self, counters: dict[str, Any] | None) -> None:
        """See `Engine.restore`."""
        step = int(counters["optimizer"]["step"]) if counters else 0
        materialise(self.optimizer, step)
        self.scaler.load(counters["loss_scale"] if counters else None)
        self._refresh()
