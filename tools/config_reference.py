"""Write docs/reference/config.md and cleaning.md, every config key and cleaning step: python tools/config_reference.py

`tests/unit/config/test_config_reference.py` fails when the page differs from this program's output.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from pathlib import Path
from typing import Any

from megatrain.config import VERBS, walk
from megatrain.config.choices import GROUPS, choices_of, conf_folder, read_yaml
from megatrain.config.compose import key_types
from megatrain.config.usage import EXAMPLES, bounds_text, default_text, summary
from megatrain.config.values import describe
from megatrain.data.corpus.steps.registry import STEPS

FOLDER = Path(__file__).parent.parent / "docs" / "reference"

LONGEST_ROW = 200
"""Characters of a table's row; the meaning of a longer one moves below the table."""

HEAD = """# Config reference

Written by `python tools/config_reference.py` from `megatrain/config/` and `conf/`; edit those, not this page.

Every command is `megatrain <verb> [key=value | group=choice] ...`, in [Hydra](https://hydra.cc)'s syntax. A group picks
a file of `conf/<group>/`; a key sets one value. The command line wins over an experiment, and an experiment over the
other groups. `null` is the empty value, `[a,b]` a list. Text is taken as typed, so `run.name=1e3` is a name; text with
a comma needs quotes: `run.name="'a,b'"`. `${train.steps}` stands for another key's value. Verbs that have a `path` take
it as their first argument without `path=`. In paths `~` is home. [Your own configs](../guide/own_configs.md) explains
choices of your own (`--config-dir`) and whole configs (`--config`).

A bad config is refused within a second, before anything starts, with the key, what was given and what would work (exit
code 2). `megatrain <verb> --help all` shows the same tables as below, `--cfg` the resolved config.
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *(section(verb) for verb in VERBS)]) + "\n"


def section(verb: str) -> str:
    """Return the section of a verb: its examples, groups and keys."""
    schema = VERBS[verb]
    lines = [f"## megatrain {verb}", "", _sentence(summary(schema)) + ".", "", "```"]
    lines += [*EXAMPLES[verb], "```", ""]
    if verb in GROUPS:
        lines += ["| group | choices |", "| --- | --- |"]
        lines += [f"| `{group}` | `{' '.join(choices_of(group))}` |" for group in GROUPS[verb]]
        lines.append("")
    lines += ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    types = key_types(schema)
    notes = []
    for name, field in walk(schema).items():
        meaning = field.metadata["help"]
        line = row(name, types[name], field, meaning)
        if len(line) > LONGEST_ROW:
            line = row(name, types[name], field, f"{_first_clause(meaning)} (more below)")
            notes.append(_note(name, meaning))
        lines.append(line)
    if notes:
        lines += ["", *notes]
    return "\n".join([*lines, ""])


def row(name: str, hint: Any, field: Any, meaning: str) -> str:
    """Return one key's row of the table."""
    choices = field.metadata.get("choices")
    value = _codes([str(choice) for choice in choices]) if choices else describe(hint)
    bounds = bounds_text(field.metadata)
    default = default_text(field).removeprefix("default ")
    shown = default if default == "mandatory" else f"`{default}`"
    return f"| `{name}` | {value}{', ' + bounds if bounds else ''} | {shown} | {meaning} |".replace("<", "&lt;")


def _first_clause(text: str) -> str:
    return re.split(r",|;|:|\. | \(", text, maxsplit=1)[0]


def _note(name: str, meaning: str) -> str:
    """Return the full description of a key as an item of the list below the table."""
    return _wrapped(f"- `{name}`: {meaning}".replace("<", "&lt;"))


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _codes(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


CLEANING = """# Cleaning steps

Written by `python tools/config_reference.py` from `megatrain/data/corpus/steps/` and `conf/clean/`; edit those, not
this page.

`megatrain prepare clean=<recipe>` runs a recipe's steps over every document, before duplicates are dropped and text is
tokenized. A recipe of your own is a file (`clean=my.yaml`) with a `name` and a list `steps`, or the list itself on the
command line, each step a name, or a name with parameters:

```
megatrain prepare data=files "data.paths=[corpus]" data.name=long "clean.steps=[{length:{min_characters:500}}]"
```

The dataset's card counts what each step removed, by rule, and changed; `examples.jsonl` beside it has documents to look
at, five for each rule.

## Recipes

The files in `conf/clean/` have the parameters of the steps, and where each recipe comes from.

"""


def cleaning_page() -> str:
    """Return the page of the cleaning steps."""
    lines = [CLEANING.rstrip("\n"), ""]
    for name in choices_of("clean"):
        content, _ = read_yaml(conf_folder() / "clean" / f"{name}.yaml")
        names = [entry if isinstance(entry, str) else next(iter(entry)) for entry in content.get("steps", [])]
        steps = ", ".join(f"[`{step}`](#{step})" for step in names) or "no steps"
        lines.append(_wrapped(f"- `{name}`: {steps}{f'; dedup: {dedup}' if (dedup := content.get('dedup')) else ''}"))
    for name, step in sorted(STEPS.items()):
        assert step.__doc__
        lines += ["", f"## {name}", "", inspect.cleandoc(step.__doc__)]
        parameters = dataclasses.fields(step)  # type: ignore[arg-type]  # every step is a dataclass
        if parameters:
            lines += ["", "| parameter | value | default | meaning |", "| --- | --- | --- | --- |"]
        types = typing.get_type_hints(step)
        lines += [row(field.name, types[field.name], field, field.metadata["help"]) for field in parameters]
    return "\n".join([*lines, ""])


PAGES = {FOLDER / "config.md": page, FOLDER / "cleaning.md": cleaning_page}

if __name__ == "__main__":
    for place, written in PAGES.items():
        place.write_text(written(), encoding="utf-8")
        print(f"wrote {place}")
