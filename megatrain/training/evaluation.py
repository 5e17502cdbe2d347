"""The result of one held-out evaluation: a loss for each source, and their weighted mean."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from megatrain.training.protocols import WeightedSource


@dataclass
class Evaluation:
    """Losses by source (nats a token), and sums for the weighted mean and the bits per byte."""

    losses: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    _weights: float = 0.0
    _weighted: float = 0.0
    _bytes: float | None = 0.0

    def add(self, share: WeightedSource, loss_sum: float, tokens: int) -> None:
        """Add a source's losses, which sum to `loss_sum` nats over `tokens` labels of all ranks.

        The loss is NaN if no token was a label, as may be in the first windows of long conversations; such a source is
        left out of the mean. It has none in any evaluation of a run, as all read the same windows.
        """
        loss = self.losses[share.source] = loss_sum / tokens if tokens else math.nan
        self.tokens += tokens
        if not (share.weight and tokens):
            return
        self._weights += share.weight
        self._weighted += share.weight * loss
        per_token = share.bytes_per_token
        self._bytes = self._bytes + share.weight * per_token if self._bytes is not None and per_token else None

    @property
    def loss(self) -> float:
        """The weighted mean of the losses; NaN without any."""
        return self._weighted / self._weights if self._weights else math.nan

    def metrics(self) -> dict[str, float]:
        """Return the keys of metrics.jsonl."""
        by_source = {f"heldout_loss/{name}": loss for name, loss in self.losses.items() if name}
        return {"heldout_loss": self.loss, **by_source}

    def detail(self) -> dict[str, Any]:
        """Return the fields of the event `evaluate`."""
        detail: dict[str, Any] = {
            **self.metrics(),
            "perplexity": math.exp(min(self.loss, 700.0)),
            "tokens": self.tokens,
        }
        if self._bytes:
            detail["bits_per_byte"] = self._weighted / math.log(2) / self._bytes
        return detail
