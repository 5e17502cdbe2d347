"""The texts of `megatrain --help` and `megatrain <verb> --help`, generated from the schema. Imports no torch."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatrain.config import VERBS, walk
from megatrain.config.choices import CONFIG_DIR, CONFIG_FILE, GROUPS, choices_of
from megatrain.config.compose import compose, default_choices, key_types
from megatrain.config.flatten import flatten
from megatrain.config.suggest import did_you_mean
from megatrain.config.values import describe
from megatrain.errors import ConfigError

WIDTHS = (60, 110)
"""Narrowest and widest text, in characters. In between it is as wide as the terminal, or as COLUMNS says."""

NARROW = 80
"""Width of a terminal below which what a key means stands under its name."""

KEY_COLUMN, GROUP_COLUMN, VERB_COLUMN, FLAG_COLUMN = 36, 14, 14, 22
"""Characters from the left edge to the second column."""

EVERY_KEY = "all"
"""The word that asks for every key: `megatrain train --help all`."""

MOST_USED: dict[str, tuple[str, ...]] = {
    "prepare": (
        "data.name",
        "data.paths",
        "data.text_column",
        "data.heldout_fraction",
        "data.max_documents",
        "data.workers",
        "data.overwrite",
        "tokenizer.path",
        "tokenizer.vocab_size",
        "launch.tasks",
    ),
    "train": (
        "run.name",
        "train.steps",
        "train.global_batch_size",
        "train.micro_batch_size",
        "train.seq_len",
        "optim.lr",
        "optim.warmup_steps",
        "launch.nproc_per_node",
        "parallel.zero",
        "checkpoint.every",
    ),
    "tune": (
        "data.paths",
        "data.name",
        "run.name",
        "method.epochs",
        "train.steps",
        "train.global_batch_size",
        "train.seq_len",
        "optim.lr",
        "launch.nproc_per_node",
        "parallel.zero",
    ),
    "layouts": (
        "launch.world_size",
        "launch.nproc_per_node",
        "train.global_batch_size",
        "train.micro_batch_size",
        "train.seq_len",
        "parallel.tp",
        "parallel.pp",
        "parallel.zero",
        "layouts.memory_gib",
        "layouts.limit",
    ),
    "evaluate": (
        "step",
        "data",
        "split",
        "tasks",
        "tasks_dir",
        "num_fewshot",
        "limit",
        "examples",
        "prompts",
        "judge",
    ),
}
"""The ten keys to know first, of verbs that have many. Their help shows the others on request."""

FLAGS_OF = {
    "--multirun": ("train", "tune"),
    "--dry-run": ("train", "tune", "prepare"),
    "--completion": (),
    "--version": (),
}
"""The verbs whose help lists a flag, where it is not all."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "prepare": (
        "megatrain prepare corpus/",
        "megatrain prepare data=files data.name=mine 'data.paths=[corpus/**/*.txt]' tokenizer.vocab_size=16384",
        "megatrain prepare data=fineweb_edu tokenizer=hf tokenizer.path=gpt2 launch=slurm launch.tasks=64",
    ),
    "train": (
        "megatrain train model=tiny train.steps=1000",
        "megatrain train model=gpt2_124m data=files data.name=mine precision=bf16 train.steps=1000 optim.lr=6e-4",
        "megatrain train --multirun model=tiny,small optim.lr=1e-3,3e-4",
    ),
    "tune": (
        "megatrain tune runs/base 'data.paths=[talks.jsonl]'",
        "megatrain tune runs/base 'data.paths=[talks.jsonl]' data.folds=5",
        "megatrain tune llama-folder data.name=talks method=sft precision=bf16 launch.nproc_per_node=8 parallel.zero=3",
    ),
    "layouts": (
        "megatrain layouts model=llama_8b precision=bf16 launch.world_size=64",
        "megatrain layouts model=gpt2_124m launch.nproc_per_node=8 parallel.zero=3 layouts.memory_gib=24",
    ),
    "evaluate": (
        "megatrain evaluate runs/small-python_stdlib",
        "megatrain evaluate runs/mine data=book.txt",
        "megatrain evaluate runs/base runs/tuned tasks=[arc_easy,hellaswag] limit=200",
        "megatrain evaluate runs/tuned examples=kinds.jsonl",
        "megatrain evaluate runs/tuned runs/base prompts=prompts.jsonl judge=judge.py:brief",
    ),
    "generate": (
        'megatrain generate runs/small-python_stdlib prompt="def main(" temperature=0.7',
        'megatrain generate runs/mine step=500 prompt="def main("',
    ),
    "chat": (
        "megatrain chat runs/assistant",
        'megatrain chat runs/assistant prompt="What is the larger of 31 and 58?" temperature=0',
    ),
    "serve": (
        "megatrain serve runs/assistant",
        "megatrain serve exported serve.host=0.0.0.0 serve.port=8080 serve.api_key_file=keys.txt "
        "serve.max_concurrent=32",
        "megatrain serve runs/assistant serve.backend=vllm 'serve.vllm_command=[/opt/vllm/bin/vllm,serve]'",
    ),
    "export": (
        "megatrain export runs/small-python_stdlib out=exported",
        "megatrain export runs/mine step=500 out=exported",
    ),
    "import": (
        "megatrain import gpt2-folder out=imported",
        "megatrain prepare data.name=finetune tokenizer=hf tokenizer.path=imported/tokenizer",
        "megatrain train checkpoint.init_from=imported data.name=finetune",
    ),
    "merge": (
        "megatrain merge runs/first runs/second out=merged",
        "megatrain merge runs/mine out=averaged by=ema decay=0.8",
        "megatrain merge runs/chat runs/code out=merged by=ties base=runs/base density=0.3",
    ),
    "compress": (
        "megatrain compress runs/mine out=small to=int8",
        "megatrain compress runs/mine out=sparse to=2:4",
        "megatrain compress runs/mine out=mine.gguf to=gguf gguf_type=q4_0",
    ),
    "inspect": (
        "megatrain inspect runs/small-python_stdlib",
        "megatrain inspect runs/mine step=500",
        "megatrain inspect data/python_stdlib",
    ),
    "tokenizer": (
        "megatrain tokenizer out=tokenizers/mine data=files 'data.paths=[corpus]' tokenizer.vocab_size=32000",
        "megatrain tokenizer out=tokenizers/code tokenizer=byte_level_bpe data=mixture "
        "'data.mixture={corpus/web: 0.7, corpus/code: 0.3}'",
    ),
    "tokenizers": ("megatrain tokenizers corpus/ tokenizers=[data/mine,gpt2/tokenizer.json,my.model]",),
    "report": (
        "megatrain report runs/small-python_stdlib",
        "megatrain report runs/python_stdlib-model-lr",
        "megatrain report data/python_stdlib",
    ),
}

