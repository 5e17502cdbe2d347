"""The sources of a corpus or a mixture by name, for pages: how much there is of each, was asked for, and was read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatrain.config import DataConfig
from megatrain.config.data_config import CHAT_KINDS
from megatrain.data.card import Card
from megatrain.data.mixed_dataset import place_of
from megatrain.data.mixture_settings import MIXED, read_phases
from megatrain.errors import MegatrainError


def describe_sources(
    cards: Mapping[str, Card | None],
    targets: Mapping[str, float] | None = None,
    seen: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Return a row for each source: sizes, share of all tokens, share of the mixture, and what a run read of it.

    `targets` are weights of any sum. `seen` is what the event `mixture` of a run has of each source. What is unknown is
    None, as are the sizes of a source whose dataset is not there (its card is None).
    """
    tokens = {name: _sum(card, "tokens") if card else None for name, card in cards.items()}
    whole, weights = sum(filter(None, tokens.values())), sum((targets or {}).values())
    rows = []
    for name, card in cards.items():
        held = card.splits["heldout"].tokens if card and "heldout" in card.splits else None
        read = seen.get(name, {}) if seen else {}
        count = tokens[name]
        rows.append(
            {
                "name": name,
                "documents": _sum(card, "documents") if card else None,
                "bytes": _sum(card, "bytes") if card else None,
                "tokens": count,
                "heldout": held,
                "share": count / whole if whole and count is not None else None,
                "target": targets.get(name, 0) / weights if targets and weights else None,
                "read": read.get("share"),
                "epochs": read.get("epochs"),
            }
        )
    return rows


def _sum(card: Card, what: str) -> int | None:
    """Return the sum over a dataset's splits, None if it is not known of one."""
    values = [getattr(split, what) for split in card.splits.values()]
    return None if None in values else sum(values)


def last_read(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a mixture's run had read of each source when it last said so; empty if it never did."""
    said = (event for event in reversed(events) if event.get("kind") in ("evaluate", "mixture"))
    return next((event["sources"] for event in said if isinstance(event.get("sources"), dict)), {})


def sources_of_run(config: Mapping[str, Any], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a run's mixture; none if it has none or its config does not say where the sources are.

    The target is the mixture at the last recorded step.
    """
    seen = last_read(events)
    cards, first = _mixture(config.get("data"))
    targets = {name: found["weight"] for name, found in seen.items() if isinstance(found.get("weight"), (int, float))}
    return describe_sources(cards, targets or first, seen)


def reads_conversations(config: Mapping[str, Any]) -> bool:
    """Return whether a run reads conversations, so that only some of its tokens count in the loss."""
    data = config.get("data")
    if not isinstance(data, dict):
        return False
    cards = [*_mixture(data)[0].values(), _card(Path(str(data.get("dir"))) / str(data.get("name")))]
    return data.get("kind") in CHAT_KINDS or any(
        split.loss_hashes for card in cards if card for split in card.splits.values()
    )


def _mixture(data: Any) -> tuple[dict[str, Card | None], dict[str, float]]:
    """Return the cards of a mixture's sources, and the weights that it begins with; empty if it is none."""
    if not isinstance(data, dict) or data.get("kind") not in MIXED:
        return {}, {}
    known = {
        key: data[key] for key in ("name", "dir", "kind", "mixture", "mixture_temperature", "phases") if key in data
    }
    try:
        settings = DataConfig(**known)
        phases = read_phases(settings)
        places = {name: place_of(settings, source) for phase in phases for name, source in phase.sources.items()}
    except (MegatrainError, TypeError, AttributeError):  # a config that was edited by hand
        return {}, {}
    first = {name: float(source.weight) for name, source in phases[0].sources.items() if source.weight is not None}
    return {name: _card(place) for name, place in sorted(places.items())}, first


def _card(folder: Path) -> Card | None:
    try:
        return Card.load(folder)
    except (MegatrainError, OSError):
        return None


def describe_packages(sources: Mapping[str, Card]) -> list[list[str]]:
    """Return a row for each package that sources were made of: name and version, registry, licence, the sources."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, card in sources.items():
        packages = card.source.get("packages")
        for package in packages if isinstance(packages, list) else []:
            if isinstance(package, dict):
                title = f"{package.get('name')} {package.get('version')}"
                key = (title, str(package.get("registry")), str(package.get("license")))
                found.setdefault(key, []).append(name)
    return [[*key, ", ".join(dict.fromkeys(names))] for key, names in sorted(found.items())]
