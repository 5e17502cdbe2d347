"""Compose command-line overrides into a checked config dataclass, with Hydra's compose API. Imports no torch.

Hydra merges the group files of conf/ and of the user's folders (`choices.py`), then the experiment or the file of
`--config`; the keys of the command line come last. Each value is read according to its key's type, so a name that looks
like a number stays as typed. This file checks one key at a time; `model_checks.py` and `verbs/value_checks.py` check
several keys together, `verbs/path_checks.py` the file system.
"""

from __future__ import annotations

import math
import threading
import typing
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from megatrain.config import VERBS, DataConfig, TrainConfig, walk
from megatrain.config.choices import (
    CONFIG_DIR,
    CONFIG_FILE,
    GROUPS,
    SEARCH_PATH,
    check_defaults,
    conf_folder,
    find_choice,
    home,
    own_folder,
    read_yaml,
)
from megatrain.config.flatten import flatten
from megatrain.config.own_dataset import TRAINING, advice_on_place, find_dataset, same_place
from megatrain.config.suggest import did_you_mean, meant_keys
from megatrain.config.values import (
    describe,
    expand_home,
    fits,
    is_sweep,
    literal,
    misfit,
    read_value,
    sweep_message,
)
from megatrain.errors import ConfigError

_HYDRA = threading.Lock()

LARGEST_INT = 2**63 - 1
"""Largest integer that a config accepts: integers end up in 64-bit tensors and files."""


def compose(verb: str, overrides: list[str]) -> Any:
    """Compose the config of one verb, every value typed and within its bounds.

    `overrides` are in Hydra's syntax: `key=value` and `group=choice`; `--config-dir=DIR` and `--config=FILE` count too.
    Raises ConfigError with the key, the given value and what would work.
    """
    schema = VERBS[verb]
    request = read_overrides(verb, overrides)
    config = _to_dataclass(schema, _merge(verb, request))
    expand_home(config)
    check_bounds(config)
    if verb == "train" and config.run.name is None:
        config.run.name = default_run_name(config)
    return config


def default_run_name(config: TrainConfig) -> str:
    """Return the default of `run.name`."""
    return f"{config.model.name}-{config.data.name}"


def default_choices(verb: str) -> dict[str, str | None]:
    """Return the default choice of each group of a verb (None: none); empty for a verb without groups."""
    import yaml

    if verb not in GROUPS:
        return {}
    listed = yaml.safe_load((conf_folder() / f"{verb}.yaml").read_text(encoding="utf-8"))["defaults"]
    return {group: choice for entry in listed if isinstance(entry, dict) for group, choice in entry.items()}


# ------------------------------------------------------------------------------------------- reading the command line


@dataclass
class Request:
    """The command line's choices of groups (a name in conf/, or a file), values of keys, folders and config file."""

    groups: dict[str, str | Path] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()
    file: Path | None = None


def read_overrides(verb: str, overrides: list[str]) -> Request:
    """Sort overrides into group choices and typed key values. The last override of a name wins. Raises ConfigError."""
    schema = VERBS[verb]
    hints = key_types(schema)
    paths = {name for name, f in walk(schema).items() if f.metadata.get("path")}
    request = Request(folders=own_folders(overrides) if verb in GROUPS else ())
    dataset: tuple[str, Path] | None = None
    for text in overrides:
        name, value = _split(text)
        if name in (CONFIG_DIR, CONFIG_FILE, SEARCH_PATH) and verb not in GROUPS:
            raise ConfigError(f"{text}: megatrain {verb} has no config groups; leave {name} out")
        if name == CONFIG_FILE:
            request.file = home(text, value)
        elif name == "data" and verb in TRAINING and (folder := _own_dataset(value, overrides, request.folders)):
            request.groups[name], dataset = "files", (text, folder)
        elif name in GROUPS.get(verb, ()):
            request.groups[name] = _choice(name, value, request.folders)
            dataset = None if name == "data" else dataset
        elif name in hints:
            request.values[name] = read_value(name, hints[name], value, name in paths)
        elif name not in (CONFIG_DIR, SEARCH_PATH):
            raise ConfigError(_unknown(verb, name, list(hints)))
    if dataset is not None:
        _name_dataset(request, *dataset)
    return request


def repeated(verb: str, overrides: Sequence[str]) -> list[str]:
    """Return a line for each key or group that is given several values, of which the last one counts."""
    known = {*key_types(VERBS[verb]), *GROUPS.get(verb, ()), CONFIG_FILE}
    given: dict[str, list[str]] = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if equals and (name := name.strip().lstrip("+").replace("/", ".")) in known:
            given.setdefault(name, []).append(value.strip())
    return [
        f"{name} is given {len(values)} times; the last one counts: {name}={values[-1]} (before: "
        f"{', '.join(dict.fromkeys(values[:-1]))})"
        for name, values in given.items()
        if set(values[:-1]) - {values[-1]}
    ]


