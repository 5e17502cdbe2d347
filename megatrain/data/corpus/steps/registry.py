"""Every cleaning step by the name that `clean.steps` uses."""

from __future__ import annotations

from megatrain.data.corpus.document import Step
from megatrain.data.corpus.steps.html import Html
from megatrain.data.corpus.steps.language import Language
from megatrain.data.corpus.steps.length import Length
from megatrain.data.corpus.steps.personal_data import PersonalData
from megatrain.data.corpus.steps.unicode import UnicodeRepair

STEPS: dict[str, type[Step]] = {step.name: step for step in (Html, Language, Length, PersonalData, UnicodeRepair)}