MULTIRUN = (
    "--multirun (-m) trains every combination of the keys that have several values, each as a separate run: one after "
    "another, or with launch=slurm each as a job. Values: a,b,c or range(1,5) or choice(a,b); for groups also "
    "glob(gpt2*). --dry-run shows what launch=slurm or --multirun would do. See docs/guide/sweeps.md for details."
)

LAYOUTS = (
    "The best guess is listed first; nothing is measured. Layouts that fit the memory come before those that do not. "
    "Among those that fit, the nearly full ones (over 85% of the usable memory) come after the others. Otherwise they "
    "are sorted by the product tp x pp x cp, smallest first, because splitting the model costs communication; equal "
    "ones by recompute, none first, because it costs computation; then by ZeRO stage, lowest first, because higher "
    "ones communicate more; then by memory, least first. Those that do not fit are sorted by memory alone. Each engine "
    "and set of degrees is shown once before any is shown twice, as far as layouts.limit allows."
)

NOTES = {"train": MULTIRUN, "tune": MULTIRUN, "layouts": LAYOUTS}


def overview(flags: Mapping[str, str]) -> str:
    """Return the text of `megatrain --help`. `flags` maps each flag to what it does, as `cli.FLAGS`."""
    lines = [
        "megatrain pretrains and tunes GPT models.",
        "",
        "usage: megatrain <verb> [key=value | group=choice] ...",
        "",
        "verbs:",
    ]
    lines += [_wrapped(verb, summary(schema), VERB_COLUMN) for verb, schema in VERBS.items()]
    lines += ["", "flags:", *_flag_lines(flags)]
    lines += [
        "",
        "to get started:",
        "  megatrain prepare data=python_stdlib",
        "  megatrain train model=small data=python_stdlib launch.nproc_per_node=2",
        "",
        "megatrain <verb> --help explains a verb.",
    ]
    return "\n".join(lines)


