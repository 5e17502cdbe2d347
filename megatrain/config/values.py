"""Read the value of a key, as typed, according to the key's type. Imports no torch."""

from __future__ import annotations

import functools
import re
import shlex
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from megatrain.config import walk
from megatrain.config.choices import home
from megatrain.errors import ConfigError

FREE_TEXT = ("prompt", "suffix", "system")
"""Keys whose value is prose: commas and brackets have no special meaning."""

SWEEPS = ("choice(", "range(", "interval(", "glob(")


def read_value(name: str, hint: Any, text: str, is_path: bool = False) -> Any:
    """Read the value of one key according to its type. A path that exists is taken as typed, and one path is a list.

    Raises ConfigError with the key, the given and the expected value.
    """
    kind, optional = split_optional(hint)
    stripped = text.strip()
    if stripped == "null":
        if optional:
            return None
        raise ConfigError(f"{name}=null: {name} cannot be null; give {describe(hint)}")
    if is_path and kind is str and exists(text):
        return literal(text)
    if kind is str and (name in FREE_TEXT or not _is_quoted(stripped)):
        if name not in FREE_TEXT and is_sweep(stripped):
            raise ConfigError(sweep_message(name, text, quotable=True))
        return literal(text) if name in FREE_TEXT else stripped
    if kind == list[str]:
        listed = stripped[1:-1].strip() if _is_quoted(stripped) else stripped
        if listed.startswith("[") and listed.endswith("]"):
            items = [listed[1:-1]] if is_path and exists(listed[1:-1]) else split_list(listed[1:-1])
            return [literal(item) if is_path and exists(item) else item for item in items]
        if is_path and stripped and (exists(stripped) or not (is_sweep(stripped) or set("[]{}'\"") & set(stripped))):
            return [literal(stripped) if exists(stripped) else stripped]
        if stripped.startswith("-"):  # options of a program, which Hydra's grammar cannot read
            raise ConfigError(
                f"{name}={text}: expected {describe(hint)}, given text (write {shlex.quote(f'{name}=[{stripped}]')})"
            )
    if typing.get_origin(kind) is list and "," in stripped and not set("[]{}()'\"") & set(stripped):
        raise ConfigError(f"{name}={text}: a list is in brackets: write {shlex.quote(f'{name}=[{stripped}]')}")
    value = _parse(name, text)
    if isinstance(value, str) and "${" in value:
        return value
    if not fits(kind, value):
        hint_text = f" (write {int(value)})" if kind is int and isinstance(value, float) and value.is_integer() else ""
        if typing.get_origin(kind) is list and kind != list[list[int]] and not isinstance(value, list):
            hint_text = f" (write {shlex.quote(f'{name}=[{stripped}]')})"
        raise ConfigError(f"{name}={text}: expected {describe(hint)}, given {misfit(kind, value)}{hint_text}")
    return value


def _parse(name: str, text: str) -> Any:
    """Parse a value with Hydra's grammar: int, float, bool, str, list or dict."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"{name}={text}")
    except HydraException as error:
        advice = f"quote special characters, as in {name}='...'"
        if missing := missing_brackets(text):
            advice = f"the closing {missing} is missing: write {shlex.quote(f'{name}={text}{missing}')}"
        raise ConfigError(f"cannot read {name}={text}: {advice}") from error
    if override.is_sweep_override():
        raise ConfigError(sweep_message(name, text))
    if repeated := _repeated_key(f"{name}={text}"):
        raise ConfigError(f"{name}={text}: {repeated} is given twice in one mapping; give each key once")
    value = override.value()
    return _plain(value)


def _repeated_key(override: str) -> str | None:
    """Return a key that a mapping of a valid override has twice, at any depth; Hydra takes the last without a word."""
    from antlr4 import CommonTokenStream, InputStream
    from hydra.grammar.gen.OverrideLexer import OverrideLexer
    from hydra.grammar.gen.OverrideParser import OverrideParser

    if override.count(":") < 2:
        return None
    waiting = [OverrideParser(CommonTokenStream(OverrideLexer(InputStream(override)))).override()]
    while waiting:
        node = waiting.pop()
        waiting += getattr(node, "children", None) or []
        if isinstance(node, OverrideParser.DictContainerContext):
            names = [pair.dictKey().getText().strip() for pair in node.dictKeyValuePair()]
            if repeated := next((name for name in names if names.count(name) > 1), None):
                return str(repeated)
    return None


def _plain(value: Any) -> Any:
    """Return a parsed value with its quoted texts as plain ones, at any depth."""
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(_plain(name)): _plain(item) for name, item in value.items()}
    return value.text if isinstance(value, QuotedString) else value


def literal(text: str) -> str:
    """Return text in which OmegaConf sees no interpolation."""
    return text.replace("${", "\\${")


def quoted(key: str, text: str) -> str:
    """Return an override that sets a key to text as it is, quoted if necessary."""
    from hydra.core.override_parser.types import Quote, QuotedString

    plain = re.fullmatch(r"[\w.+/-]+", text)
    return f"{key}={text if plain else QuotedString(literal(text), Quote.single).with_quotes()}"


def as_text(value: Any) -> str:
    """Return a value as the text of an override: text is quoted, lists and mappings are written out."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(as_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{name}: {as_text(item)}' for name, item in value.items())}}}"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_./][\w./-]*", value) and value.lower() not in (
            "null",
            "true",
            "false",
            "nan",
            "inf",
        )
        return value if plain else str(QuotedString(literal(value), Quote.single).with_quotes())
    return str(value)