def last_words(overrides: Sequence[str], names: Container[str]) -> list[str]:
    """Return the overrides of these names, as they count: the last of each, and all of the user's own folders."""
    kept: dict[str, str] = {}
    for text in overrides:
        name = text.partition("=")[0].strip().lstrip("+").replace("/", ".")
        if name in names:
            kept[text if name in (CONFIG_DIR, SEARCH_PATH) else name] = text
    return list(kept.values())


def own_folders(overrides: Sequence[str]) -> tuple[Path, ...]:
    """Return the folders with the user's own choices: `--config-dir=DIR` and `hydra.searchpath=[DIR,...]`, in order."""
    folders = []
    for text in overrides:
        name, _, value = text.partition("=")
        if name == CONFIG_DIR:
            folders.append(own_folder(text, value))
        elif name.lstrip("+") == SEARCH_PATH:
            folders += [own_folder(text, item) for item in read_value(SEARCH_PATH, list[str], value, is_path=True)]
    return tuple(dict.fromkeys(folders))


def key_types(schema: type) -> dict[str, Any]:
    """Return the type of every key of a verb's schema, by dotted name."""
    hints = typing.get_type_hints(schema)
    found: dict[str, Any] = {}
    for f in fields(schema):
        if is_dataclass(hints[f.name]):
            found.update({f"{f.name}.{name}": hint for name, hint in key_types(hints[f.name]).items()})
        else:
            found[f.name] = hints[f.name]
    return found


def _split(text: str) -> tuple[str, str]:
    """Split `key=value`. A `+` or `++` in front of the key is ignored."""
    if text.startswith("--config"):
        name, _, value = text.partition("=")
        return name, value
    if text.startswith("~"):
        raise ConfigError(f"{text}: a key cannot be deleted; give it a value instead (null if its type allows it)")
    name, equals, value = text.partition("=")
    name = name.strip().lstrip("+")
    if not equals or not name:
        raise ConfigError(
            f"cannot read {text!r}: an override is key=value or group=choice, for example seed=1; a value of several "
            "words needs quotes, as in 'prompt=two words'"
        )
    if "@" in name or ":" in name:
        raise ConfigError(f"{text}: packages in an override (group@package=choice) are not supported; use group=choice")
    return name.replace("/", "."), value


def _choice(group: str, value: str, folders: Sequence[Path]) -> str | Path:
    """Return the choice of a group, checked against the files of conf/ and `folders`: its name or the user's file."""
    value = value.strip().strip("'\"")
    if is_sweep(value) and not Path(value).is_file():
        raise ConfigError(sweep_message(group, value))
    if value == "null" and group == "experiment":
        return value
    try:
        return find_choice(group, value, folders)
    except ConfigError as error:
        if group == "data" and (advice := advice_on_place(value)):
            raise ConfigError(advice) from error
        raise


def _own_dataset(value: str, overrides: Sequence[str], folders: Sequence[Path]) -> Path | None:
    """Return the folder of the prepared dataset that `data=<value>` names, or None."""
    given = [text.partition("=")[2] for text in last_words(overrides, ("data.dir",))]
    data_dir = given[0] if given else DataConfig().dir
    return find_dataset(value.strip().strip("'\""), data_dir.strip().strip("'\""), folders)


def _name_dataset(request: Request, text: str, folder: Path) -> None:
    """Set the name and parent of the dataset that the override `text` chooses. Raises ConfigError if keys differ."""
    for key, value in {"data.name": folder.name, "data.dir": str(folder.parent)}.items():
        given = request.values.setdefault(key, value)
        if given is None or not same_place(given, value):
            raise ConfigError(f"{text} is the dataset {folder}, but {key}={given} names another; give one of them")


def _unknown(verb: str, name: str, known: list[str]) -> str:
    """Return the message for a key that the verb does not have."""
    prefix = name + "."
    members = [key for key in known if key.startswith(prefix)]
    if members:
        return f"{name} is a group of keys, not a key; set one of {', '.join(members)}"
    groups = GROUPS.get(verb, ())
    nearest = meant_keys(name, {key: f.metadata["help"] for key, f in walk(VERBS[verb]).items()}, groups)
    if nearest:
        return f"unknown key {name}; did you mean {nearest}?"
    siblings = [key for key in known if "." in name and key.startswith(name.split(".")[0] + ".")]
    listed = ", ".join(siblings or sorted({key.split(".")[0] for key in known} | set(groups)))
    return f"unknown key {name}; the keys of megatrain {verb} are {listed} (megatrain {verb} --help all explains each)"


