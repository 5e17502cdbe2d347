"""The control tokens and the chat template that a tokenizer is trained with, by `tokenizer.*`. Trains nothing."""

from __future__ import annotations

import re
from pathlib import Path

from megatrain.config import TokenizerConfig
from megatrain.errors import ConfigError

FIM_TOKENS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>")
"""Control tokens of fill-in-the-middle."""

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

_LLAMA3 = """\
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

_MINIMAL = """\
{%- set begin = {'system': '<|system|>', 'user': '<|user|>', 'assistant': '<|assistant|>'} %}
{%- for message in messages %}
{{- begin[message['role']] + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- begin['assistant'] }}
{%- endif %}
"""

CHAT_TEMPLATES = {"chatml": _CHATML, "llama3": _LLAMA3, "minimal": _MINIMAL}
"""Chat templates by name: how OpenAI's ChatML and Meta's Llama 3 lay out messages, without their system prompts.

`minimal` has one token before a message and one after it, for models so small that more tokens would matter.
"""

MARKER = re.compile(r"<\|[^|<>\s'\"{}]{1,64}\|>")
"""A control token as chat templates spell them."""
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # transformers' own tags
_LONGEST_NAME = 64


def chat_template(config: TokenizerConfig) -> str | None:
    """Return the chat template that `tokenizer.chat_template` names. Raises ConfigError if it is none."""
    return None if config.chat_template is None else named_template("tokenizer.chat_template", config.chat_template)


def named_template(key: str, given: str) -> str:
    """Return the chat template of a name or in a file, which `key` gives. Raises ConfigError if it is none."""
    if given in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[given]
    path = Path(given).expanduser()
    if not path.is_file():
        raise ConfigError(f"{key}={given}: no such file; give a Jinja file, or one of {', '.join(CHAT_TEMPLATES)}")
    try:
        template = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}={given}: not a text in UTF-8; give a Jinja file") from error
    _check_syntax(f"{key}={given}", template)
    if "messages" not in template:
        raise ConfigError(f"{key}={given}: does not use `messages`, so a chat would be lost in it")
    return template


def _check_syntax(place: str, template: str) -> None:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        environment.compile(_GENERATION.sub("", template))  # finds unknown filters too
    except RecursionError as error:
        raise ConfigError(f"{place}: not a Jinja template (nested too deeply)") from error
    except TemplateSyntaxError as error:
        raise ConfigError(f"{place}: not a Jinja template (line {error.lineno}: {error.message})") from error


def special_tokens(config: TokenizerConfig, first: list[str]) -> list[str]:
    """Return the names of all control tokens in the order of their ids: `first`, then those that the config asks for.

    The markers of the chat template are all of the form `<|name|>` in it. Raises ConfigError for a name that cannot be
    a control token.
    """
    markers = list(dict.fromkeys(MARKER.findall(chat_template(config) or "")))
    for name in markers:
        _check_name("tokenizer.chat_template", name)
    for name in config.special_tokens:
        _check_name("tokenizer.special_tokens", name)
    names = [
        *first,
        *(FIM_TOKENS if config.fim_tokens else ()),
        *markers,
        *config.special_tokens,
        *(f"<|reserved_{number}|>" for number in range(config.reserved_tokens)),
    ]
    if twice := {name for name in config.special_tokens if config.special_tokens.count(name) > 1}:
        raise ConfigError(f"tokenizer.special_tokens: {min(twice)} is given twice")
    return list(dict.fromkeys(names))


def _check_name(key: str, name: str) -> None:
    marked = len(name) >= 3 and not name[0].isalnum() and not name[-1].isalnum()
    plain = name.isprintable() and not re.search(r"[\s▁]", name)
    if not marked or not plain or re.fullmatch("<0x[0-9A-F]{2}>", name):
        raise ConfigError(
            f"{key}: {name!r} cannot be a control token; give names without spaces that begin and "
            "end with a mark, such as <|tool_call|> or [INST]"
        )
    if len(name) > _LONGEST_NAME:
        raise ConfigError(f"{key}: {name[:16]}... has more than {_LONGEST_NAME} characters")