def split_list(text: str) -> list[str]:
    """Split the inside of `[a,b]` at its commas, except those in quotes or in brackets; quotes around an item go."""
    items, start, depth, quote = [], 0, 0, ""
    balanced = all(text.count(left) == text.count(right) for left, right in ("()", "[]", "{}"))
    for place, letter in enumerate(text):
        begins_item = not text[start:place].strip()
        if quote:
            quote = "" if letter == quote and text[place - 1] != "\\" else quote
        elif letter in "'\"" and begins_item:
            quote = letter if re.match(rf".*?(?<!\\){letter}\s*(,|$)", text[place + 1 :]) else ""
        elif letter in "([{":
            depth += balanced
        elif letter in ")]}":
            depth -= balanced
        elif letter == "," and depth == 0:
            items.append(text[start:place])
            start = place + 1
    stripped = [item.strip() for item in (*items, text[start:])]
    return [re.sub(rf"\\([\\{item[0]}])", r"\1", item[1:-1]) if _is_quoted(item) else item for item in stripped if item]


def missing_brackets(text: str) -> str:
    """Return the brackets that would close a list or mapping; empty if none is open, or if a quote is."""
    waiting: list[str] = []
    quote = ""
    for letter in text if text.startswith(("[", "{")) else "":
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{":
            waiting.append("]" if letter == "[" else "}")
        elif letter in "]}" and (not waiting or waiting.pop() != letter):
            return ""
    return "" if quote else "".join(reversed(waiting))


def exists(text: str) -> bool:
    """Return whether a text is the path of something that exists."""
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long for a path, or an unknown user's home
        return False


def path_values(config: Any) -> Iterator[tuple[str, str]]:
    """Yield the name and each value of every path key."""
    for name in (name for name, f in walk(type(config)).items() if f.metadata.get("path")):
        value = functools.reduce(getattr, name.split("."), config)
        for text in value if isinstance(value, list) else [value]:
            if text:
                yield name, text


def expand_home(config: Any) -> None:
    """Replace a leading `~` or `~user` in the value of every path key. Raises ConfigError for an unknown user."""
    for name, f in walk(type(config)).items():
        if not f.metadata.get("path"):
            continue
        owner = config
        *groups, last = name.split(".")
        for group in groups:
            owner = getattr(owner, group)
        value = getattr(owner, last)
        for text in value if isinstance(value, list) else [value or ""]:
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ConfigError(f"{name}={text!r} is not valid UTF-8; rename the file or folder")
        if isinstance(value, list):
            setattr(owner, last, [_home(name, text) for text in value])
        elif value is not None:
            setattr(owner, last, _home(name, value))


def _home(name: str, text: str) -> str:
    """Return a path with a leading `~` or `~user` replaced; another text as it is."""
    return str(home(f"{name}={text}", text)) if text.startswith("~") else text


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
        list[Any]: "a list such as [a,{b:{c:1}}]",
        dict[str, Any]: "a mapping such as {a: 0.7, b: 0.3}",
        list[list[int]]: "a list of pairs such as [[96,128],[400,480]]",
    }
    return words[kind] + (" or null" if optional else "")


def fits(kind: Any, value: Any) -> bool:
    """Return whether a parsed value is valid for a key of this type."""
    kind, optional = split_optional(kind)
    if value is None:
        return optional
    if typing.get_origin(kind) is list:
        (element,) = typing.get_args(kind)
        return isinstance(value, list) and all(element is Any or fits(element, item) for item in value)
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def misfit(kind: Any, value: Any) -> str:
    """Return in words what does not fit a key's type: a value's type, or that of the first wrong item of a list."""
    kind, _ = split_optional(kind)
    if typing.get_origin(kind) is list and isinstance(value, list):
        (element,) = typing.get_args(kind)
        for item in value:
            if not fits(element, item):
                return f"a list with {misfit(element, item)}" + ("" if item is None else f" ({item})")
    return kind_of(value)


def kind_of(value: Any) -> str:
    """Return the type of a parsed value in words."""
    if value is None:
        return "null"
    if isinstance(value, (list, dict)) and not value:
        return "an empty list" if isinstance(value, list) else "an empty mapping"
    names = {
        bool: "a boolean",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    if value in ("None", "none", "nil"):
        return f"the text {value} (no value is null)"
    return names.get(type(value), type(value).__name__)


def _is_quoted(text: str) -> bool:
    """Return whether a text is in single or double quotes."""
    return len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""


def is_sweep(text: str) -> bool:
    """Return whether a value looks like a sweep over several values."""
    return "," in text or text.startswith(SWEEPS)


def sweep_message(name: str, value: str, quotable: bool = False) -> str:
    """Return the message for several values in a command that takes one."""
    advice = f" (quote text that holds a comma: {name}=\"'...'\")" if quotable else ""
    return (
        f"{name}={value}: several values make a sweep, which only megatrain train and tune run, with --multirun; "
        f"give one value{advice}"
    )
