"""`megatrain report <folder of datasets>`: the prepared datasets in a folder as the sources of one corpus, on one page.

Imports no torch. The page of a single dataset is in `dataset_page.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from megatrain.data.card import CARD, Card, check_dataset
from megatrain.data.mixture_settings import SAVED_MIXTURE
from megatrain.data.survey import sample_documents
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.report.dataset_page import SAMPLE_TOKENS, describe_sample, seed_of, tiles
from megatrain.report.page import DATASET_PAGE, write_page
from megatrain.report.sources import describe_packages, describe_sources

SAMPLES = 2
"""Random documents of each source on the page."""


def prepared_in(folder: Path) -> dict[str, Path]:
    """Return the prepared datasets that are directly in a folder, by name."""
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"[!.]*/{CARD}"))}


def report_corpus(folder: Path, out: Path | None = None) -> Path:
    """Write the page of the datasets in `folder` to `out` (default `<folder>/report.html`) and return its path.

    Raises `DataError` if a file is missing or damaged; checksums are not compared.
    """
    return write_page(DATASET_PAGE, collect_corpus(folder), out or folder / "report.html")


def collect_corpus(folder: Path) -> dict[str, Any]:
    """Return everything that the page shows, ready for JSON."""
    places = prepared_in(folder)
    cards = {name: check_dataset(place) for name, place in places.items()}
    samples = []
    for name, card in cards.items():
        tokenizer = load_tokenizer(places[name] / "tokenizer") if card.tokenizer else None
        for sample in sample_documents(places[name], card, SAMPLES, seed_of(card), SAMPLE_TOKENS):
            samples.append({"source": name, **describe_sample(sample, tokenizer)})
    settings = {name: {"source": card.source, "settings": card.config} for name, card in cards.items()}
    return {
        "name": folder.resolve().name,
        "fingerprint": f"{len(cards)} dataset{'s' * (len(cards) != 1)}",
        "notices": notices(cards),
        "tiles": total_tiles(cards),
        "sources": describe_sources(cards, _mixture(folder)),
        "packages": describe_packages(cards),
        "has_records": False,
        "funnel": [],
        "splits": [],
        "examples": [],
        "lengths": None,
        "counted": [],
        "tokens": None,
        "samples": samples,
        "sample_seed": seed_of(next(iter(cards.values()))),
        "near_duplicates": [],
        "config": yaml.safe_dump(settings, allow_unicode=True, sort_keys=False),
    }


def notices(cards: dict[str, Card]) -> list[str]:
    """Return what a reader must know before comparing the sources."""
    if len({card.tokenizer.fingerprint if card.tokenizer else None for card in cards.values()}) == 1:
        return []
    return ["The datasets have different tokenizers: their tokens cannot be compared, and they cannot be mixed."]


def total_tiles(cards: dict[str, Card]) -> list[dict[str, str]]:
    """Return the numbers at the top, of all datasets together."""
    splits = {f"{name} {split}": found for name, card in cards.items() for split, found in card.splits.items()}
    whole = Card("", "", splits, None)
    return [{"name": "sources", "value": str(len(cards)), "note": ""}, *tiles(whole, [])]


def _mixture(folder: Path) -> dict[str, float] | None:
    """Return the weights that the datasets are meant to be mixed with, None if the folder does not say."""
    try:
        weights = json.loads((folder / SAVED_MIXTURE).read_text(encoding="utf-8"))
        return {str(name): float(weight) for name, weight in weights.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
