"""Every cleaning step by the name that `clean.steps` uses."""

from __future__ import annotations

from megatrain.data.corpus.document import Step
from megatrain.data.corpus.steps.length import Length

STEPS: dict[str, type[Step]] = {step.name: step for step in (Length,)}
