"""From command-line overrides to a checked dataclass of `config.py`, through Hydra's compose API. Imports no torch.

Hydra picks the group files (conf/) and lays an experiment over them; the keys typed on the command line come last.
Each value is read by its key's type, so that a name that looks like a number stays as typed. Checks that need two keys
or the file system live in `checks.py`; this file knows one key at a time.
"""

from __future__ import annotations

import math
import typing
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
"""Config groups of the verbs that have any: `<group>=<choice>` picks conf/<group>/<choice>.yaml."""

FREE_TEXT = ("prompt",)
"""Keys whose value is prose: commas and brackets in it mean nothing."""

LARGEST_INT = 2**63 - 1
"""What a whole number of a config may be at most: it ends up in tensors and files of 64 bits."""

SWEEPS = ("choice(", "range(", "interval(", "glob(")


def compose(verb: str, overrides: list[str]) -> Any:
    """The config of one verb, every value typed and within its bounds.

    `overrides` are in Hydra's syntax: `key=value` and `group=choice`. Raises ConfigError with the key, what was given
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
    """The name of a run that was given none."""
    return f"{config.model.name}-{config.data.name}"


def choices_of(group: str) -> list[str]:
    """The choices of one config group, by name."""
    folder = _conf_folder() / group
    return sorted(path.stem for path in folder.glob("*.yaml"))


# ------------------------------------------------------------------------------------------- reading the command line


@dataclass
class Request:
    """What the command line asks for: a choice for some groups, a value for some keys."""

    groups: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def read_overrides(verb: str, overrides: list[str]) -> Request:
    """Sort overrides into group choices and typed key values. Later ones win. Raises ConfigError."""
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
    """Every key of a verb's schema: dotted name to its type."""
    hints = typing.get_type_hints(schema)
    found: dict[str, Any] = {}
    for f in fields(schema):
        if is_dataclass(hints[f.name]):
            found.update({f"{f.name}.{name}": hint for name, hint in key_types(hints[f.name]).items()})
        else:
            found[f.name] = hints[f.name]
    return found


def _split(text: str) -> tuple[str, str]:
    """`key=value` into its two halves. `+` and `++` in front of a key change nothing here."""
    if text.startswith("~"):
        raise ConfigError(f"{text}: a key cannot be deleted; every key has a value (null where its type allows it)")
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
    """The choice of a group, checked against the files there are."""
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
    """The message for a key that the verb does not have."""
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
    return f"unknown key {name}; megatrain {verb} knows {listed} (megatrain {verb} --help explains each)"


# ------------------------------------------------------------------------------------------------- values by key type


def _read_value(name: str, hint: Any, text: str) -> Any:
    """The value of one key as its type says. Raises ConfigError naming key, given and expected."""
    kind, optional = split_optional(hint)
    bare = text.strip()
    if bare == "null":
        if optional:
            return None
        raise ConfigError(f"{name}=null: {name} cannot be null; expected {describe(hint)}")
    if kind is str and (name in FREE_TEXT or not _is_quoted(bare)):
        if name not in FREE_TEXT and is_sweep(bare):
            raise ConfigError(_sweep_message(name, text, quotable=True))
        return text.replace("${", "\\${") if name in FREE_TEXT else bare
    if kind == list[str] and bare.startswith("[") and bare.endswith("]") and not set(bare) & set("'\"()\\"):
        return [item.strip() for item in bare[1:-1].split(",") if item.strip()]
    value = _parse(name, text)
    if isinstance(value, str) and "${" in value:
        return value
    if not _fits(kind, value):
        hint_text = f" (write {int(value)})" if kind is int and isinstance(value, float) and value.is_integer() else ""
        if typing.get_origin(kind) is list and kind != list[list[int]] and not isinstance(value, list):
            hint_text = f" (write {name}=[{bare}])"
        raise ConfigError(f"{name}={text}: expected {describe(hint)}, given {_given(value)}{hint_text}")
    return value


def _parse(name: str, text: str) -> Any:
    """Hydra's reading of a value: int, float, bool, str, list or dict."""
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
    """A key's type without None, and whether None was in it."""
    parts = typing.get_args(hint)
    if NoneType not in parts:
        return hint, False
    (kind,) = (part for part in parts if part is not NoneType)
    return kind, True


def describe(hint: Any) -> str:
    """A key's type in words."""
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
    """Whether a parsed value may stand for a key of this type."""
    if typing.get_origin(kind) is list:
        (element,) = typing.get_args(kind)
        return isinstance(value, list) and all(element is str or _fits(element, item) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _given(value: Any) -> str:
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
    return len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""


def is_sweep(text: str) -> bool:
    """Whether a value looks like several."""
    return "," in text or text.startswith(SWEEPS)


def _sweep_message(name: str, value: str, quotable: bool = False) -> str:
    advice = f" (text that holds a comma goes in quotes: {name}=\"'...'\")" if quotable else ""
    return f"{name}={value}: several values make a sweep, which only megatrain train --multirun runs; give one value{advice}"


# -------------------------------------------------------------------------------------------------- groups and bounds


def _conf_folder() -> Path:
    """The folder of conf/, in a checkout as in an installed wheel."""
    return Path(str(resources.files("megatrain.conf")))


def _merge(verb: str, request: Request) -> Any:
    """Schema, group files, experiment and command line, laid over one another in this order: an OmegaConf node."""
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
    """The dataclass of a merged node; a mandatory key without a value is refused."""
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
    """A library's message and that of what caused it, on one line."""
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
    """Every value against its key's choices and bounds. Raises ConfigError naming key, given and allowed."""
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
    """One number against the bounds whose metadata names start with `prefix`."""
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        return
    tests = {
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
