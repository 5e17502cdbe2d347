"""The chat page: one document of the files in assets/, which loads nothing and talks to its own server only."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files


def chat_page(model: str, max_new_tokens: int, has_template: bool) -> tuple[str, str]:
    """Return the page and its content security policy."""
    data = json.dumps({"model": model, "maxNewTokens": max_new_tokens, "hasTemplate": has_template})
    data = data.replace("<", "\\u003c")  # no name can end the element
    style, script = _asset("chat.css"), _asset("chat.js")
    text = _asset("chat.html")
    for name, value in (("style", style), ("script", script), ("data", data)):
        text = text.replace(f"{{{{{name}}}}}", value)
    policy = (
        f"default-src 'none'; connect-src 'self'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


@cache
def _asset(name: str) -> str:
    return (files("megatrain.inference") / "assets" / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
