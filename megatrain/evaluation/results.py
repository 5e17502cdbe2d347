"""What an evaluation found: scores with their standard error or interval. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Score:
    """A metric: its value, and its standard error or its 95% `interval` (None if it has none).

    `higher_is_better` is None if that is not known. `variant` names the filter of the answers, empty for none.
    """

    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    variant: str = ""
    interval: tuple[float, float] | None = None

    @property
    def key(self) -> str:
        """The metric's name, with that of the answers' filter if there is one."""
        return f"{self.metric}.{self.variant}" if self.variant else self.metric

    def shown(self) -> str:
        """Return the score for a table: `0.9167 ± 0.0360`, or `0.9167 [0.8264, 0.9652]`."""
        number = _number(self.value)
        if self.interval is not None:
            return f"{number} [{_number(self.interval[0])}, {_number(self.interval[1])}]"
        return number if self.stderr is None else f"{number} ± {self.stderr:.4f}"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.5g}"


@dataclass(frozen=True)
class TaskResult:
    """Scores over the `documents` of a task or a file, what each document got, and further figures (`detail`)."""

    name: str
    version: str | None
    num_fewshot: int | None
    documents: int
    scores: list[Score]
    samples: list[dict[str, Any]] = field(default_factory=list)
    detail: dict[str, Any] = field(default_factory=dict)

    def to_dict(self, with_samples: bool) -> dict[str, Any]:
        """Return the result for JSON, without what is empty."""
        left_out = {"samples"} if not with_samples else set()
        left_out |= set() if self.detail else {"detail"}
        return {name: value for name, value in asdict(self).items() if name not in left_out}
