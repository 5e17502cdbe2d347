"""The stages of preparing text: clean, select, encode, write. Each keeps what is finished in the work folder.

Cleaning and encoding go shard by shard, so tasks can share them; selecting (duplicates, what is held out, the
tokenizer) needs all documents at once, and writing joins them.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatrain.config import PrepareConfig
from megatrain.config.data_config import CHAT_KINDS
from megatrain.data.card import SPLITS, Card, TokenizerCard, card_of_written, fingerprint
from megatrain.data.chat.layout import Layout
from megatrain.data.corpus import pipeline
from megatrain.data.corpus.cleaned import CleanedShard
from megatrain.data.corpus.encoded import EncodedShard
from megatrain.data.corpus.fill_in_the_middle import FillInTheMiddle
from megatrain.data.corpus.near_duplicates import NearDuplicates, drop_near_duplicates
from megatrain.data.corpus.passages import Passages, cut_passages
from megatrain.data.corpus.recipe import StepReport
from megatrain.data.corpus.selected import Selected, selected_folder
from megatrain.data.corpus.selection import TRAIN, Selection
from megatrain.data.corpus.shard import ALL, Share
from megatrain.data.corpus.source import Source
from megatrain.data.corpus.text_files import REMOVED, TEXT, TextPart
from megatrain.data.corpus.worker_pool import Workers
from megatrain.data.indexed import token_dtype
from megatrain.data.preparation_summary import QUARANTINE, bad_kinds, format_counts, num_bad
from megatrain.data.special_tokens import chat_template
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.data.tokenizer_training import train_tokenizer
from megatrain.distributed.rank_environment import usable_cores
from megatrain.errors import ConfigError, DataError, MegatrainError
from megatrain.resilience.atomic_file import write_atomically

EXAMPLES = "examples.jsonl"
"""Documents that the cleaning steps removed or changed, in the dataset's folder, if there were any."""


