"""Run the stages of a pipeline with `torch.distributed.pipelining`. pipeline.py says what a stage computes.

Gradients are summed over micro-batches, never averaged: the caller divides the summed loss by the step's tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from megatrain.data.batch import MicroBatch
from megatrain.parallel.layout import Layout

ONE_STAGE_A_RANK: dict[str, type[PipelineScheduleSingle]] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
SEVERAL_STAGES_A_RANK: dict[str, type[PipelineScheduleMulti]] = {
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv_zero_bubble": ScheduleZBVZeroBubble,
}


class SplitBackwardStage(PipelineStage):
    """A stage with correct gradients if the backward pass is split into input gradients and weight gradients.

    To split it, torch asks autograd for the gradients of the tensors in `submod.parameters()`. Its own stage silently
    computes wrong gradients in two cases:
    - FSDP2 has resharded the parameters after the forward pass. The resharded tensors are not in the graph, so the
      micro-batch's gradients are dropped. Here parameters are gathered before either part.
    - The weights' part writes `.grad` itself instead of using autograd's accumulation. Then no post-accumulate hook
      runs, and FSDP2 does not add the low-precision gradient to its sum in the reduction's format. Here both happen.
    """

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass; the output is contiguous and no view."""
        forward: Callable[..., Tensor] = super().forward_maybe_with_nosync
        output = forward(*args, **kwargs)
        # The inputs' part detaches the output in place, which autograd forbids on views.
        output = output.clone() if output._is_view() else output
        return output.contiguous()  # required for sending

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        """Run the backward pass (`full`, `input` or `weight`); parameters are gathered before a part of it."""
        if backward_type != "full":
            for module in self.submod.modules():
                if isinstance(module, FSDPModule):
                    module.unshard()
        gradients, groups = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        if backward_type == "weight":
            self._accumulate()
            return gradients, groups
        return tuple(None if g is None else g.contiguous() for g in gradients), groups

    def _accumulate(self) -> None:
        """Do what autograd and FSDP2 do after a gradient has been accumulated."""
        for parameter in self.submod.parameters():
            if parameter.grad is not None:
                for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):
                    hook(parameter)
        for module in self.submod.modules():
            if isinstance(module, FSDPModule):
                state: Any = module._get_fsdp_state()
                groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
                for group in groups:
                    if group is not None:
                        group.post_backward()