# -------------------------------------------------------------------------------------------------- groups and bounds


def _merge(verb: str, request: Request) -> Any:
    """Do the work of `_merged` for one thread at a time: Hydra is global."""
    with _HYDRA:
        return _merged(verb, request)


def _merged(verb: str, request: Request) -> Any:
    """Merge schema, group files, experiment or `--config` file, and command line, in this order, into a node."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    files = {f"{group}/{OWN}": choice for group, choice in request.groups.items() if isinstance(choice, Path)}
    try:
        if verb in GROUPS:
            store = ConfigStore.instance()
            store.store(name=f"{verb}_schema", node=VERBS[verb])
            first, *others = (*request.folders, conf_folder())
            main, _ = read_yaml(conf_folder() / f"{verb}.yaml")
            search_path = {"searchpath": [literal(f"file://{folder.absolute()}") for folder in others]}
            store.store(name=f"megatrain_{verb}", node={**main, "hydra": search_path})
            chosen = [f"{group}={choice}" for group, choice in request.groups.items() if isinstance(choice, str)]
            for group in (group for group, choice in request.groups.items() if isinstance(choice, Path)):
                _store_own(verb, group, request)
                chosen.append(f"{group}={OWN}")
            if request.file is not None:
                _store_file(verb, request, request.file)
                files[f"experiment/{OWN}"] = request.file
                chosen.append(f"{'' if 'experiment' in GROUPS[verb] else '+'}experiment={OWN}")
            with _own_hydra(), initialize_config_dir(str(first.absolute()), version_base="1.3"):
                node = hydra_compose(config_name=f"megatrain_{verb}", overrides=chosen)
        else:
            node = OmegaConf.structured(VERBS[verb])
        for name, value in request.values.items():
            OmegaConf.update(node, name, value, merge=False)  # a mapping of the command line replaces a file's
    except RecursionError as error:
        own = ", ".join(str(place) for place in (*request.folders, *files.values()))
        raise ConfigError(f"cannot compose the config: a choice in {own} includes itself in its defaults") from error
    except (HydraException, OmegaConfBaseException) as error:
        cause = _whole_cause(error)
        for name, file in files.items():
            cause = cause.replace(name, str(file))
        raise ConfigError(f"cannot compose the config: {cause}") from error
    return node


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Put aside the Hydra of the program that calls this from Python, which is global."""
    from hydra.core.global_hydra import GlobalHydra

    theirs = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = theirs


OWN = "own_file"
"""Name under which Hydra is given the content of a user's file."""


def _store_own(verb: str, group: str, request: Request) -> None:
    """Give Hydra the user's file for a group. A model or dataset without a name gets the file's name."""
    from hydra.core.config_store import ConfigStore

    file = request.groups[group]
    assert isinstance(file, Path)
    content, package = read_yaml(file)
    check_defaults(verb, group, file, content, request.folders)
    package = package or ("_global_" if group == "experiment" else group)
    if group in ("model", "data") and package == group:
        content.setdefault("name", file.stem)
    _check_content(verb, file, content, "" if package == "_global_" else f"{package}.")
    ConfigStore.instance().store(group=group, name=OWN, node=content, package=package)


def _store_file(verb: str, request: Request, file: Path) -> None:
    """Give Hydra the file of `--config`, without the groups for which the command line has another choice."""
    from hydra.core.config_store import ConfigStore

    if "experiment" in request.groups:
        raise ConfigError(f"{CONFIG_FILE}={file} and experiment={request.groups['experiment']}: give one of them")
    content, _ = read_yaml(file)
    check_defaults(verb, "experiment", file, content, request.folders)
    for group in request.groups:
        content.pop(group, None)
    run = content.get("run")
    if isinstance(run, dict) and request.values.get("run.name", run.get("name")) != run.get("name"):
        run.pop("sweep", None)  # another run is no point of the sweep
    if verb == "prepare":  # the config of a run has more than preparing needs
        known = {name.partition(".")[0] for name in key_types(VERBS[verb])} - {"launch"}
        others = {name.partition(".")[0] for name in key_types(TrainConfig)} - known
        content = {name: value for name, value in content.items() if name not in others}
    _check_content(verb, file, content, "")
    ConfigStore.instance().store(group="experiment", name=OWN, node=content, package="_global_")