class TextStages:
    """The preparation of a source's text in the folder `work`.

    `settings` are those that the card will record, and `dedup` is `clean.dedup`, whatever the older key says.
    """

    def __init__(self, source: Source, config: PrepareConfig, settings: dict[str, Any], dedup: str, work: Path) -> None:
        self.source, self.config, self.dedup, self.work = source, config, dedup, work
        self.key = json.dumps([pipeline.FORMAT, settings, source.identity], sort_keys=True)
        """What decides the selection, but for the contents of the cleaned shards."""

    def workers(self) -> Workers:
        """Return the worker processes that the stages use."""
        return Workers(self.config.data.workers or usable_cores())

    # ------------------------------------------------------------------------------------------ clean and select

    def clean(self, pool: Workers, given: Tokenizer | None, share: Share = ALL) -> list[CleanedShard]:
        """Clean a share of the source; the template of `given` checks messages. Raises `DataError` for bad input."""
        layout = None
        if self.config.data.kind in CHAT_KINDS:
            template = given.chat_template() if given else None
            assert given and template and self.config.tokenizer.path, "a source of messages is opened with a tokenizer"
            layout = Layout(template, given.fingerprint, self.config.tokenizer.kind, self.config.tokenizer.path)
        return pipeline.clean_source(self.source, self.config, pool, self.work / "cleaned", share, layout)

    def select(self, shards: list[CleanedShard], pool: Workers) -> Selected:
        """Decide what is kept and what is held out, or take what an interrupted preparation decided of these shards.

        Raises `DataError` if too many records are bad, or nothing is left to train on.
        """
        counts = pipeline.total_counts(shards)
        first_bad = next((shard.first_bad for shard in shards if shard.first_bad), None)
        check_bad_fraction(counts, self.config.data.max_bad_fraction, first_bad)
        if pages := counts["markup"]:
            print(
                f"note: {pages:,} document{'s are' if pages > 1 else ' is'} HTML, and the tags stay in the text; "
                "clean=web extracts the text, as does the step html in a recipe of your own (clean.steps)",
                file=sys.stderr,
            )
        if saved := Selected.load(self.work, self.key, shards):
            return saved
        documents = Selection(shards, selected_folder(self.work) / "flags")
        near = self._drop_duplicates(documents, counts)
        whole, passages = self._cut_passages(documents, counts, pool)
        reports = pipeline.total_reports(shards)
        selection = self._split(whole, counts, reports, first_bad)
        selected = Selected(documents, whole, selection, counts, reports, near, first_bad, passages)
        selected.save(self.work, self.key)
        return selected

    def selected(self) -> Selected | None:
        """Return what an earlier process selected for these settings, None if there is none."""
        return Selected.load(self.work, self.key)

    def _drop_duplicates(self, selection: Selection, counts: Counter[str]) -> NearDuplicates | None:
        """Drop and count duplicates. Return what was found of near duplicates, None if they are not looked for."""
        clean = self.config.clean
        memory = clean.dedup_memory_mb * 2**20
        if self.dedup != "none" and (dropped := selection.drop_duplicates(memory)):
            counts["duplicates"] = dropped
        signing = pipeline.signing_of(self.config)
        if not signing:
            return None
        found = drop_near_duplicates(selection, clean.minhash, signing, memory, self.work / "bands")
        if found.documents:
            counts["near_duplicates"] = found.documents
        return found

    def _cut_passages(
        self, selection: Selection, counts: Counter[str], pool: Workers
    ) -> tuple[Selection, StepReport | None]:
        """Cut repeated passages out, and drop documents that are equal only now. Return what was cut, None if off."""
        clean = self.config.clean
        if clean.dedup_passages == "none":
            return selection, None
        memory = clean.dedup_memory_mb * 2**20
        passages = Passages(clean.dedup_passages, clean.min_passage_characters)
        selection, report = cut_passages(selection, passages, pool, self.work / "cut", memory, self.config.seed)
        if self.dedup != "none" and (dropped := selection.drop_duplicates(memory)):
            counts["duplicates_once_cut"] = dropped
        return selection, report

    def _split(
        self, selection: Selection, counts: Counter[str], reports: list[StepReport], first_bad: str | None
    ) -> Selection:
        """Decide what is held out, and count it. Raises `DataError` if nothing is left to train on."""
        data = self.config.data
        kept = selection.count(TRAIN)
        if not kept:
            first = f"; the first bad record: {first_bad}" if first_bad else ""
            removed = [f"{report.name} removed {format_counts(report.rules)}" for report in reports if report.rules]
            steps = f"; clean={self.config.clean.name}: {'; '.join(removed)}" if removed else ""
            raise DataError(f"data={data.kind}: the corpus is empty ({format_counts(counts)}){first}{steps}")
        if data.folds and data.fold:
            selection.hold_out_fold(data.fold, data.folds)
            return selection
        if kept == 1 and data.kind in CHAT_KINDS and data.heldout_fraction > 0:
            what = {"chat": "conversation", "pairs": "pair", "prompts": "prompt"}[data.kind]
            raise DataError(
                f"data={data.kind}: there is one {what}, of which none can be held out; set data.heldout_fraction=0"
            )
        if kept == 1 and data.heldout_fraction > 0:
            counts["cut_in_two"] = 1
            path = selection.path.with_name("flags_of_halves")
            return pipeline.cut_in_two(selection.shards, selection, data.heldout_fraction, path)
        selection.hold_out(data.heldout_fraction)
        return selection

    # ------------------------------------------------------------------------------------------ the tokenizer

    def tokenizer(self, selected: Selected, given: Tokenizer | None) -> Tokenizer:
        """Return the given tokenizer, or train one on a sample of the corpus; keep it for tasks and later starts."""
        key = self._tokenizer_key(selected, given)
        saved, saved_key = self.work / "tokenizer", self.work / "tokenizer.json"
        if saved_key.is_file() and saved_key.read_text(encoding="utf-8") == key:
            with suppress(MegatrainError):  # damaged, as after a power cut: make it again
                found = load_tokenizer(saved)
                return given or found
        saved_key.unlink(missing_ok=True)
        tokenizer = given or self._train_tokenizer(selected.selection)
        shutil.rmtree(saved, ignore_errors=True)
        tokenizer.save(saved)
        write_atomically(saved_key, key)
        return tokenizer

    def saved_tokenizer(self, selected: Selected) -> Tokenizer | None:
        """Return the tokenizer that the process that selected kept, None if there is none."""
        with suppress(MegatrainError, OSError, ValueError, LookupError):
            key = json.loads((self.work / "tokenizer.json").read_text(encoding="utf-8"))
            if key[:2] == json.loads(self._tokenizer_key(selected, None))[:2]:
                return load_tokenizer(self.work / "tokenizer")
        return None

    def _tokenizer_key(self, selected: Selected, given: Tokenizer | None) -> str:
        of_given = [given.fingerprint, given.start(), given.end_of_document] if given else None
        of_trained = None if given else chat_template(self.config.tokenizer)
        return json.dumps([[shard.key for shard in selected.documents.shards], self.key, of_given or of_trained])

    def _train_tokenizer(self, selection: Selection) -> Tokenizer:
        config = self.config
        start = time.monotonic()
        texts = pipeline.sample_texts(selection, config.tokenizer.train_bytes)
        tokenizer = train_tokenizer(texts, config.tokenizer, config.data.bos)
        tokenizer.starts_with_bos = config.data.bos
        asked, size = config.tokenizer.vocab_size, tokenizer.vocab_size
        print(f"tokenizer: trained {size:,} pieces in {time.monotonic() - start:.1f} s", file=sys.stderr)
        if size < asked:
            print(
                f"note: this text has fewer pieces than tokenizer.vocab_size={asked}, so the vocabulary is smaller; "
                "nothing needs to be done, and more text would give a larger one",
                file=sys.stderr,
            )
        return tokenizer

    # ------------------------------------------------------------------------------------------ encode and write

    def encode(self, selected: Selected, tokenizer: Tokenizer, pool: Workers, share: Share = ALL) -> list[EncodedShard]:
        """Encode a share of the selected documents."""
        dtype = token_dtype(tokenizer.vocab_size)
        saved = self.work / "tokenizer"
        return pipeline.encode_selection(
            *(selected.selection, tokenizer, saved, dtype, pool, self.work / "encoded", share),
            FillInTheMiddle.of(self.config, tokenizer),
            tokenizer.chat_template() if self.config.data.kind in CHAT_KINDS else None,
        )

    def texts(self, selected: Selected, pool: Workers, share: Share = ALL) -> list[TextPart]:
        """Write a share of the text with `data.write_text`; none without."""
        if not self.config.data.write_text:
            return []
        return pipeline.write_texts(selected.documents, selected.whole, pool, self.work / "text", share)

    def encode_selected(self, pool: Workers, share: Share) -> list[EncodedShard]:
        """Encode a share of what another process selected, and write its text if asked.

        Raises `ConfigError` if none has for these settings, `DataError` if a cleaned shard is damaged.
        """
        selected = self.selected()
        tokenizer = self.saved_tokenizer(selected) if selected else None
        if not selected or not tokenizer:
            raise ConfigError(
                f"launch.stage=encode: {self.work} has no selection of these settings and files; do launch.stage=clean "
                "with every task and launch.stage=select first"
            )
        for shards in selected.shards():
            for number, shard in enumerate(shards):
                if share.has(number) and not shard.is_whole():
                    raise DataError(
                        f"{shard.text_path}: damaged, it is not what was written; do launch.stage=clean and "
                        "launch.stage=select again"
                    )
        self.texts(selected, pool, share)
        return self.encode(selected, tokenizer, pool, share)

    def write(
        self,
        selected: Selected,
        tokenizer: Tokenizer,
        encoded: list[EncodedShard],
        texts: list[TextPart],
        folder: Path,
    ) -> Card:
        """Write the dataset but for its card into `folder`, and return the card."""
        for number, part in enumerate(texts):
            for kind in (TEXT, REMOVED):
                part.place(kind, folder, number)
        _join_quarantine(selected.documents.shards, folder / QUARANTINE)
        reports = [*selected.reports, *([selected.passages] if selected.passages else [])]
        _write_examples(reports, selected.near, folder / EXAMPLES)
        tokenizer.save(folder / "tokenizer")
        dtype = token_dtype(tokenizer.vocab_size)
        splits = {}
        for number, name in enumerate(SPLITS, start=1):
            if joined := pipeline.join(encoded, number, folder / name, dtype):
                splits[name] = card_of_written(*joined)
        return Card(
            name=self.config.data.name,
            fingerprint=fingerprint(splits),
            splits=splits,
            tokenizer=TokenizerCard.of(tokenizer),
            counts=dict(sorted(selected.counts.items())),
            cleaning=[report.without_examples() for report in selected.reports],
            near_duplicates=selected.near.without_examples() if selected.near else {},
            duplicate_passages=selected.passages.without_examples() if selected.passages else {},
        )


