"""Shell completion of verbs, flags, keys, choices and paths, for bash, zsh and fish. Imports no torch.

The script of a shell (`megatrain --completion bash`) calls `megatrain --complete` with the line up to the cursor, and
gets one candidate for the last word on each line. A candidate that ends in `=`, `.` or `/` is to be continued.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatrain.checkpoint.naming import checkpoint_step, list_checkpoints
from megatrain.config import VERBS, DataConfig, walk
from megatrain.config.choices import CONFIG_DIR, CONFIG_FILE, GROUPS, choices_of
from megatrain.config.compose import key_types, own_folders
from megatrain.config.values import split_optional
from megatrain.errors import ConfigError, MegatrainError
from megatrain.verbs.places import OF_RUNS, is_offered

BASH = r"""# megatrain's completion. Add to ~/.bashrc: eval "$(megatrain --completion bash)"
_megatrain() {
  local line=${COMP_LINE:0:$COMP_POINT} found word=${COMP_LINE:0:$COMP_POINT} before=
  mapfile -t found < <("${COMP_WORDS[0]}" --complete "$line" 2>/dev/null)
  word=${word##*[[:space:]]}
  # bash replaces only what follows the last = or :
  case $COMP_WORDBREAKS in *=*) [[ $word == *=* ]] && before=${word%=*}= ;; esac
  COMPREPLY=("${found[@]#"$before"}")
  [[ ${#found[@]} -eq 1 && ${found[0]} == *[=./] ]] && compopt -o nospace
  return 0
}
complete -o nosort -F _megatrain megatrain
"""

ZSH = r"""#compdef megatrain
# megatrain's completion. Add to ~/.zshrc, after compinit: eval "$(megatrain --completion zsh)"
_megatrain() {
  local -a found whole part
  found=("${(@f)$(${words[1]} --complete "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
  found=(${found:#})
  part=(${(M)found:#*[=./]})
  whole=(${found:#*[=./]})
  (( $#part )) && compadd -Q -S '' -a part
  (( $#whole )) && compadd -Q -a whole
}
compdef _megatrain megatrain
"""

FISH = r"""# megatrain's completion. Save it as ~/.config/fish/completions/megatrain.fish
complete -c megatrain -f -a '(megatrain --complete (commandline -cp) 2>/dev/null)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def answer(flag: str, value: str, flags: Iterable[str]) -> str:
    """Return the script of a shell (`--completion bash`), or the candidates for a line (`--complete LINE`)."""
    if flag == "--complete":
        return "".join(f"{candidate}\n" for candidate in candidates(value, flags))
    if value not in SCRIPTS:
        raise ConfigError(f"--completion={value}: there is completion for {', '.join(SCRIPTS)}")
    return SCRIPTS[value]


def candidates(line: str, flags: Iterable[str]) -> list[str]:
    """Return the words with which the last word of a command line may go on."""
    try:
        words = shlex.split(line)[1:]
    except ValueError:  # an open quote
        return []
    last = words.pop() if words and not line[-1:].isspace() else ""
    verb = next((word for word in words if word in VERBS), None)
    if words and words[-1] in (CONFIG_DIR, CONFIG_FILE):
        return _paths(last)
    if words and words[-1] == "--completion":
        return _starting(last, SCRIPTS)
    if last.startswith("-"):
        flag, equals, value = last.partition("=")
        return [f"{flag}={path}" for path in _paths(value)] if equals else _starting(last, flags)
    if verb is None:
        return _starting(last, VERBS)
    name, equals, value = last.partition("=")
    if equals:
        if name == "step" and "path" in walk(VERBS[verb]):
            return [f"step={step}" for step in _starting(value, _steps(words[words.index(verb) + 1 :]))]
        if name == "data.name" and verb != "prepare":
            return [f"{name}={dataset}" for dataset in _starting(value, _prepared(words))]
        return [f"{name}={choice}" for choice in _values(verb, name, value, _folders(words))]
    fields = walk(VERBS[verb])
    has_path = "path" in fields or verb == "train"
    return _names(verb, last, fields) + (_paths(last, of_runs=True) if has_path and (last or "path" in fields) else [])


def _folders(words: list[str]) -> tuple[Path, ...]:
    """Return the folders of the user's choices that the words before name."""
    given = [f"{CONFIG_DIR}={after}" for word, after in pairwise(words) if word == CONFIG_DIR]
    try:
        return own_folders([*(word for word in words if word != CONFIG_DIR), *given])
    except MegatrainError:
        return ()


def _steps(words: list[str]) -> list[str]:
    """Return the steps of the checkpoints of the run among the words, newest first."""
    given = [word.removeprefix("path=") for word in words if word.startswith("path=") or "=" not in word]
    runs = [Path(word).expanduser() for word in given if not word.startswith("-")]
    found = [path for run in runs for folder in (run / "checkpoints", run) for path in list_checkpoints(folder)]
    return [str(checkpoint_step(path)) for path in found]


def _prepared(words: list[str]) -> list[str]:
    """Return the names of the prepared datasets in the `data.dir` that the words give, or in its default."""
    given = [word.partition("=")[2] for word in words if word.startswith("data.dir=")]
    folder = Path((given or [DataConfig().dir])[-1]).expanduser()
    return sorted(card.parent.name for card in folder.glob("*/card.json"))


def _names(verb: str, last: str, fields: dict[str, Any]) -> list[str]:
    """Return group choices and keys: of `train.steps` first only `train.`, once that is typed all its keys."""
    groups = [f"{group}=" for group in GROUPS.get(verb, ())]
    keys = [f"{name}=" for name in fields]
    if "." not in last:
        keys = list(dict.fromkeys(f"{key.partition('.')[0]}." if "." in key else key for key in keys))
    return _starting(last, [*groups, *keys])


def _values(verb: str, name: str, value: str, folders: tuple[Path, ...]) -> list[str]:
    """Return the choices of a group, the values of a key with few, or the paths for a key of paths."""
    fields = walk(VERBS[verb])
    if name in GROUPS.get(verb, ()):
        before, comma, last = value.rpartition(",")
        return [f"{before}{comma}{choice}" for choice in _starting(last, choices_of(name, folders))]
    if name not in fields:
        return []
    kind, optional = split_optional(key_types(VERBS[verb])[name])
    metadata = fields[name].metadata
    known = [str(choice) for choice in metadata.get("choices", ())] or (["true", "false"] if kind is bool else [])
    if metadata.get("path"):
        return _paths(value, of_runs=name in OF_RUNS)
    return _starting(value, [*known, "null"] if optional else known)


def _starting(text: str, known: Any) -> list[str]:
    return [name for name in known if name.startswith(text)]


def _paths(text: str, of_runs: bool = False) -> list[str]:
    """Return the paths that start with a text; those of folders end in a slash. None for a name with odd characters.

    `of_runs`: only folders that may be, or lead to, those of runs, checkpoints, datasets or models.
    """
    folder, slash, name = text.rpartition("/")
    try:
        entries = sorted(os.scandir(Path(folder + slash or ".").expanduser()), key=lambda entry: entry.name)
    except (OSError, RuntimeError):
        return []
    return [
        f"{folder}{slash}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in entries
        if entry.name.startswith(name)
        and (name or not entry.name.startswith("."))
        and shlex.quote(entry.name) == entry.name
        and (not of_runs or is_offered(Path(entry.path)))
    ]
