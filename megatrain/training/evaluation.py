"""The result of one held-out evaluation: a loss for each source, and their weighted mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatrain.optim.objective import SQUARED, TOKENS
from megatrain.training.protocols import WeightedSource


@dataclass
class Evaluation:
    """Losses by source (nats a token), and sums for the weighted mean and the bits per byte.

    `scalars` are those of the objective, as means over its terms, of a run on one dataset.
    """

    losses: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    scalars: dict[str, float] = field(default_factory=dict)
    _weights: float = 0.0
    _weighted: float = 0.0
    _bytes: float | None = 0.0

    def add(
        self, share: WeightedSource, loss_sum: float, tokens: int, scalars: Mapping[str, float] | None = None
    ) -> None:
        """Add a source's losses, which sum to `loss_sum` nats over `tokens` labels (or pairs) of all ranks.

        The loss is NaN if no token was a label, as may be in the first windows of long conversations; such a source is
        left out of the mean. It has none in any evaluation of a run, as all read the same windows.
        """
        loss = self.losses[share.source] = loss_sum / tokens if tokens else math.nan
        self.tokens += tokens
        if scalars and not share.source:
            self.scalars = dict(scalars)
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
        return {"heldout_loss": self.loss, **by_source, **{f"heldout_{name}": x for name, x in self.scores().items()}}

    def scores(self) -> dict[str, float]:
        """Return the objective's scalars that are recorded, and the standard errors that are known."""
        found = {name: x for name, x in self.scalars.items() if not name.endswith(SQUARED) and name != TOKENS}
        if found and self.tokens:
            squares = {name.removesuffix(SQUARED): x for name, x in self.scalars.items() if name.endswith(SQUARED)}
            means = {**found, "loss": self.loss}
            if "accuracy" in found:
                squares["accuracy"] = found["accuracy"]  # it is 0 or 1
            for name, square in squares.items():
                found[f"{name}_se"] = math.sqrt(max(0.0, square - means[name] ** 2) / self.tokens)
        return found

    def detail(self) -> dict[str, Any]:
        """Return the fields of the event `evaluate`."""
        of_pairs = TOKENS in self.scalars
        detail: dict[str, Any] = {
            **self.metrics(),
            **({} if of_pairs else {"perplexity": math.exp(min(self.loss, 700.0))}),
            "pairs" if of_pairs else "tokens": self.tokens,
        }
        if self._bytes and not of_pairs:
            detail["bits_per_byte"] = self._weighted / math.log(2) / self._bytes
        return detail
