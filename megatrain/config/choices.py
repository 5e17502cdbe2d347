"""Where the choices of config groups come from: conf/, a user's own folders, and single YAML files. Imports no torch.

A folder of a user's own is laid out like conf/: `model=my` is the file `<folder>/model/my.yaml`. The first folder that
has a choice wins; conf/ comes last.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from megatrain.config.suggest import did_you_mean
from megatrain.errors import ConfigError

GROUPS: dict[str, tuple[str, ...]] = {
    "train": (
        *("model", "data", "tokenizer", "engine", "optim", "precision", "launch", "tracking", "method"),
        "experiment",
    ),
    "prepare": ("data", "clean", "tokenizer", "launch"),
    "tokenizer": ("data", "clean", "tokenizer"),
}
GROUPS["layouts"] = GROUPS["tune"] = GROUPS["train"]
"""Config groups of each verb that has any: `<group>=<choice>` selects conf/<group>/<choice>.yaml."""

CONFIG_DIR = "--config-dir"
CONFIG_FILE = "--config"
SEARCH_PATH = "hydra.searchpath"

YAML = (".yaml", ".yml")

TIME = re.compile(r"[-+]?[0-9]+(:[0-9]+)+(\.[0-9]*)?$")


def conf_folder() -> Path:
    """Return the folder of conf/, in a checkout or an installed wheel."""
    return Path(str(resources.files("megatrain.conf")))


def own_folder(given: str, text: str) -> Path:
    """Return a folder of the user's own choices: a path, `file://path` or `pkg://package`.

    `given` is the word of the command line. Raises ConfigError unless it is a folder with a config group in it.
    """
    if text.startswith("pkg://"):
        try:
            folder = Path(str(resources.files(import_module(text.removeprefix("pkg://").replace("/", ".")))))
        except ImportError as error:
            raise ConfigError(f"{given}: the package {text} cannot be imported ({error})") from error
    else:
        folder = home(given, text.removeprefix("file://"))
    if not folder.is_dir():
        raise ConfigError(
            f"{given}: {folder} is not a folder; give one with your own choices, as {folder}/model/my.yaml"
        )
    if not any((folder / group).is_dir() for group in GROUPS["train"]):
        raise ConfigError(
            f"{given}: {folder} has none of the folders {', '.join(GROUPS['train'])}; a choice such as model=my is the "
            f"file {folder}/model/my.yaml"
        )
    return folder


def home(given: str, text: str) -> Path:
    """Return a path with a leading `~` or `~user` replaced. Raises ConfigError for an unknown user."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{given}: there is no home folder for {text.partition('/')[0]}; give the path in full, or ./{text} if "
            f"that is its name"
        ) from error


def choices_of(group: str, folders: Sequence[Path] = ()) -> list[str]:
    """Return the names of a config group's choices, those in `folders` included."""
    found = {
        str(path.relative_to(folder / group).with_suffix(""))
        for folder in (*folders, conf_folder())
        for path in (folder / group).rglob("*.yaml")
        if path.is_file()
    }
    return sorted(found)


def find_choice(group: str, value: str, folders: Sequence[Path]) -> str | Path:
    """Return the name of a choice in conf/, or the file of a choice of the user's own.

    `value` is a name or the path of a YAML file. Raises ConfigError with the choices and the folders searched.
    """
    file = home(f"{group}={value}", value)
    if file.suffix in YAML and file.is_file():
        return file
    name = value.removesuffix(file.suffix) if file.suffix in YAML else value
    for folder in folders:
        if (found := folder / group / f"{name}.yaml").is_file():
            return found
    known = choices_of(group, folders)
    if name in known:
        return name
    listed = f"(choices of {group}: {', '.join(known)})"
    searched = ", ".join(str(folder / group) for folder in folders)
    where = f"; searched {searched} and megatrain's own" if folders else ""
    if "/" in value or file.suffix in YAML:
        raise ConfigError(f"{group}={value}: no such file {listed}{where}")
    hint = did_you_mean(f"{group}=", name, known)
    if group == "data" and not hint:
        hint = f", and no dataset of that name is prepared: megatrain prepare <files> data.name={name} makes one"
    where = where or f"; a choice of your own is {group}=FILE.yaml, or DIR/{group}/{name}.yaml with {CONFIG_DIR} DIR"
    raise ConfigError(f"unknown choice {group}={value}{hint} {listed}{where}")


