"""The texts of `megatrain --help` and `megatrain <verb> --help`, generated from the schema. Imports no torch."""

from __future__ import annotations

import textwrap
from typing import Any

from megatrain.config import VERBS, walk
from megatrain.config.compose import GROUPS, choices_of, describe, key_types

WIDTH = 110

EXAMPLES: dict[str, tuple[str, ...]] = {
    "prepare": (
        "megatrain prepare",
        "megatrain prepare data=files data.name=mine 'data.paths=[corpus/**/*.txt]' tokenizer.vocab_size=16384",
    ),
    "train": (
        "megatrain train model=small launch.nproc_per_node=2",
        "megatrain train model=gpt2_124m data=files data.name=mine precision=bf16 train.steps=1000 optim.lr=6e-4",
        "megatrain train --multirun model=tiny,small optim.lr=1e-3,3e-4",
    ),
    "layouts": (
        "megatrain layouts model=llama_8b precision=bf16 launch.world_size=64",
        "megatrain layouts model=gpt2_124m launch.nproc_per_node=8 parallel.zero=3 layouts.memory_gib=24",
    ),
    "evaluate": ("megatrain evaluate runs/small-python_stdlib", "megatrain evaluate runs/mine data=book.txt"),
    "generate": ('megatrain generate runs/small-python_stdlib prompt="def main(" temperature=0.7',),
    "export": ("megatrain export runs/small-python_stdlib out=exported",),
    "import": ("megatrain import gpt2-folder out=imported", "megatrain train checkpoint.init_from=imported"),
    "inspect": ("megatrain inspect runs/small-python_stdlib", "megatrain inspect data/python_stdlib"),
    "report": ("megatrain report runs/small-python_stdlib", "megatrain report runs/python_stdlib-model-lr"),
}

MULTIRUN = """--multirun (-m) trains every combination of the keys that have several values, each as a separate run:
one after another, or with launch=slurm each as a job. Values: a,b,c or range(1,5) or choice(a,b); for groups also
glob(gpt2*). --dry-run shows what launch=slurm or --multirun would do. See docs/guide/sweeps.md for details."""


def overview() -> str:
    """Return the text of `megatrain --help`."""
    lines = [
        "megatrain pretrains GPT models.",
        "",
        "usage: megatrain <verb> [key=value | group=choice] ...",
        "",
        "verbs:",
    ]
    for verb, schema in VERBS.items():
        lines.append(f"  {verb:10}{summary(schema)}")
    lines += [
        "",
        "flags:",
        "  --help      explain a verb and its keys: megatrain <verb> --help",
        "  --cfg       print the resolved config as YAML and exit",
        "  --debug     show the stack trace of an error",
        "  --multirun  train: run every combination of several values; short: -m",
        "  --dry-run   train: show what launch=slurm or --multirun would do",
        "  --version   print the version",
        "",
        "to get started:",
        "  megatrain prepare data=python_stdlib",
        "  megatrain train model=small data=python_stdlib launch.nproc_per_node=2",
    ]
    return "\n".join(lines)


def verb_help(verb: str) -> str:
    """Return the text of `megatrain <verb> --help`: groups and keys with meaning, type, choices and default."""
    schema = VERBS[verb]
    positional = " [PATH]" if "path" in walk(schema) else ""
    flags = " [--multirun] [--dry-run]" if verb == "train" else ""
    lines = [f"usage: megatrain {verb}{flags}{positional} [key=value | group=choice] ...", "", summary(schema), ""]
    if verb == "train":
        lines += [MULTIRUN, ""]
    lines += ["examples:", *(f"  {example}" for example in EXAMPLES[verb]), ""]
    groups = [group for group in GROUPS.get(verb, ()) if choices_of(group)]
    if groups:
        lines += ["groups:", *(_wrapped(f"{group}=", ", ".join(choices_of(group)), 14) for group in groups), ""]
    lines.append("keys:")
    types = key_types(schema)
    for section in dict.fromkeys(name.rpartition(".")[0] for name in types):
        for name, f in walk(schema).items():
            if name.rpartition(".")[0] == section:
                lines.append(_wrapped(name, key_text(types[name], f), 32))
        lines.append("")
    return "\n".join(lines).rstrip()


def summary(schema: type) -> str:
    """Return a verb's one-line description."""
    return (schema.__doc__ or "").partition(": ")[2]


def key_text(hint: Any, field: Any) -> str:
    """Describe one key: its meaning, type or choices, bounds and default."""
    choices = field.metadata.get("choices")
    kind = "one of " + ", ".join(str(choice) for choice in choices) if choices else describe(hint)
    bounds = bounds_text(field.metadata)
    return f"{field.metadata['help']} ({kind}{', ' + bounds if bounds else ''}; {default_text(field)})"


def default_text(field: Any) -> str:
    """Return a key's default in words."""
    default = default_of(field)
    if default == "???":
        return "mandatory"
    shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    return f"default {shown!r}" if shown == "" else f"default {shown}"


def default_of(field: Any) -> Any:
    """Return a key's default; `???` marks a mandatory key."""
    return field.default_factory() if callable(field.default_factory) else field.default


def bounds_text(metadata: Any) -> str:
    """Return a key's bounds in words."""
    words = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
    words |= {"each_minimum": "each at least", "each_below": "each below"}
    return ", ".join(f"{text} {metadata[name]:g}" for name, text in words.items() if name in metadata)


def _wrapped(name: str, text: str, indent: int) -> str:
    """Lay out a name and its text in two columns."""
    first = f"  {name:{indent - 3}} "
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False)
