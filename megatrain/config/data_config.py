"""`data.*`: the source of the text and the folder of the prepared dataset. Imports no torch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Any

from megatrain.config.key import key

CHAT_KINDS = ("chat", "pairs", "prompts")
"""Kinds of sources whose records a chat template lays out: conversations, preference pairs, prompts without replies."""


@dataclass
class DataConfig:
    """The source of the text and the folder of the prepared dataset."""

    name: str = key(MISSING, "dataset identity; the prepared dataset is the folder <data.dir>/<data.name>")
    dir: str = key("data", "folder of all prepared datasets", path=True)
    kind: str = key(
        "files",
        "kind of source",
        choices=("python_stdlib", "files", "code", *CHAT_KINDS, "huggingface", "megatron", "mixture", "demo", "toy"),
    )
    mixture: dict[str, Any] = key(
        {},
        "data=mixture: prepared datasets (names in data.dir, or paths) with their share of the samples; data=demo: its "
        "sources, which prepare makes too. A share is a weight "
        "{web: 0.7, code: 0.3}, or epochs {web: {epochs: 1}, code: {epochs: 4}}; max_epochs limits a weight: "
        "{code: {weight: 0.3, max_epochs: 4}}",
    )
    mixture_temperature: float | None = key(
        None,
        "take the weights from the sizes, as size^(1/temperature): 1 is proportional, more is closer to equal; "
        "data.mixture={web: null, code: null} then names the datasets alone",
        above=0,
        maximum=1e6,
    )
    phases: list[Any] = key(
        [],
        "later mixtures, in order, each from a step or a number of tokens on: [{from_step: 1000, mixture: {web: 0.5, "
        "code: 0.5}}] or {from_tokens: 1000000, mixture: ...}",
    )
    paths: list[str] = key(
        [],
        "files, folders or globs to read, each file by its suffix: text, JSON, Parquet, HTML, WARC, code, also "
        "compressed (the guide to your own data lists them); for data=megatron, path prefixes, or globs, folders or "
        "text files of them",
        path=True,
    )
    text_column: str = key(
        "text", "column or field with the text; content.text is the field text of the object content"
    )
    hf_path: str | None = key(None, "Hugging Face dataset: its name on the hub or a local folder", path=True)
    hf_config: str | None = key(None, "configuration of the Hugging Face dataset")
    hf_split: str = key("train", "split of the Hugging Face dataset")
    heldout_fraction: float = key(0.05, "fraction of the documents held out for evaluation", minimum=0, below=1)
    folds: int | None = key(
        None,
        "divide the documents into so many folds and hold out one, data.fold, in place of data.heldout_fraction; "
        "megatrain tune trains a run for each",
        minimum=2,
    )
    fold: int | None = key(None, "number of the fold to hold out, from 1", minimum=1)
    max_documents: int | None = key(None, "read at most this many documents; null reads all", minimum=1)
    join_comments: bool = key(
        False,
        "join comments that are lines or records of their own, with an id and a parent_id, into threads, file by file "
        "(JSON)",
    )
    max_thread_bytes: int = key(
        2 * 2**30, "with data.join_comments or data=chat: most memory for comments of a file, in bytes", minimum=1
    )
    max_document_bytes: int = key(64 * 2**20, "longest document or line to read, in bytes", minimum=1)
    oversized: str = key(
        "refuse", "what to do with a longer document: stop with an error, or skip it", choices=("refuse", "skip")
    )
    undecodable: str = key(
        "replace",
        "what to do with bytes that are not UTF-8: replace them, skip the document, or stop with an error",
        choices=("replace", "skip", "refuse"),
    )
    on_bad_record: str = key(
        "stop",
        "what to do with a record that is not JSON or has no text in its field: stop with an error, skip it, or skip "
        "it and write it to quarantine.jsonl in the dataset's folder",
        choices=("stop", "skip", "quarantine"),
    )
    max_bad_fraction: float = key(
        1.0, "largest fraction of the records that may be skipped as bad", minimum=0, maximum=1
    )
    chat_template: str | None = key(
        None,
        "data=chat, data=pairs, data=prompts: template for messages, a Jinja file, chatml, llama3 or minimal; null "
        "takes that of the tokenizer",
        path=True,
    )
    bos: bool = key(False, "begin each document with the tokenizer's BOS token")
    write_text: bool = key(
        False,
        "keep the cleaned corpus in the dataset's folder, as JSON lines: text/*.jsonl.zst has the documents with id, "
        "source and metadata, removed/*.jsonl.zst what was left out, by which step and why",
    )
    deduplicate: bool = key(True, "older name: false is clean.dedup=none")
    workers: int | None = key(
        None, "processes that read and tokenize; null means one for each core this process may use", minimum=1
    )
    fim_rate: float = key(
        0.0,
        "share of the training documents to rearrange for fill-in-the-middle: their prefix and suffix, then their "
        "middle, each after a marker",
        minimum=0,
        maximum=1,
    )
    fim_spm_rate: float = key(
        0.5, "share of the rearranged documents whose suffix comes before the prefix", minimum=0, maximum=1
    )
    fim_tokens: list[str] = key(
        ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"],
        "control tokens of the tokenizer that mark the prefix, the middle and the suffix",
    )
    overwrite: bool = key(False, "replace a finished dataset of the same name")
    packing: str = key(
        "concatenate",
        "what samples are made of: concatenate cuts the documents, one after another, into windows of train.seq_len; "
        "best_fit fills each window with whole documents and pads what is left, and cuts only longer ones",
        choices=("concatenate", "best_fit"),
    )
    verify: bool = key(
        True, "verify the hash of each 64 MiB block when it is first read, and again if the file changes"
    )
