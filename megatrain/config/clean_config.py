"""`clean.*`: the cleaning recipe of a corpus. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatrain.config.key import key


@dataclass
class CleanConfig:
    """What is done to a document's text before it is deduplicated and tokenized."""

    name: str = key("none", "name of the recipe")
    steps: list[Any] = key(
        [],
        "cleaning steps in order, each a name, or a name with parameters: [{length: {min_characters: 200}}]; "
        "docs/reference/cleaning.md lists them",
    )