def check_bad_fraction(counts: Counter[str], limit: float, first_bad: str | None) -> None:
    """Raise `DataError` if more than `data.max_bad_fraction` of the records were left out as bad."""
    bad, kinds = num_bad(counts), bad_kinds(counts)
    if bad > limit * counts["read"]:
        raise DataError(
            f"{bad:,} of {counts['read']:,} records are bad ({format_counts(kinds)}), more than "
            f"data.max_bad_fraction={limit:g} allows; the first: {first_bad}; mend the data, or allow so many with "
            f"data.max_bad_fraction={math.ceil(100 * bad / counts['read']) / 100:g}"
        )


def _join_quarantine(shards: Sequence[CleanedShard], path: Path) -> None:
    """Write the bad records of all shards into one file, if there are any."""
    for shard in shards:
        if shard.quarantine_path.exists():
            with open(path, "ab") as file, open(shard.quarantine_path, "rb") as part:
                shutil.copyfileobj(part, file)


def _write_examples(reports: list[StepReport], near: NearDuplicates | None, path: Path) -> None:
    """Write the steps' examples and those of near duplicates, one a line, if there are any."""
    lines = [json.dumps({"step": report.name} | example) for report in reports for example in report.examples]
    lines += [json.dumps({"step": "near_duplicates"} | example) for example in near.examples] if near else []
    if lines:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
