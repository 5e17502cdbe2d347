"""`megatrain prepare`: read, clean, deduplicate, split, train or load a tokenizer, encode, write.

The stages are in corpus/, each in bounded memory for any corpus size. All of this happens in a hidden folder beside the
target, which one rename turns into the dataset, so an incomplete dataset never has the dataset's name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatrain.config import DataConfig, PrepareConfig, TokenizerConfig
from megatrain.config.data_config import CHAT_KINDS
from megatrain.config.flatten import flatten
from megatrain.config.plain import plain
from megatrain.data.adopt import check_contents_apart, check_prefixes, link, make_card
from megatrain.data.card import CARD, Card, check_dataset
from megatrain.data.chat.settings import check_settings, use_template
from megatrain.data.corpus.fill_in_the_middle import FillInTheMiddle, check_markers
from megatrain.data.corpus.normalise import normalise
from megatrain.data.corpus.recipe import build_recipe, settings_of
from megatrain.data.corpus.shard import Share
from megatrain.data.corpus.source import Source
from megatrain.data.corpus.sources import open_source
from megatrain.data.preparation_summary import bad_records, summary
from megatrain.data.special_tokens import named_template
from megatrain.data.staging import StagingFolder, work_folder
from megatrain.data.text_stages import TextStages
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_loading import find_tokenizer, load_tokenizer
from megatrain.data.tokenizer_training import check_training
from megatrain.errors import ConfigError, DataError, OwnedError, cannot_write

_MIXING = ("mixture", "mixture_temperature", "phases")
_NOT_IDENTITY = ("dir", "workers", "overwrite", "verify", "packing", *_MIXING, "deduplicate")
"""The last: see `_dedup`."""
_TEMPLATES = ("tokenizer.chat_template", "data.chat_template")
"""Keys whose values are compared by what the dataset keeps of them, as a file may be edited, moved or copied."""


def prepare(config: PrepareConfig) -> Path:
    """Prepare the dataset that the config describes, or do one `launch.stage` of it, and return the dataset's folder.

    A finished dataset with the same settings is kept. Raises `ConfigError` (settings, paths, another dataset of that
    name), `DataError` (the text itself), `OwnedError` (another process prepares it) or `EnvironmentFault` (a missing
    library, an unreachable hub).
    """
    opened, given = _open(config)
    if is_prepared(config, _identity(opened), given):
        return _target(config)
    return prepare_from(config, opened, given)


def is_done(config: PrepareConfig) -> bool:
    """Check all that `prepare` checks before its work; return whether the dataset is there already, and say so."""
    opened, given = _open(config)
    return is_prepared(config, _identity(opened), given)


def is_prepared(config: PrepareConfig, identity: dict[str, Any], given: Tokenizer | None) -> bool:
    """Return whether the dataset is there already, and say so. Raises `ConfigError` if its name is another one's."""
    target = _target(config)
    if not _already_prepared(target, settings(config) | {"source": identity}, given, config.data.overwrite):
        return False
    print(f"{target}: already prepared with these settings (data.overwrite=true prepares it again)", file=sys.stderr)
    return True


def prepare_from(config: PrepareConfig, opened: Source | dict[str, list[Path]], given: Tokenizer | None) -> Path:
    """Prepare a dataset from an opened source, or from the prefixes of each split; return its folder.

    `given` is the tokenizer to use (None: train one).
    """
    target = _target(config)
    for note in opened.notes() if isinstance(opened, Source) else ():
        print(f"note: {note}", file=sys.stderr)
    if config.launch.stage in ("clean", "encode"):
        assert isinstance(opened, Source), "check_stage refuses others"
        _do_share(config, opened, given)
        return target
    with StagingFolder(target) as staging, _kept_work_is_named(staging):
        if is_prepared(config, _identity(opened), given):  # another process has finished it a moment ago
            return target
        first_bad, beside = None, list[Path]()
        if isinstance(opened, Source):
            stages = _stages(config, opened, staging.work)
            done = _prepare_text(stages, given, staging.folder)
            if done is None:
                return target
            card, first_bad = done
            beside = opened.write_beside(staging.folder)
        else:
            link(opened, staging.folder)
            card = make_card(staging.folder, config.data.name, given)
            check_contents_apart(card, opened)
            if given:
                given.save(staging.folder / "tokenizer")
        card.source, card.config = _identity(opened), settings(config)
        card.save(staging.folder)
        staging.publish()
    lines = [*summary(target, card), *bad_records(target, card.counts, first_bad)]
    if beside:
        lines.append(f"  beside it, in {target / beside[0].parent.name}: {', '.join(path.name for path in beside)}")
    print("\n".join(lines), file=sys.stderr)
    return target


def _open(config: PrepareConfig) -> tuple[Source | dict[str, list[Path]], Tokenizer | None]:
    """Open the source, or the prefixes of each split, and the tokenizer at `tokenizer.path`."""
    opened = check_prefixes(config.data.paths) if config.data.kind == "megatron" else open_source(config.data)
    if config.launch.stage == "encode" or (config.launch.stage == "clean" and config.data.kind not in CHAT_KINDS):
        return opened, None  # a task that encodes takes the tokenizer that is kept for it
    return opened, given_tokenizer(config)  # may ask a hub, so mistakes in paths are found first