def verb_help(
    verb: str, words: Sequence[str] = (), folders: Sequence[Path] = (), flags: Mapping[str, str] | None = None
) -> str:
    """Return the text of `megatrain <verb> --help`: usage, keys, groups, examples and flags.

    A verb with many keys shows the most used ones, and all of them for the word `all`. Other `words` select: a group or
    section (`optim`), or keys whose name or meaning has the word (`clip`). `folders` hold choices of the user's own.
    Raises ConfigError for a word that nothing has, except where it may be the verb's PATH.
    """
    chosen = [word for word in words if word != EVERY_KEY]
    if chosen and (selected := [text for word in chosen if (text := _selected(verb, word, folders))]):
        return "\n\n".join(selected)
    schema = VERBS[verb]
    lines = [usage(verb), "", _plain(f"{summary(schema)}."), ""]
    types = key_types(schema)
    shown = list(types) if EVERY_KEY in words else list(MOST_USED.get(verb, types))
    if len(shown) < len(types):
        lines += ["most used keys:", *_key_lines(verb, shown), ""]
        lines += [_plain(f"all {len(types)} keys: megatrain {verb} --help {EVERY_KEY}"), *_how_to_select(verb), ""]
    groups = [group for group in GROUPS.get(verb, ()) if choices_of(group, folders)]
    if groups:
        lines += [f"groups (megatrain {verb} --help {groups[0]} shows one with its keys):"]
        lines += [*_group_lines(verb, groups, folders), ""]
    if len(shown) == len(types):
        lines.append("keys:")
        for section in dict.fromkeys(name.rpartition(".")[0] for name in types):
            lines += [*_key_lines(verb, [name for name in types if name.rpartition(".")[0] == section]), ""]
    lines += ["examples:", *(f"  {example}" for example in EXAMPLES[verb]), ""]
    if verb in NOTES:
        lines += [_plain(NOTES[verb]), ""]
    if flags:
        wanted = {flag: text for flag, text in flags.items() if verb in FLAGS_OF.get(flag, VERBS)}
        if verb not in GROUPS:
            wanted = {flag: text for flag, text in wanted.items() if flag not in (CONFIG_FILE, CONFIG_DIR)}
        lines += ["flags:", *_flag_lines(wanted)]
    return "\n".join(lines).rstrip()


def usage(verb: str) -> str:
    """Return the line that shows how a verb is written; the docstring of its schema has its arguments."""
    arguments = (VERBS[verb].__doc__ or "").partition("`")[2].partition("`")[0]
    return f"usage: {arguments} [key=value{' | group=choice' * (verb in GROUPS)}] ..."


def _how_to_select(verb: str) -> list[str]:
    """Return the lines that say how the help of a verb with many keys shows some of them."""
    groups = [f"one group of them: megatrain {verb} --help {GROUPS[verb][0]}"] if verb in GROUPS else []
    return [
        *groups,
        f"those that mention a word: megatrain {verb} --help batch",
    ]


def _flag_lines(flags: Mapping[str, str]) -> list[str]:
    """Return each flag with its meaning. A meaning that begins with a word in capitals names the flag's value."""
    lines = []
    for flag, text in flags.items():
        value, _, meaning = text.partition(": ")
        name, text = (f"{flag} {value}", meaning) if value.isupper() else (flag, text)
        lines.append(_wrapped(name, text, FLAG_COLUMN))
    return lines