def _check_content(verb: str, file: Path, content: dict[str, Any], prefix: str) -> None:
    """Check every key and value of a user's YAML. Raises ConfigError with the file, the key and what would work."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    hints = key_types(VERBS[verb])
    node = OmegaConf.structured(VERBS[verb])
    for name, value in flatten({name: value for name, value in content.items() if name != "defaults"}, prefix).items():
        if name not in hints:
            if name in GROUPS[verb] and isinstance(value, str):
                raise ConfigError(
                    f"{file}: {name}: {value} chooses a preset, which belongs into a list: defaults: "
                    f"[override /{name}: {value}]"
                )
            raise ConfigError(f"{file}: {_unknown(verb, name, list(hints))}")
        if isinstance(value, str) and ("${" in value or value == "???"):
            continue
        texts = isinstance(value, list) and hints[name] == list[str]
        given = [str(item) if isinstance(item, (int, float)) else item for item in value] if texts else value
        refused = ConfigError(f"{file}: {name}: {value}: expected {describe(hints[name])}, given ")
        if texts and not fits(hints[name], given):  # OmegaConf takes mappings for texts
            raise ConfigError(f"{refused}{misfit(hints[name], given)}")
        try:
            OmegaConf.update(node, name, value)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{refused}{misfit(hints[name], value)}") from error


def _to_dataclass(schema: type, node: Any) -> Any:
    """Convert a merged node to its dataclass. Raises ConfigError for a mandatory key without a value."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        missing = sorted(OmegaConf.missing_keys(node))
        if not missing:
            return OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot resolve the config: {_whole_cause(error)}") from error
    meaning = walk(schema)[missing[0]].metadata["help"]
    raise ConfigError(f"{missing[0]} is not set; give {missing[0]}=... ({meaning})")


def _whole_cause(error: BaseException) -> str:
    """Return an exception's message and those of its causes on one line."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        lines = [line.strip() for line in str(current).splitlines() if line.strip()]
        parts.extend(
            line for line in lines if line not in parts and not line.startswith(("object_type", "reference_type"))
        )
        current = current.__cause__
    return "; ".join(parts)


def check_bounds(config: Any) -> None:
    """Check every value against its key's choices and bounds.

    Raises ConfigError with the key, the value and the bounds.
    """
    for name, f in walk(type(config)).items():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        if value is None:
            continue
        check_value(name, value, f.metadata)
    betas = getattr(getattr(config, "optim", None), "betas", None)
    if betas is not None and len(betas) != 2:
        raise ConfigError(f"optim.betas={betas}: expected two numbers, given {len(betas)}; for example [0.9,0.95]")


def check_value(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Check one value, not None, against the choices and bounds of its `key`. Raises ConfigError."""
    if "choices" in metadata and value not in metadata["choices"]:
        known = [str(choice) for choice in metadata["choices"]]
        hint = did_you_mean("", str(value), known)
        raise ConfigError(f"{name}={value} is not one of {', '.join(known)}{hint}")
    for item in value if isinstance(value, list) and "each_choices" in metadata else []:
        if item not in metadata["each_choices"]:
            known = [str(choice) for choice in metadata["each_choices"]]
            raise ConfigError(f"{name}: {item} is not one of {', '.join(known)}{did_you_mean('', str(item), known)}")
    for number in [value] if isinstance(value, (int, float)) else []:
        _check_number(name, number, number, metadata, "")
    for number in value if isinstance(value, list) else []:
        _check_number(name, number, value, metadata, "each_")


def _check_number(name: str, number: Any, given: Any, metadata: Any, prefix: str) -> None:
    """Check one number against the bounds in `metadata` whose names start with `prefix`."""
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        return
    tests: dict[str, tuple[str, Callable[[float], bool]]] = {
        "minimum": ("at least", lambda bound: number >= bound),
        "above": ("above", lambda bound: number > bound),
        "maximum": ("at most", lambda bound: number <= bound),
        "below": ("below", lambda bound: number < bound),
    }
    bounds = {which: metadata[prefix + which] for which in tests if prefix + which in metadata}
    usable = abs(number) <= LARGEST_INT if isinstance(number, int) else math.isfinite(number)
    if usable and all(tests[which][1](bound) for which, bound in bounds.items()):
        return
    allowed = " and ".join(f"{tests[which][0]} {bound:g}" for which, bound in bounds.items())
    if not usable and not {"maximum", "below"} & bounds.keys():
        end = f"at most {LARGEST_INT}" if isinstance(number, int) else "finite"
        allowed = f"{allowed} and {end}" if allowed else end
    given = given if len(str(given)) < 40 else f"{str(given)[:36]}..."
    raise ConfigError(f"{name}={given} is out of range: {'each must be' if prefix else 'must be'} {allowed}")
