"""`data.*`: where text comes from and where its prepared form lives. Imports no torch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from megatrain.config.key import key


@dataclass
class DataConfig:
    """Which text, and where its prepared form lives."""

    name: str = key(MISSING, "dataset identity; the prepared form lives in <data.dir>/<data.name>/")
    dir: str = key("data", "folder of all prepared datasets")
    kind: str = key("files", "where text comes from", choices=("python_stdlib", "files", "huggingface", "megatron"))
    paths: list[str] = key([], "globs that data=files reads: .txt, .md, .jsonl, .jsonl.gz, .jsonl.zst, .parquet")
    text_column: str = key("text", "column or field that holds the text in .jsonl, .parquet and Hugging Face data")
    hf_path: str | None = key(None, "Hugging Face dataset: a hub name or a local folder")
    hf_config: str | None = key(None, "configuration of the Hugging Face dataset")
    hf_split: str = key("train", "split of the Hugging Face dataset")
    heldout_fraction: float = key(0.05, "share of documents held out for evaluation", minimum=0, below=1)
    max_documents: int | None = key(None, "read at most this many documents; null reads all", minimum=1)
    max_document_bytes: int = key(64 * 2**20, "longest document or line taken, in bytes", minimum=1)
    oversized: str = key("refuse", "what a longer document gets", choices=("refuse", "skip"))
    undecodable: str = key("replace", "what bytes that are not UTF-8 get", choices=("replace", "skip", "refuse"))
    deduplicate: bool = key(True, "drop exact duplicates of a document (after normalisation)")
    workers: int | None = key(
        None, "processes that read and tokenize; null means the cores this process may use", minimum=1
    )
    overwrite: bool = key(False, "prepare again over a finished dataset of the same name")
    verify: bool = key(
        True, "check each 64 MiB block against the card's hash when it is first read, and when the file changed since"
    )