class Pipeline:
    """The pipeline stages of this rank, and the schedule that runs them.

    Args:
        layout: gives `schedule`, `pp` and `virtual_stages`.
        stages: this rank's stages by their number in the pipeline, each called as `stage(x, index)`: `x` is token ids
            int64 `[B, T]` on the first stage and activations `[B, T', D]` on the others; `index`, an int64 tensor of
            one element, is the micro-batch's number. The last stage returns the summed loss, an fp32 scalar.
        group: the pipeline group, whose rank r holds `layout.stages_of(r)`.
        examples: tensors (meta ones will do) with the shape and dtype of the first stage's input and of the activations
            between stages. Without them torch would run a forward pass to find out.
    """

    def __init__(
        self,
        layout: Layout,
        stages: Mapping[int, nn.Module],
        group: dist.ProcessGroup,
        examples: tuple[Tensor, Tensor],
    ) -> None:
        # When a step fails, torch logs every rank's actions on each rank. The exception is enough to say what failed.
        logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)
        self.layout = layout
        self.stages = dict(sorted(stages.items()))
        self.group = group
        self.tokens, self.hidden = (torch.empty_like(example, device="meta") for example in examples)
        self.device = next(next(iter(stages.values())).parameters()).device
        self.rank_of = {stage: rank for rank in range(layout.pp) for stage in layout.stages_of(rank)}
        members = dist.get_process_group_ranks(group)
        # Two ranks that send in both directions need a group per direction: on a GPU a shared group may deadlock.
        self.backward_group = (
            dist.new_group(members, use_local_synchronization=True) if layout.virtual_stages > 1 else group
        )
        self.schedule: PipelineScheduleSingle | PipelineScheduleMulti | None = None
        self.num_micro_batches = 0
        self.scaled: Callable[[Tensor], Tensor] = lambda loss: loss
        self.losses: list[Tensor] = []

    def train(self, micro_batches: Sequence[MicroBatch], scaled: Callable[[Tensor], Tensor]) -> Tensor:
        """Run forward and backward of a step's micro-batches and sum the gradients of each one's `scaled(loss)`.

        The number of micro-batches may differ from step to step. Every rank of the group must pass the same ones.
        Returns the summed loss before `scaled`, fp32, on the rank with the last stage, and 0 on the others.
        """
        if self.schedule is None or self.num_micro_batches != len(micro_batches):
            self.schedule = self._build(len(micro_batches))
            self.num_micro_batches = len(micro_batches)
        self.scaled = scaled
        inputs = [torch.cat([batch.tokens for batch in micro_batches])] if 0 in self.stages else []
        index = torch.arange(len(micro_batches))
        # torch requires a target for each micro-batch; the last stage looks its labels up by the micro-batch's number
        self.schedule.step(*inputs, index=index, target=torch.zeros(len(micro_batches)), return_outputs=False)
        return self._total()

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Run the forward pass of any number of micro-batches of one size, and return what `train` does.

        Micro-batches run in rounds of `pp`; a rank finishes a round on all its stages before the next.
        """
        sends: list[tuple[Tensor, dist.Work | None]] = []
        for start in range(0, len(micro_batches), self.layout.pp):
            numbers = range(start, min(start + self.layout.pp, len(micro_batches)))
            between: dict[int, Tensor] = {}  # activations between two stages of this rank
            for number, stage in self.stages.items():
                for micro_batch in numbers:
                    x = between.pop(micro_batch, None)
                    if x is None:
                        x = self._receive(number, micro_batches[micro_batch].tokens)
                    output = stage(x, torch.tensor([micro_batch]))
                    if number + 1 == self.layout.num_stages:
                        self.losses.append(output)
                    elif number + 1 in self.stages:
                        between[micro_batch] = output
                    else:
                        output = output.contiguous()
                        peer, group = self._channel(number, number + 1)
                        sends.append((output, dist.isend(output, group=group, group_dst=peer)))
        for _, send in sends:
            if send is not None:
                send.wait()
        return self._total()

    def _receive(self, stage: int, tokens: Tensor) -> Tensor:
        """Return a stage's input: token ids, or the activations that the previous stage sent."""
        if stage == 0:
            return tokens
        rows, length = tokens.shape
        shape = (rows, length * self.hidden.shape[1] // self.tokens.shape[1], *self.hidden.shape[2:])
        x = torch.empty(shape, dtype=self.hidden.dtype, device=self.device)
        peer, group = self._channel(stage, stage - 1)
        dist.recv(x, group=group, group_src=peer)
        return x

    def _channel(self, stage: int, other: int) -> tuple[int, dist.ProcessGroup]:
        """Return the rank of another stage, and the group that carries activations between the two."""
        source, target = self.rank_of[min(stage, other)], self.rank_of[max(stage, other)]
        return self.rank_of[other], self.group if source < target else self.backward_group

    def _total(self) -> Tensor:
        losses, self.losses = self.losses, []
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.device)

    def _loss(self, output: Tensor, _: Tensor) -> Tensor:
        self.losses.append(output.detach())
        return self.scaled(output)

    def _build(self, num_micro_batches: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        """Return torch's schedule for a number of micro-batches, with new stages: their buffers depend on it."""
        num_stages = self.layout.num_stages
        hidden = self.hidden.clone().requires_grad_()
        loss = torch.empty((), device="meta", requires_grad=True)
        stages = [
            SplitBackwardStage(
                module,
                number,
                num_stages,
                self.device,
                input_args=self.tokens if number == 0 else hidden,
                output_args=loss if number == num_stages - 1 else hidden,
                group=self.group,
            )
            for number, module in self.stages.items()
        ]
        settings: dict[str, Any] = {"n_microbatches": num_micro_batches, "loss_fn": self._loss, "scale_grads": False}
        if self.layout.schedule in ONE_STAGE_A_RANK:
            return ONE_STAGE_A_RANK[self.layout.schedule](stages[0], **settings)
        return SEVERAL_STAGES_A_RANK[self.layout.schedule](list(stages), **settings)
