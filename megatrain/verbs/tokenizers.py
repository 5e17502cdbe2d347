"""`megatrain tokenizers`: compare tokenizers on text, as a table or as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatrain.config import TokenizersConfig
from megatrain.data.compare_tokenizers import Comparison, Group, compare, open_tokenizer
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_card import TrainedTokenizerCard
from megatrain.errors import ConfigError


def tokenizers(config: TokenizersConfig) -> None:
    """Print bytes of text per token for each tokenizer, by source and language: more means shorter sequences.

    Raises:
        ConfigError: a tokenizer or text does not exist, or no tokenizer is given.
        DataError: a tokenizer or file is damaged, or there is no text.
    """
    if not config.tokenizers:
        raise ConfigError("tokenizers: give some, as in tokenizers=[data/mine,gpt2/tokenizer.json,my.model]")
    opened = [open_tokenizer(path) for path in dict.fromkeys(config.tokenizers)]
    result = compare(config.path, opened, config.text_column, config.bytes_per_source, config.languages)
    about = {name: _about(name, tokenizer) for name, tokenizer in opened}
    if sys.stdout.isatty():
        Console().print(_table(result, [tokenizer.vocab_size for _, tokenizer in opened]))
        for name, known in about.items():
            print(_line(name, known))
    else:
        print(json.dumps({"tokenizers": about} | _plain(result)))


def _about(path: str, tokenizer: Tokenizer) -> dict[str, object]:
    """Return a tokenizer's kind and size, and from its card, if it was trained here, its rules and its sample."""
    about: dict[str, object] = {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
    }
    card = TrainedTokenizerCard.find(Path(path).expanduser())
    if card is None:
        return about
    trained_on = {name: source["num_bytes"] for name, source in card.sample["sources"].items()}
    return about | {"kind": card.kind, "rules": card.rules, "trained_on_bytes": trained_on}


def _line(name: str, about: dict[str, object]) -> str:
    """Return what is known of a tokenizer on one line."""
    words = [str(about["kind"])]
    for key in ("rules", "trained_on_bytes"):
        if isinstance(values := about.get(key), dict):
            words += [f"{what}={value}" for what, value in values.items() if value is not None]
    return f"{name}: {', '.join(words)}"


def _table(result: Comparison, sizes: list[int]) -> Table:
    table = Table(caption="bytes of text per token: more means shorter sequences", caption_justify="left")
    for name in ("source", "language"):
        table.add_column(name)
    for name in ("documents", "bytes"):
        table.add_column(name, justify="right")
    for name, size in zip(result.names, sizes, strict=True):
        table.add_column(f"{name}\n{size:,} ids", justify="right", overflow="fold")
    for group in (*result.groups, result.total):
        best = min(group.tokens)
        values = [
            f"[bold]{_rate(group, tokens)}[/]" if tokens == best else _rate(group, tokens) for tokens in group.tokens
        ]
        table.add_row(group.source, group.language, f"{group.documents:,}", f"{group.num_bytes:,}", *values)
    rates = [f"{result.total.num_bytes / 1e6 / max(seconds, 1e-9):.1f}" for seconds in result.seconds]
    table.add_row("MB/s", "", "", "", *rates)
    return table


def _rate(group: Group, tokens: int) -> str:
    return f"{group.num_bytes / max(tokens, 1):.3f}"


def _plain(result: Comparison) -> dict[str, object]:
    def values(group: Group) -> dict[str, object]:
        rates = {
            name: group.num_bytes / max(tokens, 1) for name, tokens in zip(result.names, group.tokens, strict=True)
        }
        return {
            "source": group.source,
            "language": group.language or None,
            "documents": group.documents,
            "bytes": group.num_bytes,
            "bytes_per_token": rates,
        }

    return {"groups": [values(group) for group in result.groups], "all": values(result.total)}
