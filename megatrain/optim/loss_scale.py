"""Dynamic loss scaling for fp16: one rule for every engine (Micikevicius et al., 2018). No engine code here."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config import PrecisionConfig
from megatrain.errors import DivergedError


@dataclass(frozen=True)
class LossScaleState:
    """What a checkpoint keeps of a loss scaler."""

    scale: float
    good_steps: int
    hysteresis: int


@dataclass
class LossScaler:
    """Multiplies the loss so that small fp16 gradients do not vanish.

    The scale doubles after `window` good steps in a row and halves once an overflow finds the hysteresis used up; a
    doubling refills the hysteresis. Outside fp16 the scale is 1 and never moves.
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
        """The scaler of a run's first step."""
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
        """Move the scale after a step that overflowed or not.

        Raises:
            DivergedError: an overflow at the smallest allowed scale; smaller steps cannot help any more.
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
                    f"lower optim.lr or train in precision=bf16"
                )
            else:
                self.scale = max(self.scale / 2.0, self.min_scale)
            return
        self.good_steps += 1
        if self.good_steps % self.window == 0:
            self.scale *= 2.0
            self.hysteresis = self.full_hysteresis

    def state(self) -> LossScaleState | None:
        """Return what a checkpoint keeps; None outside fp16."""
        return LossScaleState(self.scale, self.good_steps, self.hysteresis) if self.enabled else None

    def load(self, state: LossScaleState | None) -> None:
        """Continue from a checkpoint's state; None (a checkpoint of another precision) changes nothing."""
        if self.enabled and state is not None:
            self.scale, self.good_steps, self.hysteresis = state.scale, state.good_steps, state.hysteresis
