"""`megatrain inspect` of what is no run: prepared datasets, tokenizers, and folders for transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatrain.checkpoint import lineage
from megatrain.config.plain import plain
from megatrain.data.card import Card
from megatrain.data.funnel import funnel
from megatrain.data.indexed_dataset import verify_dataset
from megatrain.data.packing_index import stored_packings, verify_packings
from megatrain.data.preparation_summary import words
from megatrain.data.survey import count_in_loss
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import ConfigError, DataError
from megatrain.report.dataset_page import sample_texts
from megatrain.verbs.printer import Printer, printable


def print_tokenizer(printer: Printer, folder: Path) -> None:
    """Print a tokenizer. Raises DataError if it is damaged."""
    tokenizer = load_tokenizer(folder)
    printer.title(f"tokenizer {folder}")
    printer.facts(tokenizer_facts(tokenizer))
    printer.facts({"verdict": "valid: its files match its fingerprint"})


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what a tokenizer is, with its control tokens by their ids."""
    start = tokenizer.beginning_of_document
    return {
        "kind": tokenizer.kind,
        "ids": f"{tokenizer.vocab_size:,}",
        "end of a document": f"id {tokenizer.end_of_document}",
        "beginning of a document": "none" if start is None else f"id {start}",
        "padding": None if tokenizer.padding is None else f"id {tokenizer.padding}",
        "fingerprint": tokenizer.fingerprint,
    }


def print_huggingface(printer: Printer, folder: Path) -> None:
    """Print a folder for transformers. Raises CheckpointError if its model is damaged or cannot be imported."""
    from megatrain.interop.load_model import load  # imports torch, which no other folder needs

    loaded = load(folder)
    printer.title(f"Hugging Face folder {folder}")
    config = loaded.config
    printer.facts(
        {
            "parameters": f"{sum(tensor.numel() for tensor in loaded.weights.values()):,}",
            "dtype": ", ".join(
                sorted({str(tensor.dtype).removeprefix("torch.") for tensor in loaded.weights.values()})
            ),
            "layers": config.num_layers,
            "width": config.hidden_size,
            "heads": config.num_heads,
            "key-value heads": config.kv_heads,
            "vocabulary": f"{config.vocab:,}",
            "longest sequence": f"{config.max_seq_len:,} tokens",
            "tokenizer": f"{loaded.tokenizer.kind}, {loaded.tokenizer.vocab_size:,} ids"
            if loaded.tokenizer
            else "none",
            "came from": " → ".join(f"{one.name} ({one.by})" for one in lineage.find_line(folder)) or None,
            "verdict": "complete: every tensor is there and finite; such folders have no checksums",
        }
    )


def print_gguf(printer: Printer, file: Path) -> None:
    """Print a file for llama.cpp, and where its model came from. Raises CheckpointError if it is none."""
    from megatrain.interop.gguf_file import describe_gguf  # imports torch, which no other folder needs

    facts, line = describe_gguf(file)
    printer.title(f"GGUF file {file}")
    printer.facts(facts)
    if line:
        printer.table("where it came from", lineage.COLUMNS, lineage.rows(line))


def print_dataset(printer: Printer, folder: Path, num_samples: int, seed: int) -> None:
    """Print a prepared dataset's card, verify every hash, and print random documents."""
    card = Card.load(folder)
    printer.title(f"dataset {folder}")
    printer.facts({"name": card.name, "fingerprint": card.fingerprint})
    rows = [
        [name, f"{s.documents:,}", f"{s.bytes:,}" if s.bytes is not None else "unknown", f"{s.tokens:,}", s.dtype]
        for name, s in card.splits.items()
    ]
    printer.table("splits", ("split", "documents", "bytes", "tokens", "dtype"), rows)
    try:
        in_loss = count_in_loss(folder, card)
    except DataError:  # the checksums below tell what is damaged
        in_loss = {}
    printer.table("tokens that count in the loss", ("split", "tokens", "share"), loss_rows(card, in_loss))
    if card.tokenizer:
        printer.table("tokenizer", ("key", "value"), [[k, plain(v)] for k, v in vars(card.tokenizer).items()])
    printer.table("from records to documents", FUNNEL_COLUMNS, funnel_rows(card))
    printer.table("source", ("key", "value"), source_rows(card))
    printer.table("packings", PACKING_COLUMNS, packing_rows(folder, card))
    try:
        verify_dataset(folder)
        verify_packings(folder)
    except (ConfigError, DataError) as error:
        printer.facts({"verdict": "damaged"})
        raise DataError(str(error)) from error
    if in_loss and num_samples:
        printer.line(printer.legend("What counts in the loss"))
    for headline, pieces in sample_texts(folder, card, num_samples, seed, SAMPLE_TOKENS):
        printer.title(headline)
        printer.marked([(printable(piece.text), piece.counts) for piece in pieces])
    printer.facts({"verdict": "valid: every checksum matches"})


def loss_rows(card: Card, in_loss: dict[str, int]) -> list[list[str]]:
    """Return a row for each split of conversations: how many of its tokens count in the loss."""
    return [[name, f"{count:,}", f"{count / max(card.splits[name].tokens, 1):.1%}"] for name, count in in_loss.items()]


def source_rows(card: Card) -> list[list[str]]:
    """Return a row for each field of a dataset's source, and for each count that is not zero."""
    counts = sorted(card.counts.items(), key=lambda item: (item[0] != "read", item[0]))
    return [
        *([words(name), plain(value)] for name, value in card.source.items()),
        *([words(name), f"{count:,}"] for name, count in counts if count),
    ]


PACKING_COLUMNS = ("split", "seq_len", "samples", "padding", "documents cut", "cut by concatenate")


def packing_rows(folder: Path, card: Card) -> list[list[str]]:
    """Return a row for each packing of a dataset that training has made: the shares of padding and of cut documents."""
    return [
        [
            packing.split,
            f"{packing.seq_len:,}",
            f"{packing.samples:,}",
            *(f"{packing.figures[name]:.4%}" for name in ("padding_share", "cut_share", "cut_share_of_windows")),
        ]
        for packing in stored_packings(folder)
        if packing.fingerprint == card.fingerprint
    ]


FUNNEL_COLUMNS = (
    "stage",
    "documents in",
    "removed",
    "documents left",
    "bytes left",
    "changed",
    "removed for",
    "counted",
)
SAMPLE_TOKENS = 150
"""Tokens printed of a random document at most."""


def funnel_rows(card: Card) -> list[list[str]]:
    """Return a row for each stage from the records that were read to the documents that are kept."""
    return [
        [
            stage.name if stage.is_step else words(stage.name),
            f"{stage.documents_in:,}",
            f"{stage.removed:,}",
            f"{stage.documents_out:,}",
            "" if stage.bytes_out is None else f"{stage.bytes_out:,}",
            f"{stage.changed:,}" if stage.is_step else "",
            largest(stage.reasons),
            largest(stage.changes),
        ]
        for stage in funnel(card)
    ]


def largest(counts: dict[str, int], limit: int = 5) -> str:
    """Return the largest counts as text, and how many others there are."""
    listed = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{words(name)} {count:,}" for name, count in listed[:limit]]
    return ", ".join([*shown, *([f"{len(listed) - limit} others"] if len(listed) > limit else [])])
