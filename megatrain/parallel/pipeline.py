"""What one pipeline stage computes. schedules.py runs the stages.

A stage is the model without the other stages' layers. Its parameters keep the names they have in the whole model. A job
without a pipeline has one stage, the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatrain.config import ModelConfig
from megatrain.data.batch import MicroBatch
from megatrain.kernels.choice import Kernels
from megatrain.model.gpt import GPT
from megatrain.optim.objective import LossMeter


class StepInputs:
    """The micro-batches of a step and their dropout seeds; sequences are this rank's slice, on its device.

    torch's schedules pass a stage only activations and a micro-batch's number; the stage looks up the rest here. All
    stages of a rank share one object, and the engine loads it before each step.
    """

    def __init__(self) -> None:
        self.micro_batches: Sequence[MicroBatch] = ()
        self.seeds: Sequence[int | None] = ()

    def load(self, micro_batches: Sequence[MicroBatch], seeds: Sequence[int | None]) -> None:
        """Set the micro-batches and seeds of the next step."""
        self.micro_batches, self.seeds = micro_batches, seeds


class Stage(GPT):
    """Blocks `layers` of a model, with the embedding on the first stage and the final norm and the head on the last.

    `inputs` holds the step's micro-batches. The last stage computes the loss with `meter`.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        num_stages: int,
        index: int,
        kernels: Kernels,
        inputs: StepInputs,
        meter: LossMeter,
        has_values: bool = False,
    ) -> None:
        super().__init__(config, kernels, has_values)
        self.is_first, self.is_last = index == 0, index == num_stages - 1
        self.blocks = nn.ModuleDict({str(layer): self.blocks[layer] for layer in layers})  # type: ignore[assignment]
        absent = ([] if self.is_first else ["embed", "positions"]) + (
            [] if self.is_last else ["final_norm", "head", "score", "value"]
        )
        for name in absent:
            setattr(self, name, None)
        self.detach_embedding = False
        self.inputs, self.meter = inputs, meter

    def forward(self, x: Tensor, index: Tensor | int) -> Tensor:  # type: ignore[override]
        """Run the stage on micro-batch `index` (an int, or an int64 tensor of one element).

        `x` are token ids `[B, T]` on the first stage, else activations `[B, T, D]`. Returns activations, or on the last
        stage the summed loss, an fp32 scalar.
        """
        number = int(index)
        micro_batch, seed = self.inputs.micro_batches[number], self.inputs.seeds[number]
        positions = micro_batch.positions
        if positions is None:
            positions = torch.arange(micro_batch.tokens.shape[1], device=x.device)
        if self.is_first:
            x = self.embedded(x, positions, seed)
            if self.detach_embedding:
                # Without the copy, compiled blocks gave a tensor-parallel embedding a wrong gradient.
                x = x.clone()
        mask = self._mask(micro_batch.documents, positions, x.dtype, 0)
        x = self.through_blocks(x, positions, mask, seed)
        return self.meter(self, self.final_norm(x), micro_batch) if self.is_last else x

    def tie(self) -> None:
        """Tie the head to the embedding where this stage holds both."""
        if self.embed is not None and self.head is not None:
            super().tie()

    def single_device_name(self, name: str) -> str:
        """Return a parameter's name in the whole model: for a tied head, the embedding's."""
        if name == "head.weight" and self.config.ties_head:
            return "embed.weight"
        return name

    def units(self) -> list[list[nn.Module]]:
        """Return FSDP2's units, each a list of modules gathered and reduced together, in forward order.

        Each block is a unit. So is each end of the model, unless this stage holds both and they share a weight.
        """
        units: list[list[nn.Module]] = [[block] for block in self.blocks.children()]
        if not (self.is_first and self.is_last and self.config.ties_head):
            first: list[nn.Module] = [module for module in (self.embed, self.positions) if module is not None]
            last: list[nn.Module] = [
                module for module in (self.final_norm, self.head, self.score, self.value) if module is not None
            ]
            units = [unit for unit in (first, *units, last) if unit]
        return units
