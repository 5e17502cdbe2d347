"""Where the model is cut into pipeline stages, and what one stage computes. Which order they run in is schedules.py's.

A stage is the model with the other stages' layers left out: names stay those of the whole model. A job without a pipeline
has one stage, which is the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatrain.config import ModelConfig
from megatrain.data.batch import MicroBatch
from megatrain.kernels.choice import Kernels
from megatrain.model.gpt import GPT


class Stage(GPT):
    """Blocks `layers` of a model, with the embedding where it is the first stage and norm and head where it is the last.

    It reads what belongs to a micro-batch beside its activations (positions, documents, labels, the dropout seed) from
    what `take` was given, by the micro-batch's number, on every stage.
    """

    def __init__(self, config: ModelConfig, layers: range, num_stages: int, index: int, kernels: Kernels) -> None:
        super().__init__(config, kernels)
        self.is_first, self.is_last = index == 0, index == num_stages - 1
        self.blocks = nn.ModuleDict({str(layer): self.blocks[layer] for layer in layers})  # type: ignore[assignment]
        absent = ([] if self.is_first else ["embed", "positions"]) + ([] if self.is_last else ["final_norm", "head"])
        for name in absent:
            setattr(self, name, None)
        self.detach_embedding = False
        self.micro_batches: Sequence[MicroBatch] = ()
        self.seeds: Sequence[int | None] = ()

    def take(self, micro_batches: Sequence[MicroBatch], seeds: Sequence[int | None]) -> None:
        """The micro-batches (on this device, this rank's slice of their sequences) and dropout seeds that come next."""
        self.micro_batches, self.seeds = micro_batches, seeds

    def forward(self, x: Tensor, index: Tensor | int) -> Tensor:  # type: ignore[override]
        """Token ids `[B, T]` (first stage) or activations `[B, T, D]` of micro-batch `index` (an int, or int64 of one element) to
        activations, or on the last stage to the summed loss, an fp32 scalar."""
        number = int(index)
        micro_batch, seed = self.micro_batches[number], self.seeds[number]
        positions = micro_batch.positions
        if positions is None:
            positions = torch.arange(micro_batch.tokens.shape[1], device=x.device)
        if self.is_first:
            x = self.embedded(x, positions, seed)
            if self.detach_embedding:
                # compiled blocks right behind a tensor-parallel embedding gave it a wrong gradient
                x = x.clone()
        mask = self._mask(micro_batch.document_ids, x, 0)
        x = self.through_blocks(x, positions, mask, seed)
        if not self.is_last:
            return x
        return self.loss_of(self.final_norm(x), micro_batch.labels, micro_batch.loss_weights)

    def tie(self) -> None:
        """Only a stage that holds both ends shares a weight between them by itself."""
        if self.embed is not None and self.head is not None:
            super().tie()

    def single_device_name(self, name: str) -> str:
        """The name that a parameter of this stage has in the whole model: a tied head away from the embedding is the
        embedding's weight."""
        if name == "head.weight" and self.config.tie_embeddings:
            return "embed.weight"
        return name

    def units(self) -> list[list[nn.Module]]:
        """The modules that are gathered and reduced together, in the order of the forward pass: each block; each end,
        unless a tied weight joins them."""
        units: list[list[nn.Module]] = [[block] for block in self.blocks.children()]
        if not (self.is_first and self.is_last and self.config.tie_embeddings):
            first: list[nn.Module] = [module for module in (self.embed, self.positions) if module is not None]
            last: list[nn.Module] = [module for module in (self.final_norm, self.head) if module is not None]
            units = [unit for unit in (first, *units, last) if unit]
        return units