def _selected(verb: str, word: str, folders: Sequence[Path]) -> str:
    """Return the help of one group or section, or of the keys that have `word` in their name or meaning."""
    keys = walk(VERBS[verb])
    groups = [group for group in GROUPS.get(verb, ()) if choices_of(group, folders)]
    found = [name for name in keys if name == word or name.startswith(f"{word}.")]
    if not found and word not in groups:
        found = [name for name, f in keys.items() if word.lower() in f"{name} {f.metadata['help']}".lower()]
    if not found and word not in groups:
        if "path" in keys:
            return ""
        sections = dict.fromkeys(name.partition(".")[0] for name in keys)
        listed = ", ".join(dict.fromkeys([*groups, *sections]))
        hint = did_you_mean("", word, [*groups, *sections, *keys])
        raise ConfigError(f"--help {word}: {verb} has no such group or key{hint} (groups: {listed})")
    shown = [*_group_lines(verb, [word], folders)] if word in groups else []
    return "\n".join([*shown, *_key_lines(verb, found)])


def _group_lines(verb: str, groups: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return each group with its choices and its default choice."""
    defaults = default_choices(verb)
    return [
        _wrapped(
            f"{group}=",
            f"{', '.join(choices_of(group, folders))} (default {defaults.get(group) or 'none'})",
            GROUP_COLUMN,
        )
        for group in groups
    ]


def _key_lines(verb: str, names: Sequence[str]) -> list[str]:
    """Return each key with its help. A default that a group's default choice sets is shown with that choice."""
    schema = VERBS[verb]
    types, keys, defaults = key_types(schema), walk(schema), default_choices(verb)
    values = _values(verb) if defaults else {}
    lines = []
    for name in names:
        group, f = name.partition(".")[0], keys[name]
        is_set = defaults.get(group) and name in values and values[name] != default_of(f)
        default = f"default {_shown(values[name])}, from {group}={defaults[group]}" if is_set else default_text(f)
        lines.append(_wrapped(name, key_text(types[name], f, default), KEY_COLUMN))
    return lines


@lru_cache
def _values(verb: str) -> dict[str, Any]:
    """Return the values of a command without overrides but those that it must have, by dotted key."""
    mandatory = [name for name, f in walk(VERBS[verb]).items() if default_of(f) == "???" and "." not in name]
    return flatten(asdict(compose(verb, [f"{name}=x" for name in mandatory])))


def summary(schema: type) -> str:
    """Return a verb's description, without a full stop."""
    return " ".join((schema.__doc__ or "").partition(": ")[2].split()).rstrip(".")


def key_text(hint: Any, field: Any, default: str) -> str:
    """Describe one key: its meaning, type or choices, bounds and default."""
    choices = field.metadata.get("choices")
    kind = "one of " + ", ".join(str(choice) for choice in choices) if choices else describe(hint)
    bounds = bounds_text(field.metadata)
    return f"{field.metadata['help']} ({kind}{', ' + bounds if bounds else ''}; {default})"


def default_text(field: Any) -> str:
    """Return a key's default in words."""
    default = default_of(field)
    return "mandatory" if default == "???" else f"default {_shown(default)}"


def _shown(value: Any) -> str:
    """Return a value as it is typed."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text or repr(text)


def default_of(field: Any) -> Any:
    """Return a key's default; `???` marks a mandatory key."""
    return field.default_factory() if callable(field.default_factory) else field.default


def bounds_text(metadata: Any) -> str:
    """Return a key's bounds in words."""
    words = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
    words |= {"each_minimum": "each at least", "each_below": "each below"}
    return ", ".join(f"{text} {metadata[name]:g}" for name, text in words.items() if name in metadata)


def _wrapped(name: str, text: str, column: int) -> str:
    """Lay out a name and its text in two columns; on a narrow terminal a long name stands above its text."""
    width = _width()
    first, rest = f"  {name:{column - 3}} ", " " * column
    if column == KEY_COLUMN and width < NARROW:
        return f"  {name}\n{textwrap.fill(text, width, initial_indent='      ', subsequent_indent='      ')}"
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _plain(text: str) -> str:
    """Return a paragraph in the width of the terminal."""
    return textwrap.fill(text, _width(), break_on_hyphens=False)


def _width() -> int:
    """Return the width of the help's lines."""
    least, most = WIDTHS
    return min(max(shutil.get_terminal_size((most, 24)).columns, least), most)