def _target(config: PrepareConfig) -> Path:
    return Path(config.data.dir) / config.data.name


def _identity(opened: Source | dict[str, list[Path]]) -> dict[str, Any]:
    """Return what a source is, or each split's prefix as text (a list of several)."""
    if isinstance(opened, Source):
        return opened.identity
    return {split: str(found[0]) if len(found) == 1 else list(map(str, found)) for split, found in opened.items()}


def _stages(config: PrepareConfig, source: Source, work: Path) -> TextStages:
    return TextStages(source, config, settings(config), _dedup(config), work)


def _do_share(config: PrepareConfig, source: Source, given: Tokenizer | None) -> None:
    """Do a task's share of a stage. Raises `OwnedError` if another process finished or removed its work."""
    launch, work = config.launch, work_folder(_target(config))
    share = Share(launch.task or 0, launch.tasks)
    stages = _stages(config, source, work)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(work.parent, error, "data.dir") from error
    try:
        with stages.workers() as pool:
            if launch.stage == "clean":
                done = len(stages.clean(pool, given, share))
            else:
                done = len(stages.encode_selected(pool, share))
    except FileNotFoundError as error:
        if not work.exists():
            raise OwnedError(f"{work} is gone: the dataset was finished or the folder removed meanwhile") from error
        if error.filename and work in Path(error.filename).parents:
            raise OwnedError(
                f"launch.stage={launch.stage} launch.task={share.task}: files that this task wrote in {work} were "
                "removed, as a later stage does that did its share meanwhile; if nothing else is at work there, start "
                "the task again"
            ) from error
        raise
    print(f"launch.stage={launch.stage}: {done} parts of task {share.task} of {share.tasks} are done", file=sys.stderr)


def _prepare_text(stages: TextStages, given: Tokenizer | None, folder: Path) -> tuple[Card, str | None] | None:
    """Do what is left to do, and write everything but the card into `folder`; with `launch.stage=select` only select.

    Returns the card, and where the first bad record is and why it is bad (None if there is none).
    """
    stage = stages.config.launch.stage
    with stages.workers() as pool:
        selected = stages.selected() if stage == "publish" else None
        selected = selected or stages.select(stages.clean(pool, given), pool)
        tokenizer = stages.tokenizer(selected, given)
        if stage == "select":
            return None
        texts = stages.texts(selected, pool)
        encoded = stages.encode(selected, tokenizer, pool)
    return stages.write(selected, tokenizer, encoded, texts, folder), selected.first_bad


@contextmanager
def _kept_work_is_named(staging: StagingFolder) -> Iterator[None]:
    """Say what an error or Ctrl-C leaves to go on from."""
    try:
        yield
    except BaseException:
        if staging.has_work():
            print(
                f"what is finished is kept in {staging.work}; the same command goes on from there, and does again only "
                "what a changed file or setting concerns",
                file=sys.stderr,
            )
        raise


def given_tokenizer(config: PrepareConfig) -> Tokenizer | None:
    """Load the tokenizer at `tokenizer.path`; None if one is to be trained. Raises `ConfigError`, `DataError`."""
    if config.data.bos and config.data.kind == "megatron":
        raise ConfigError("data.bos=true: the ids of data=megatron stay as they are; tokenize the text again for BOS")
    if config.data.fim_rate and config.data.kind == "megatron":
        raise ConfigError(
            f"data.fim_rate={config.data.fim_rate:g}: the ids of data=megatron stay as they are; prepare the text with "
            "data=files data.fim_rate=... in place of it"
        )
    check_settings(config)
    if config.tokenizer.path:
        tokenizer = find_tokenizer(config.tokenizer.kind, config.tokenizer.path)
        if config.data.kind in CHAT_KINDS:
            use_template(tokenizer, config.data.chat_template)
        elif config.data.kind != "megatron":
            _choose_start(tokenizer, config)
            _note_losses(tokenizer, config.tokenizer.path)
            FillInTheMiddle.of(config, tokenizer)
        return tokenizer
    if config.data.kind != "megatron":
        check_training(config.tokenizer)
        check_markers(config)
    return None


_EXACT = "The END: naïve café, a  b\n\tc 漢字 ﬁ Å"
"""A text that is clean, and that tokenizers which lower, strip or normalise text change."""


def _note_losses(tokenizer: Tokenizer, place: str) -> None:
    """Say that a tokenizer does not give text back as it was: a model would never see what is lost."""
    text = normalise(_EXACT)
    try:
        given = tokenizer.decode(tokenizer.encode(text))
    except DataError:  # it has a control token for characters that it does not know: the corpus may have none
        return
    if given != text:
        print(
            f"note: the tokenizer {place} changes text: {text!r} comes back as {given!r}; a model will not know the "
            "difference, and bits per byte count the text as it was",
            file=sys.stderr,
        )


