"""Every cleaning step by the name that `clean.steps` uses."""

from __future__ import annotations

from megatrain.data.corpus.document import Step
from megatrain.data.corpus.steps.back_translate import BackTranslate
from megatrain.data.corpus.steps.blocked_words import BlockedWords
from megatrain.data.corpus.steps.c4 import C4Paragraphs, C4Quality
from megatrain.data.corpus.steps.code_quality import CodeQuality
from megatrain.data.corpus.steps.decontaminate import Decontaminate
from megatrain.data.corpus.steps.fineweb_quality import FinewebQuality
from megatrain.data.corpus.steps.gopher_quality import GopherQuality
from megatrain.data.corpus.steps.gopher_repetition import GopherRepetition
from megatrain.data.corpus.steps.html import Html
from megatrain.data.corpus.steps.language import Language
from megatrain.data.corpus.steps.length import Length
from megatrain.data.corpus.steps.mix_turns import MixTurns
from megatrain.data.corpus.steps.noise import Noise
from megatrain.data.corpus.steps.personal_data import PersonalData
from megatrain.data.corpus.steps.reorder_sentences import ReorderSentences
from megatrain.data.corpus.steps.replace_synonyms import ReplaceSynonyms
from megatrain.data.corpus.steps.unicode import UnicodeRepair
from megatrain.data.corpus.steps.url_filter import UrlFilter

STEPS: dict[str, type[Step]] = {
    step.name: step
    for step in (
        BackTranslate,
        BlockedWords,
        C4Paragraphs,
        C4Quality,
        CodeQuality,
        Decontaminate,
        FinewebQuality,
        GopherQuality,
        GopherRepetition,
        Html,
        Language,
        Length,
        MixTurns,
        Noise,
        PersonalData,
        ReorderSentences,
        ReplaceSynonyms,
        UnicodeRepair,
        UrlFilter,
    )
}
