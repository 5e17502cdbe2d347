"""Find and load a tokenizer: a saved folder, a SentencePiece model or a Hugging Face tokenizer.

No pickles, no remote code.
"""

from __future__ import annotations

from pathlib import Path

from megatrain.data.tokenizer import META, Tokenizer, saved_meta
from megatrain.data.tokenizer_hf import OWN_DEFINITION, find_hugging_face, read_folder
from megatrain.data.tokenizer_sentencepiece import SentencePieceTokenizer
from megatrain.errors import ConfigError, DataError


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a tokenizer that `save` wrote. Raises `DataError` if it is missing or damaged."""
    folder = Path(folder)
    if not (folder / META).is_file():
        raise DataError(f"{folder}: the saved tokenizer is missing (no {META}); copy it back, or make the folder again")
    meta = saved_meta(folder)
    kind, fingerprint = meta["kind"], meta["fingerprint"]
    definition = OWN_DEFINITION if (folder / OWN_DEFINITION).is_file() else "tokenizer.json"
    file = folder / (definition if kind == "hf" else "tokenizer.model")
    if not file.is_file():
        raise DataError(f"{file}: missing from a saved tokenizer; copy it back, or make the folder again")
    tokenizer = find_tokenizer(kind, str(file))
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"{folder}: the tokenizer's file is not the one that was saved (fingerprints differ)")
    tokenizer.starts_with_bos = bool(meta.get("starts_with_bos", False))
    if tokenizer.starts_with_bos and tokenizer.beginning_of_document is None:
        raise DataError(f"{folder / META}: documents begin with BOS, but the tokenizer beside it has none")
    return tokenizer


def find_tokenizer(kind: str, path: str) -> Tokenizer:
    """Load the tokenizer that `tokenizer.kind` and `tokenizer.path` name. A folder that megatrain wrote says its kind.

    Raises `ConfigError` if it does not exist, `DataError` if it cannot be used.
    """
    place = Path(path).expanduser()
    if (place / "tokenizer" / META).is_file():
        own = place / "tokenizer"
        raise ConfigError(f"tokenizer.path: {path} is the folder of a prepared dataset; its tokenizer is in {own}")
    if (place / META).is_file():
        kind = saved_meta(place)["kind"]
    if kind in ("hf", "byte_level_bpe"):
        return find_hugging_face(path)
    if place.is_dir() and (place / "tokenizer.model").is_file():
        place /= "tokenizer.model"
    if place.is_dir():
        other = "; for its tokenizer.json give tokenizer=hf" if (place / "tokenizer.json").is_file() else ""
        raise ConfigError(f"tokenizer.path: {path} has no tokenizer.model of SentencePiece{other}")
    if not place.is_file():
        raise ConfigError(f"tokenizer.path: {path} does not exist; give a SentencePiece .model file")
    return SentencePieceTokenizer(place.read_bytes(), str(place), read_folder(place.parent).chat_template())
