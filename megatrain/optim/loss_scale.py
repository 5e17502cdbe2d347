"""Dynamic loss scaling for fp16 (Micikevicius et al., 2018): one rule for all engines."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config import PrecisionConfig
from megatrain.errors import DivergedError


@dataclass(frozen=True)
class LossScaleState:
    """State of a loss scaler that checkpoints store."""

    scale: float
    good_steps: int
    hysteresis: int


@dataclass
class LossScaler:
    """Dynamic factor of the loss that keeps small fp16 gradients from vanishing.

    The scale doubles after `window` steps in a row without overflow. Each overflow reduces the hysteresis by 1; if it
    is already 1, the scale halves instead. Doubling restores the full hysteresis. Outside fp16 the scale is always 1.
    """

    enabled: bool
    scale: float
    window: int
    full_hysteresis: int
    min_scale: float
    good_steps: int = 0
    hysteresis: int = 0

    @classmethod
    def from_config(cls, precision: PrecisionConfig) -> LossScaler:
        """Return the scaler for the first step of a run."""
        enabled = precision.name == "fp16"
        return cls(
            enabled=enabled,
            scale=precision.initial_loss_scale if enabled else 1.0,
            window=precision.loss_scale_window,
            full_hysteresis=precision.loss_scale_hysteresis,
            min_scale=precision.min_loss_scale,
            hysteresis=precision.loss_scale_hysteresis,
        )

    def update(self, overflow: bool) -> None:
        """Adjust the scale after a step.

        Raises:
            DivergedError: gradients overflowed at the smallest allowed scale.
        """
        if not self.enabled:
            return
        if overflow:
            self.good_steps = 0
            if self.hysteresis > 1:
                self.hysteresis -= 1
            elif self.scale <= self.min_scale:
                raise DivergedError(
                    f"gradients overflow at the smallest loss scale (precision.min_loss_scale={self.min_scale:g}); "
                    f"continue in precision=bf16, or with a lower optim.lr and 'checkpoint.override=[optim.lr]'"
                )
            else:
                self.scale = max(self.scale / 2.0, self.min_scale)
            return
        self.good_steps += 1
        if self.good_steps % self.window == 0:
            self.scale *= 2.0
            self.hysteresis = self.full_hysteresis

    def state(self) -> LossScaleState | None:
        """Return the state to store in a checkpoint; None outside fp16."""
        return LossScaleState(self.scale, self.good_steps, self.hysteresis) if self.enabled else None

    def load(self, state: LossScaleState | None) -> None:
        """Restore a checkpoint's state. None (a checkpoint in another precision) changes nothing."""
        if self.enabled and state is not None:
            self.scale, self.good_steps, self.hysteresis = state.scale, state.good_steps, state.hysteresis
