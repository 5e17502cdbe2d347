"""Compose command-line overrides into a checked config dataclass, with Hydra's compose API. Imports no torch.

Hydra merges the group files of conf/ and then the experiment; the keys of the command line come last. Each value is
read according to its key's type, so a name that looks like a number stays as typed. This file checks one key at a
time; `verbs/value_checks.py` checks several keys together, `verbs/path_checks.py` the file system.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any

from megatrain.config import VERBS, TrainConfig, walk
from megatrain.config.suggest import did_you_mean, nearest_key
from megatrain.errors import ConfigError

GROUPS: dict[str, tuple[str, ...]] = {
    "train": ("model", "data", "tokenizer", "engine", "optim", "precision", "launch", "tracking", "experiment"),
    "prepare": ("data", "tokenizer"),
}
GROUPS["layouts"] = GROUPS["train"]
"""Config groups of each verb that has any: `<group>=<choice>` selects conf/<group>/<choice>.yaml."""

FREE_TEXT = ("prompt",)
"""Keys whose value is prose: commas and brackets have no special meaning."""

LARGEST_INT = 2**63 - 1
"""Largest integer that a config accepts: integers end up in 64-bit tensors and files."""

SWEEPS = ("choice(", "range(", "interval(", "glob(")


def compose(verb: str, overrides: list[str]) -> Any:
    """Compose the config of one verb, every value typed and within its bounds.

    `overrides` are in Hydra's syntax: `key=value` and `group=choice`. Raises ConfigError with the key, the given value
    and what would work.
    """
    schema = VERBS[verb]
    request = read_overrides(verb, overrides)
    config = _to_dataclass(schema, _merge(verb, request))
    check_bounds(config)
    if verb == "train" and config.run.name is None:
        config.run.name = default_run_name(config)
    return config


def default_run_name(config: TrainConfig) -> str:
    """Return the default of `run.name`."""
    return f"{config.model.name}-{config.data.name}"


def choices_of(group: str) -> list[str]:
    """Return the names of a config group's choices."""
    folder = _conf_folder() / group
    return sorted(path.stem for path in folder.glob("*.yaml"))


def default_choices(verb: str) -> dict[str, str | None]:
    """Return the default choice of each group of a verb (None: none); empty for a verb without groups."""
    import yaml

    if verb not in GROUPS:
        return {}
    listed = yaml.safe_load((_conf_folder() / f"{verb}.yaml").read_text(encoding="utf-8"))["defaults"]
    return {group: choice for entry in listed if isinstance(entry, dict) for group, choice in entry.items()}


# ------------------------------------------------------------------------------------------- reading the command line


@dataclass
class Request:
    """The command line's choices of groups and values of keys."""

    groups: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def read_overrides(verb: str, overrides: list[str]) -> Request:
    """Sort overrides into group choices and typed key values. The last override of a name wins. Raises ConfigError."""
    hints = key_types(VERBS[verb])
    request = Request()
    for text in overrides:
        name, value = _split(text)
        if name in GROUPS.get(verb, ()):
            request.groups[name] = _choice(name, value)
        elif name in hints:
            request.values[name] = _read_value(name, hints[name], value)
        else:
            raise ConfigError(_unknown(verb, name, list(hints)))
    return request


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
    if text.startswith("~"):
        raise ConfigError(f"{text}: a key cannot be deleted; give it a value instead (null if its type allows it)")
    name, equals, value = text.partition("=")
    name = name.strip().lstrip("+")
    if not equals or not name:
        raise ConfigError(
            f"cannot read {text!r}: an override is key=value or group=choice, for example train.steps=200"
        )
    if "@" in name or ":" in name:
        raise ConfigError(f"{text}: packages in an override (group@package=choice) are not supported; use group=choice")
    return name.replace("/", "."), value


def _choice(group: str, value: str) -> str:
    """Return the choice of a group, checked against the files of conf/."""
    known = choices_of(group)
    value = value.strip().strip("'\"")
    if is_sweep(value):
        raise ConfigError(_sweep_message(group, value))
    if value in known or (value == "null" and group == "experiment"):
        return value
    listed = ", ".join(known) or "none yet"
    hint = did_you_mean(f"{group}=", value, known)
    raise ConfigError(f"unknown choice {group}={value}{hint} (choices of {group}: {listed})")


def _unknown(verb: str, name: str, known: list[str]) -> str:
    """Return the message for a key that the verb does not have."""
    prefix = name + "."
    members = [key for key in known if key.startswith(prefix)]
    if members:
        return f"{name} is a group of keys, not a key; set one of {', '.join(members)}"
    groups = GROUPS.get(verb, ())
    nearest = nearest_key(name, {key: f.metadata["help"] for key, f in walk(VERBS[verb]).items()}, groups)
    if nearest:
        return f"unknown key {name}; did you mean {nearest}?"
    siblings = [key for key in known if "." in name and key.startswith(name.split(".")[0] + ".")]
    listed = ", ".join(siblings or sorted({key.split(".")[0] for key in known} | set(groups)))
    return f"unknown key {name}; the keys of megatrain {verb} are {listed} (megatrain {verb} --help explains each)"


# ------------------------------------------------------------------------------------------------- values by key type