def special_file(path: Path) -> str:
    """Return what a path is that is neither a file nor a folder, such as a FIFO; empty for others."""
    try:
        mode = path.expanduser().stat().st_mode
    except (OSError, ValueError, RuntimeError):
        return ""
    if stat.S_ISFIFO(mode):
        return "a FIFO (a named pipe, or the shell's <(...))"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else ""


def read_yaml(file: Path) -> tuple[dict[str, Any], str | None]:
    """Return the mapping in a YAML file, and the package that its header (`# @package _global_`) names.

    Raises ConfigError if the file cannot be read, is empty, gives a key twice or holds something else.
    """
    import yaml

    if what := special_file(file):  # each rank reads it again
        raise ConfigError(f"{file} is {what}, which can be read only once; write the config into a file and give that")
    try:
        text = file.read_text(encoding="utf-8-sig")
        content = yaml.load(text, _loader())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{file} cannot be read: {reason}") from error
    except _TwiceError as error:
        raise ConfigError(f"{file}, {error}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ConfigError(f"{file} is not YAML: {reason}") from error
    if content is None or content == {}:
        raise ConfigError(
            f"{file} is empty, which would mean the default of every key; restore it, or give another file"
        )
    if not (isinstance(content, dict) and all(isinstance(name, str) for name in content)):
        raise ConfigError(f"{file} does not hold keys with values, as in num_layers: 4")
    header = re.search(r"^#\s*@package[ \t]+(\S+)", text, re.MULTILINE)
    return content, header.group(1) if header else None


def check_defaults(verb: str, group: str, file: Path, content: dict[str, Any], folders: Sequence[Path]) -> None:
    """Check that each choice in the `defaults` of a user's file exists, also in the user's files that it leads to.

    `group` is the file's own. Raises ConfigError with the file, the wrong name and the choices.
    """
    waiting, seen = [(group, file, content)], {file}
    while waiting:
        group, file, content = waiting.pop()
        for entry in content.get("defaults") or ():
            for chosen_of, choice in _entries(group, entry):
                if chosen_of not in GROUPS[verb] or not isinstance(choice, str) or "${" in choice:
                    continue
                try:
                    found = find_choice(chosen_of, choice, folders)
                except ConfigError as error:
                    known = choices_of(chosen_of, folders)
                    raise ConfigError(
                        f"{file}: defaults: there is no {chosen_of} named "
                        f"{choice}{did_you_mean('', choice, known)} (choices of {chosen_of}: {', '.join(known)})"
                    ) from error
                if isinstance(found, Path) and found not in seen:
                    seen.add(found)
                    waiting.append((chosen_of, found, read_yaml(found)[0]))


def _entries(group: str, entry: Any) -> list[tuple[str, Any]]:
    """Return the groups and choices that an entry of `defaults` names, in Hydra's syntax."""
    if isinstance(entry, str):
        before, slash, name = entry.removeprefix("/").rpartition("/")
        return [] if entry == "_self_" else [(before if slash else group, name)]
    if not isinstance(entry, dict) or any(str(name).startswith("optional ") for name in entry):
        return []
    return [
        (str(name).removeprefix("override ").partition("@")[0].strip("/"), choice) for name, choice in entry.items()
    ]


class _TwiceError(Exception):
    """A mapping has the same key twice."""


def _loader() -> Any:
    """Return YAML's safe loader, except that 1:00:00 stays text, and that a key given twice raises `_TwiceError`.

    YAML 1.1 reads 1:00:00 as a number to the base 60, 3600. The library takes the last of several values of a key.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def __init__(self, stream: Any) -> None:
            super().__init__(stream)
            self.flattened: list[yaml.MappingNode] = []

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            if node in self.flattened:  # what it merged from others by << is in it by now
                return
            self.flattened.append(node)
            lines: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode) and key.value in lines:
                    first = f", first in line {lines[key.value]}" if lines[key.value] != line else ""
                    raise _TwiceError(f"line {line}: {key.value} is given twice{first}; keep one")
                lines[key.value if isinstance(key, yaml.ScalarNode) else ""] = line
            super().flatten_mapping(node)

    Loader.yaml_implicit_resolvers = {
        letter: [("tag:yaml.org,2002:str", TIME), *known]
        for letter, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader
