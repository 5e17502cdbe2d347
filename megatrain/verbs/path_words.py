"""A path among the words of a command line, such as `megatrain inspect runs/x`, as overrides. Imports no torch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatrain.config import VERBS, DataConfig, walk
from megatrain.config.choices import CONFIG_FILE, GROUPS, YAML, choices_of, home
from megatrain.config.own_dataset import find_dataset
from megatrain.config.suggest import nearest_path
from megatrain.config.values import FREE_TEXT, as_text, exists, missing_brackets, quoted
from megatrain.errors import ConfigError
from megatrain.tracking.sweep_record import is_sweep_folder
from megatrain.verbs.places import require

_PREPARE = "prepare it first: megatrain prepare"


def expand_path(verb: str, words: Sequence[str]) -> list[str]:
    """Replace the words that are paths: by `path=...`, and further ones by `paths=[...]` if a verb has that key; for
    `train` by what continues that run with its saved config; for `prepare` by what reads those files and folders, as
    further ones are for `tune`.

    An existing path is a path even if it contains `=`, unless it is an override: a key of the verb, `=` and a value.
    """
    _refuse_spaces(words)
    _refuse_split_lists(words)
    names = set(walk(VERBS[verb])) | set(GROUPS.get(verb, ()))
    has_path = "path" in names
    if verb == "prepare":
        return _corpus_words(words, names)
    if verb == "merge":
        return _model_words(words, names)
    if not has_path and verb != "train":
        return list(words)
    wanted = has_path and not any(word.startswith("path=") for word in words)
    place = next((n for n, word in enumerate(words) if _is_path(word, names, wanted)), None)
    if place is None:
        return list(words)
    others = [*words[:place], *words[place + 1 :]]
    found = [quoted("path", words[place])] if has_path else _run_words(words[place], others)
    if "paths" in names and not any(word.startswith("paths=") for word in words):
        more = [word for word in others if _is_path(word, names, wanted)]
        found += [f"paths={as_text(more)}"] if more else []
        others = [word for word in others if word not in more]
    if verb == "tune" and not any(word.startswith("data.paths=") for word in words):
        more = [word for word in others if _is_path(word, names, False)]
        prepared = len(more) == 1 and find_dataset(more[0], DataConfig().dir)
        found += [quoted("data", more[0]) if prepared else f"data.paths={as_text(more)}"] if more else []
        others = [word for word in others if word not in more]
    return [*found, *others]


def _refuse_spaces(words: Sequence[str]) -> None:
    """Refuse `key = value`, which a shell makes several words of. Raises ConfigError."""
    for at, word in enumerate(words):
        before, after = words[at - 1] if at else "", words[at + 1] if at + 1 < len(words) else ""
        alone = after and "=" not in after and not after.startswith("-") and not exists(after)
        if before and "=" not in before and word.startswith("="):
            value = word if word != "=" else f"={after}"
        elif word.endswith("=") and len(word) > 1 and alone:
            before, value = word, after
        else:
            continue
        raise ConfigError(f"remove the spaces around =: write {shlex.quote(f'{before}{value}')}")


def _refuse_split_lists(words: Sequence[str]) -> None:
    """Refuse `key=[a, b]` without quotes, which a shell makes several words of. Raises ConfigError."""
    for at, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in FREE_TEXT or exists(value) or not missing_brackets(value):
            continue
        for end in range(at + 2, len(words) + 1):
            whole = " ".join(words[at:end])
            if not missing_brackets(whole.partition("=")[2]):
                raise ConfigError(f"the shell splits a list at its spaces: write {shlex.quote(whole)}")


def _corpus_words(words: Sequence[str], names: set[str]) -> list[str]:
    """Return the overrides of `prepare` with its path words as `data.paths` of a dataset that has the path's name.

    Raises ConfigError if one of them does not exist, or if several leave the name open.
    """
    keys = [word.partition("=")[0].lstrip("+") for word in words]
    paths = [word for word in words if _is_path(word, names, wanted="data.paths" not in keys)]
    if not paths:
        return list(words)
    others = [word for word in words if word not in paths]
    if "data.paths" in keys:
        raise ConfigError(f"{paths[0]} and data.paths=... both name what to read; give one of them")
    for path in paths:
        if not exists(path) and not set("*?[") & set(path):
            meant = f"data={path}" if path in choices_of("data") else nearest_path(path)
            near = f"; did you mean {meant}?" if meant else ";"
            place = Path(path).expanduser().absolute()
            raise ConfigError(
                f"there is no file or folder {path} (looked for {place}){near} megatrain prepare takes key=value, "
                f"group=choice, and files and folders to read, as in: megatrain prepare corpus/"
            )
    found = [] if "data" in keys else ["data=files"]
    if "data.name" not in keys:
        place = Path(os.path.realpath(Path(paths[0]).expanduser()))
        name = place.name if place.is_dir() else place.name.partition(".")[0] if place.exists() else ""
        if len(paths) > 1 or not name:
            raise ConfigError(
                f"{' '.join(paths[:3])}{' ...' * (len(paths) > 3)}: the dataset needs a name; add for example "
                f"data.name=mine"
            )
        found.append(quoted("data.name", name))
    return [*found, f"data.paths={as_text(paths)}", *others]


def _model_words(words: Sequence[str], names: set[str]) -> list[str]:
    """Return the overrides of `merge` with its path words as `paths`. Raises ConfigError if that is given as well."""
    is_given = any(word.startswith("paths=") for word in words)
    paths = [word for word in words if _is_path(word, names, wanted=not is_given)]
    if not paths:
        return list(words)
    if is_given:
        raise ConfigError(f"{paths[0]} and paths=... both name what to merge; give one of them")
    return [f"paths={as_text(paths)}", *(word for word in words if word not in paths)]


def _is_path(word: str, names: set[str], wanted: bool) -> bool:
    """Return whether a word is a path and no override. `wanted` means that the verb needs one."""
    name, equals, _ = word.partition("=")
    known = name.lstrip("+").replace("/", ".")
    if word.startswith("-") or (not equals and (known in names or any(key.startswith(known + ".") for key in names))):
        return wanted and exists(word)
    if not equals:
        return True
    return (known not in names or wanted) and (exists(word) or (known not in names and "/" in name))


def _run_words(word: str, others: Sequence[str]) -> list[str]:
    """Return the overrides that continue the run in a folder with its saved config. `others` are the further words.

    Raises ConfigError unless it is a run's folder.
    """
    folder = home(word, word)
    if find_dataset(word, DataConfig().dir):
        command = shlex.join(["megatrain", "train", quoted("data", word), *others])
        raise ConfigError(f"{word} is a dataset, not a run; to train on it: {command}")
    if not exists(word) and "/" not in word:
        groups = ", ".join(f"{group}={word}" for group in ("model", "data", "experiment"))
        raise ConfigError(
            f"{word} is neither a run's folder nor key=value; give for example {groups}, or the folder of a run to "
            f"continue, such as runs/{word}"
        )
    require("run folder", folder)
    if folder.is_file():
        advice = f"; to start from a config: {CONFIG_FILE}" if folder.suffix in YAML else f"; if it is text, {_PREPARE}"
        advice = f"{advice} {shlex.quote(word)}"
        raise ConfigError(f"{word} is a file; give the folder of the run to continue{advice}")
    if is_sweep_folder(folder):
        raise ConfigError(f"{word} is the folder of a sweep; repeat its megatrain train --multirun to continue it")
    if not (folder / "config.yaml").is_file():
        owner = next((parent for parent in folder.absolute().parents if (parent / "config.yaml").is_file()), None)
        advice = f"it is inside a run: megatrain train {shlex.quote(str(owner))}" if owner else ""
        advice = advice or f"if it holds text, {_PREPARE} {shlex.quote(word)}"
        raise ConfigError(f"{word} holds no config.yaml, so it is not the folder of a run; {advice}")
    if folder.is_symlink() or folder.name in ("", ".."):
        folder = folder.resolve()
    return [
        f"{CONFIG_FILE}={folder / 'config.yaml'}",
        quoted("run.dir", str(folder.parent)),
        quoted("run.name", folder.name),
        "checkpoint.resume=auto",
    ]