def _choose_start(tokenizer: Tokenizer, config: PrepareConfig) -> None:
    """Let documents begin with BOS if `data.bos` says so. Raises `ConfigError` if the tokenizer has no BOS for it."""
    place, bos = config.tokenizer.path, tokenizer.beginning_of_document
    if config.data.bos and bos is None:
        raise ConfigError(
            f"data.bos=true: the tokenizer {place} has no BOS token; name one of its tokens as bos_token in its "
            "tokenizer_config.json, or set data.bos=false"
        )
    if config.data.bos and bos == tokenizer.end_of_document:
        raise ConfigError(
            f"data.bos=true: BOS of the tokenizer {place} is its end-of-document token (id {bos}), which is between "
            "documents already; set data.bos=false"
        )
    if tokenizer.starts_with_bos and not config.data.bos:
        print(f"note: {place} puts BOS before a text, but documents get none; data.bos=true adds it", file=sys.stderr)
    tokenizer.starts_with_bos = config.data.bos


def settings(config: PrepareConfig) -> dict[str, Any]:
    """Return the settings that determine the dataset's content, as recorded in the card."""
    data = {key: value for key, value in asdict(config.data).items() if key not in _NOT_IDENTITY}
    clean: dict[str, Any] = {"steps": settings_of(build_recipe(config.clean.steps)), "dedup": _dedup(config)}
    if clean["dedup"] == "minhash":
        clean["minhash"] = asdict(config.clean.minhash)
    if config.clean.dedup_passages != "none":
        clean["dedup_passages"] = config.clean.dedup_passages
        clean["min_passage_characters"] = config.clean.min_passage_characters
    if config.data.kind not in CHAT_KINDS:
        del data["chat_template"]
    return {"seed": config.seed, "data": data, "clean": clean, "tokenizer": asdict(config.tokenizer)}


def _dedup(config: PrepareConfig) -> str:
    """Return `clean.dedup`, or what the older `data.deduplicate` says of it. Raises `ConfigError` if they differ."""
    if config.data.deduplicate or config.clean.dedup == "none":
        return config.clean.dedup
    if config.clean.dedup == "exact":  # the default
        return "none"
    raise ConfigError(
        f"data.deduplicate=false and clean.dedup={config.clean.dedup} contradict each other; leave data.deduplicate out"
    )


def _older(recorded: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that an older card's settings imply: keys that it lacks, and one under an older name."""
    data = {key: value for key, value in asdict(DataConfig()).items() if key not in _NOT_IDENTITY}
    exact = recorded.get("data", {}).get("deduplicate", True)
    clean: dict[str, Any] = {"steps": [], "dedup": "exact" if exact else "none"}
    return {"data": data, "clean": clean, "tokenizer": asdict(TokenizerConfig())}


def _already_prepared(target: Path, settings: dict[str, Any], given: Tokenizer | None, overwrite: bool) -> bool:
    """Return whether `target` is this dataset already (False to overwrite it). Raise `ConfigError` if it is another."""
    if not target.exists():
        return False
    if not (target / CARD).is_file():
        if target.is_dir() and not any(target.iterdir()):
            return False
        raise ConfigError(f"data.name: {target} exists and is not a prepared dataset; choose another data.name")
    if overwrite:
        return False
    card = check_dataset(target)
    was = flatten(_older(card.config)) | flatten(card.config | {"source": card.source})
    now = flatten(settings)
    skipped = {"data.deduplicate", *_TEMPLATES, *(["tokenizer.path"] if given and was.get("tokenizer.path") else [])}
    changed = [
        f"{key} (was {plain(was.get(key))}, now {plain(now.get(key))})"
        for key in sorted((was | now).keys() - skipped)
        if was.get(key) != now.get(key)
    ]
    if given and card.tokenizer:
        if given.fingerprint != card.tokenizer.fingerprint:
            changed.append("the tokenizer at tokenizer.path")
        elif given.end_of_document != card.tokenizer.end_of_document:
            was_end, now_end = card.tokenizer.end_of_document, given.end_of_document
            changed.append(f"the end-of-document token of tokenizer.path (was id {was_end}, now {now_end})")
        is_moved = was.get("tokenizer.path") != now["tokenizer.path"]
        if (settings["data"]["kind"] in CHAT_KINDS or is_moved) and _template_of(target) != given.chat_template():
            changed.append("the chat template")
    elif card.tokenizer and not was.get("tokenizer.path"):
        name = now.get(_TEMPLATES[0])
        if _template_of(target) != (named_template(_TEMPLATES[0], name) if name else None):
            changed.append(f"the chat template ({_TEMPLATES[0]})")
    if changed:
        raise ConfigError(
            f"data.name: {target} was prepared with other settings: {'; '.join(changed)}. "
            "Choose another data.name, or data.overwrite=true to replace it"
        )
    return True


def _template_of(dataset: Path) -> str | None:
    return load_tokenizer(dataset / "tokenizer").chat_template()