def _read_value(name: str, hint: Any, text: str) -> Any:
    """Read the value of one key according to its type.

    Raises ConfigError with the key, the given and the expected value.
    """
    kind, optional = split_optional(hint)
    stripped = text.strip()
    if stripped == "null":
        if optional:
            return None
        raise ConfigError(f"{name}=null: {name} cannot be null; give {describe(hint)}")
    if kind is str and (name in FREE_TEXT or not _is_quoted(stripped)):
        if name not in FREE_TEXT and is_sweep(stripped):
            raise ConfigError(_sweep_message(name, text, quotable=True))
        return text.replace("${", "\\${") if name in FREE_TEXT else stripped
    if kind == list[str] and stripped.startswith("[") and stripped.endswith("]") and not set(stripped) & set("'\"()\\"):
        return [item.strip() for item in stripped[1:-1].split(",") if item.strip()]
    value = _parse(name, text)
    if isinstance(value, str) and "${" in value:
        return value
    if not _fits(kind, value):
        hint_text = f" (write {int(value)})" if kind is int and isinstance(value, float) and value.is_integer() else ""
        if typing.get_origin(kind) is list and kind != list[list[int]] and not isinstance(value, list):
            hint_text = f" (write {name}=[{stripped}])"
        raise ConfigError(f"{name}={text}: expected {describe(hint)}, given {_given(value)}{hint_text}")
    return value


def _parse(name: str, text: str) -> Any:
    """Parse a value with Hydra's grammar: int, float, bool, str, list or dict."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"{name}={text}")
    except HydraException as error:
        raise ConfigError(f"cannot read {name}={text}: quote special characters, as in {name}='...'") from error
    if override.is_sweep_override():
        raise ConfigError(_sweep_message(name, text))
    value = override.value()
    if isinstance(value, list):
        return [item.text if isinstance(item, QuotedString) else item for item in value]
    return value.text if isinstance(value, QuotedString) else value


def split_optional(hint: Any) -> tuple[Any, bool]:
    """Return a key's type without None, and whether it allows None."""
    parts = typing.get_args(hint)
    if NoneType not in parts:
        return hint, False
    (kind,) = (part for part in parts if part is not NoneType)
    return kind, True


def describe(hint: Any) -> str:
    """Return a key's type in words."""
    kind, optional = split_optional(hint)
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        list[str]: "a list of texts such as [a,b]",
        list[int]: "a list of whole numbers such as [3,4]",
        list[float]: "a list of numbers such as [0.9,0.95]",
        list[list[int]]: "a list of pairs such as [[96,128],[400,480]]",
    }
    return words[kind] + (" or null" if optional else "")


def _fits(kind: Any, value: Any) -> bool:
    """Return whether a parsed value is valid for a key of this type."""
    if typing.get_origin(kind) is list:
        (element,) = typing.get_args(kind)
        return isinstance(value, list) and all(element is str or _fits(element, item) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _given(value: Any) -> str:
    """Return the type of a parsed value in words."""
    names = {
        bool: "a boolean",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    return names.get(type(value), type(value).__name__)


def _is_quoted(text: str) -> bool:
    """Return whether a text is in single or double quotes."""
    return len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""


def is_sweep(text: str) -> bool:
    """Return whether a value looks like a sweep over several values."""
    return "," in text or text.startswith(SWEEPS)


def _sweep_message(name: str, value: str, quotable: bool = False) -> str:
    """Return the message for several values in a command that takes one."""
    advice = f" (quote text that holds a comma: {name}=\"'...'\")" if quotable else ""
    return (
        f"{name}={value}: several values make a sweep, which only megatrain train --multirun runs; "
        f"give one value{advice}"
    )


# -------------------------------------------------------------------------------------------------- groups and bounds


def _conf_folder() -> Path:
    """Return the folder of conf/, in a checkout or an installed wheel."""
    return Path(str(resources.files("megatrain.conf")))


def _merge(verb: str, request: Request) -> Any:
    """Merge schema, group files, experiment and command line, in this order, into an OmegaConf node."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        if verb in GROUPS:
            ConfigStore.instance().store(name=f"{verb}_schema", node=VERBS[verb])
            with initialize_config_dir(str(_conf_folder()), version_base="1.3"):
                chosen = [f"{group}={choice}" for group, choice in request.groups.items()]
                node = hydra_compose(config_name=verb, overrides=chosen)
        else:
            node = OmegaConf.structured(VERBS[verb])
        for name, value in request.values.items():
            OmegaConf.update(node, name, value)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot compose the config: {_whole_cause(error)}") from error
    return node


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
            line
            for line in lines
            if line not in parts and not line.startswith(("object_type", "reference_type", "full_key"))
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
        metadata = f.metadata
        if "choices" in metadata and value not in metadata["choices"]:
            known = [str(choice) for choice in metadata["choices"]]
            hint = did_you_mean("", str(value), known)
            raise ConfigError(f"{name}={value} is not one of {', '.join(known)}{hint}")
        for number in [value] if isinstance(value, (int, float)) else []:
            _check_number(name, number, number, metadata, "")
        for number in value if isinstance(value, list) else []:
            _check_number(name, number, value, metadata, "each_")
    betas = getattr(getattr(config, "optim", None), "betas", None)
    if betas is not None and len(betas) != 2:
        raise ConfigError(f"optim.betas={betas}: expected two numbers, given {len(betas)}; for example [0.9,0.95]")


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
