"""Augment documents by translating them into another language and back."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatrain.config import key
from megatrain.data.corpus.augmentation import Augmentation, sentences
from megatrain.data.corpus.document import Document
from megatrain.data.corpus.source import require_library
from megatrain.data.corpus.word_lists import digest_of
from megatrain.errors import ConfigError

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class BackTranslate(Augmentation):
    """Translate some documents sentence by sentence with one model, and back with another (Sennrich et al. 2016,
    arXiv 1511.06709).

    The models are folders that transformers' `AutoModelForSeq2SeqLM` loads, such as Marian's or T5's, with weights in
    safetensors and their tokenizers (`megatrain[hf]`); nothing is downloaded and no code from them is run. A model of
    many languages (NLLB, M2M100, mBART) is told them by `language` and `foreign`, and may serve both ways. Beams are
    searched without sampling, on one thread of a CPU, in batches of one document, so the same document gives the same
    text. Line ends and the spaces between sentences stay. A sentence that is longer than a model takes, or that comes
    back empty, stays as it was. Each worker holds both models. Other weights make another dataset.
    """

    name: ClassVar[str] = "back_translate"
    there: str | None = key(None, "folder of the model that translates; must be given")
    back: str | None = key(None, "folder of the model that translates back; must be given")
    there_prefix: str = key("", "text before each sentence, as T5 wants: 'translate English to German: '")
    back_prefix: str = key("", "the same on the way back")
    language: str | None = key(
        None, "code of the documents' language, for models of many: eng_Latn (NLLB), en (M2M100)"
    )
    foreign: str | None = key(None, "code of the language to translate into, for models of many languages")
    num_beams: int = key(1, "beams of the search; 1 is greedy", minimum=1)
    max_tokens: int = key(256, "longest sentence, in tokens of either model", minimum=1)
    batch_size: int = key(16, "sentences translated at once", minimum=1)

    def __post_init__(self) -> None:
        require_library("transformers", "the cleaning step back_translate", "hf")
        if (self.language is None) != (self.foreign is None):
            raise ConfigError("clean.steps: back_translate: give language and foreign, or neither of them")
        digests = {}
        for name in ("there", "back"):
            if getattr(self, name) is None:
                raise ConfigError(f"clean.steps: back_translate.{name}: missing; give the folder of a model")
            digests[name] = _check_folder(name, Path(getattr(self, name)).expanduser())
        object.__setattr__(self, "_digests", digests)  # no parameter: what the folders hold now

    def settings(self) -> dict[str, Any]:
        """Return the parameters, and digests of the models' files."""
        return asdict(self) | {"digests": self.__dict__["_digests"]}

    def augmented(self, document: Document, draw: random.Random) -> str:
        """Return the text, there and back."""
        lines = [sentences(line) for line in document.text.split("\n")]
        texts = [text for line in lines for text, _ in line if text]
        digests = self.__dict__["_digests"]
        there, back = _load(str(self.there), digests["there"]), _load(str(self.back), digests["back"])
        foreign = self._translated(texts, there, self.there_prefix, self.language, self.foreign)
        known = [text for text in foreign if text]
        again = iter(self._translated(known, back, self.back_prefix, self.foreign, self.language))
        translated = [next(again) if text else None for text in foreign]
        document.count("sentences_left", sum(text is None for text in translated))
        result = iter(translated)
        written = []
        for line in lines:
            done = [((next(result) or text) if text else "") + gap for text, gap in line]
            written.append("".join(done))
        document.count("sentences", len(texts))
        return "\n".join(written)

    def _translated(
        self, texts: Sequence[str], loaded: tuple[Any, Any, int], prefix: str, source: str | None, target: str | None
    ) -> list[str | None]:
        """Return each text in the other language, on one line; None if it is too long or comes back empty."""
        torch = require_library("torch", "the cleaning step back_translate", "hf")
        tokenizer, model, longest = loaded
        options = _between(tokenizer, source, target)
        limit = min(self.max_tokens, longest)
        fitting = [at for at, text in enumerate(texts) if len(tokenizer(prefix + text)["input_ids"]) <= limit]
        found: list[str | None] = [None] * len(texts)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the order of sums, and so the words, may depend on it
        try:
            for start in range(0, len(fitting), self.batch_size):
                chosen = fitting[start : start + self.batch_size]
                inputs = tokenizer([prefix + texts[at] for at in chosen], return_tensors="pt", padding=True)
                with torch.inference_mode():
                    ids = model.generate(
                        input_ids=inputs["input_ids"],
                        attention_mask=inputs["attention_mask"],
                        num_beams=self.num_beams,
                        do_sample=False,
                        max_new_tokens=limit,
                        **options,
                    )
                if options:
                    ids = ids[:, 2:]  # the start and the language, which not every tokenizer leaves out
                for at, text in zip(chosen, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                    found[at] = " ".join(text.split()) or None
        finally:
            torch.set_num_threads(threads)
        return found


def _between(tokenizer: Any, source: str | None, target: str | None) -> dict[str, Any]:
    """Let a tokenizer of many languages mark texts as `source`; return what lets its model write in `target`.

    Raises ConfigError if it has no such language, or needs to be told one.
    """
    if not hasattr(tokenizer, "src_lang"):  # of one pair of languages
        return {}
    place = f"clean.steps: back_translate: {tokenizer.name_or_path} translates between many languages"
    if source is None or target is None:
        raise ConfigError(f"{place}; give their codes, as in {{language: eng_Latn, foreign: fra_Latn}}")
    ids = {}
    for code in (source, target):
        try:
            ids[code] = getattr(tokenizer, "get_lang_id", tokenizer.convert_tokens_to_ids)(code)
        except KeyError:
            ids[code] = tokenizer.unk_token_id
        if ids[code] == tokenizer.unk_token_id:
            raise ConfigError(f"{place}, but not {code}; give the codes that its model card lists")
    tokenizer.src_lang = source
    return {"forced_bos_token_id": ids[target]}


def _check_folder(name: str, folder: Path) -> str:
    """Return the digest of all files of a model's folder. Raises ConfigError if it holds no model in safetensors."""
    place = f"clean.steps: back_translate.{name}={folder}"
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{place}: no config.json there; give the folder of a model that was downloaded before")
    weights = next((folder / file for file in _WEIGHTS if (folder / file).is_file()), None)
    if weights is None:
        raise ConfigError(f"{place}: no {_WEIGHTS[0]} there; save the model with transformers' save_pretrained")
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return " ".join(f"{file.name} {digest_of(str(file))}" for file in files)


@functools.lru_cache(maxsize=4)
def _load(folder: str, digest: str) -> tuple[Any, Any, int]:
    """Load a tokenizer and its model once in each process; also return the longest input, in tokens."""
    transformers = require_library("transformers", "the cleaning step back_translate", "hf")
    transformers.utils.logging.disable_progress_bar()
    place = Path(folder).expanduser()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(place, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"clean.steps: back_translate: {folder} is not a sequence-to-sequence model of transformers ({reason})"
        ) from error
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 2**30)
    return tokenizer, model.eval().float(), int(longest)
