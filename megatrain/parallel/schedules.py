"""In which order the stages of a pipeline run: what lies between a layout and `torch.distributed.pipelining`.

What a stage computes is pipeline.py's. Gradients are summed over micro-batches, never averaged: the caller divides the
summed loss by the step's tokens.
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
    """A stage whose gradients stay whole where the backward pass is split into the inputs' and the weights' part.

    The split walks `submod.parameters()` and asks autograd for these very tensors. Torch's own stage goes wrong, silently:
    - where FSDP2 has resharded the parameters after the forward pass they are not in the graph, and that micro-batch's
      gradients are dropped. Here they are gathered before either part.
    - the weights' part writes `.grad` itself instead of going through autograd's accumulation, so that neither
      post-accumulate hooks run nor FSDP2 adds a low-precision gradient to its sum in the reduction's format. Here both do.
    """

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward_maybe_with_nosync(*args, **kwargs)
        # the inputs' part detaches the output in place, which autograd forbids for views
        output = output.clone() if output._is_view() else output
        return output.contiguous()  # or it could not be sent

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
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
        """What autograd does after it has added to a parameter's gradient."""
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
    """The stages of this rank and the neighbours it runs them with.

    Args:
        layout: `schedule`, `pp` and `virtual_stages` of it count.
        stages: this rank's stages by their number in the pipeline, each called as `stage(x, index)`: `x` is token ids
            int64 `[B, T]` on the first stage and activations `[B, T', D]` on the others, `index` an int64 tensor of one
            element, the micro-batch's number. The last one returns the micro-batch's summed loss, an fp32 scalar.
        group: the pipeline group, whose rank r holds `layout.stages_of(r)`.
        examples: tensors (meta ones will do) with the shape and dtype of a first stage's input and of what passes between
            stages, so that no forward pass has to be spent on finding them out.
    """

    def __init__(
        self,
        layout: Layout,
        stages: Mapping[int, nn.Module],
        group: dist.ProcessGroup,
        examples: tuple[Tensor, Tensor],
    ) -> None:
        # a failing step logs the order of every rank's actions, on each rank; the exception says what failed
        logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)
        self.layout = layout
        self.stages = dict(sorted(stages.items()))
        self.group = group
        self.tokens, self.hidden = (torch.empty_like(example, device="meta") for example in examples)
        self.device = next(next(iter(stages.values())).parameters()).device
        self.rank_of = {stage: rank for rank in range(layout.pp) for stage in layout.stages_of(rank)}
        members = dist.get_process_group_ranks(group)
        # a pair of ranks that sends in both directions needs a channel for each: one alone may block itself on a GPU
        self.backward_group = (
            dist.new_group(members, use_local_synchronization=True) if layout.virtual_stages > 1 else group
        )
        self.schedule: PipelineScheduleSingle | PipelineScheduleMulti | None = None
        self.num_micro_batches = 0
        self.scaled: Callable[[Tensor], Tensor] = lambda loss: loss
        self.losses: list[Tensor] = []

    def train(self, micro_batches: Sequence[MicroBatch], scaled: Callable[[Tensor], Tensor]) -> Tensor:
        """Forward and backward of a step's micro-batches; gradients of `scaled(loss)` of each are added up.

        Their number may differ from step to step. Every rank of the group is given the same micro-batches. Returns the
        summed loss as it was before `scaled`, fp32, on the rank with the last stage, and 0 on the others.
        """
        if self.schedule is None or self.num_micro_batches != len(micro_batches):
            self.schedule = self._build(len(micro_batches))
            self.num_micro_batches = len(micro_batches)
        self.scaled = scaled
        inputs = [torch.cat([batch.tokens for batch in micro_batches])] if 0 in self.stages else []
        index = torch.arange(len(micro_batches))
        # torch wants a target for each micro-batch; ours reach the last stage by their number
        self.schedule.step(*inputs, index=index, target=torch.zeros(len(micro_batches)), return_outputs=False)
        return self._total()

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Forward only, of any number of micro-batches, of any size as long as they are of one; returns as `train` does.

        In rounds of as many micro-batches as there are ranks, each round through all stages of a rank before the next.
        """
        sends: list[tuple[Tensor, dist.Work | None]] = []
        for start in range(0, len(micro_batches), self.layout.pp):
            numbers = range(start, min(start + self.layout.pp, len(micro_batches)))
            here: dict[int, Tensor] = {}  # what passes between two stages of this rank
            for number, stage in self.stages.items():
                for micro_batch in numbers:
                    x = here.pop(micro_batch, None)
                    if x is None:
                        x = self._receive(number, micro_batches[micro_batch].tokens)
                    output = stage(x, torch.tensor([micro_batch]))
                    if number + 1 == self.layout.num_stages:
                        self.losses.append(output)
                    elif number + 1 in self.stages:
                        here[micro_batch] = output
                    else:
                        output = output.contiguous()
                        peer, group = self._channel(number, number + 1)
                        sends.append((output, dist.isend(output, group=group, group_dst=peer)))
        for _, send in sends:
            if send is not None:
                send.wait()
        return self._total()

    def _receive(self, stage: int, tokens: Tensor) -> Tensor:
        """A stage's input: token ids, or what the stage before it has sent."""
        if stage == 0:
            return tokens
        rows, length = tokens.shape
        shape = (rows, length * self.hidden.shape[1] // self.tokens.shape[1], *self.hidden.shape[2:])
        x = torch.empty(shape, dtype=self.hidden.dtype, device=self.device)
        peer, group = self._channel(stage, stage - 1)
        dist.recv(x, group=group, group_src=peer)
        return x

    def _channel(self, stage: int, other: int) -> tuple[int, dist.ProcessGroup]:
        """The rank of another stage, and the group through which activations pass between the two."""
        source, target = self.rank_of[min(stage, other)], self.rank_of[max(stage, other)]
        return self.rank_of[other], self.group if source < target else self.backward_group

    def _total(self) -> Tensor:
        losses, self.losses = self.losses, []
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.device)

    def _loss(self, output: Tensor, _: Tensor) -> Tensor:
        self.losses.append(output.detach())
        return self.scaled(output)

    def _build(self, num_micro_batches: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        """Torch's schedule for a number of micro-batches. Torch's stages hold buffers for that number, so they are new too."""
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
