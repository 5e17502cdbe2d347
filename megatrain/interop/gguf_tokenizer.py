"""The tokenizer in a GGUF file: a SentencePiece BPE model, or a byte-level BPE tokenizer of Hugging Face."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {"llama-bpe": rf"{_WORDS}\p{{N}}{{1,3}}{_REST}", "qwen2": rf"{_WORDS}\p{{N}}{_REST}"}
"""How llama.cpp splits text before it merges bytes, by its names; `gpt-2` is how a byte-level pre-tokenizer does."""


def add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab: int, ends: list[int]) -> None:
    """Write a tokenizer's tokens, their kinds, its template and its special tokens.

    Raises:
        ConfigError: llama.cpp would encode text in another way.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        if (model := Path(folder) / "tokenizer.model").is_file():
            _add_sentencepiece(writer, model, vocab)
        else:
            _add_byte_level(writer, Path(folder) / "tokenizer.json", vocab)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(tokenizer.starts_with_bos)
    end = ends[0] if ends else tokenizer.end_of_document
    writer.add_eos_token_id(end)
    if tokenizer.end_of_document != end:
        writer.add_eot_token_id(tokenizer.end_of_document)
    if tokenizer.beginning_of_document is not None:
        writer.add_bos_token_id(tokenizer.beginning_of_document)
    if tokenizer.padding is not None:
        writer.add_pad_token_id(tokenizer.padding)
    if (template := tokenizer.chat_template()) is not None:
        writer.add_chat_template(template)


def _add_sentencepiece(writer: Any, path: Path, vocab: int) -> None:
    import gguf
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    content = sentencepiece_model_pb2.ModelProto()
    content.ParseFromString(processor.serialized_model_proto())
    if content.trainer_spec.model_type != sentencepiece_model_pb2.TrainerSpec.BPE:
        raise ConfigError("to=gguf: the tokenizer is a SentencePiece model, but not BPE; only those can be written")
    kinds = gguf.TokenType
    types = []
    for i in range(processor.vocab_size()):
        special = kinds.CONTROL if processor.is_control(i) else kinds.UNKNOWN if processor.is_unknown(i) else None
        types.append(special or (kinds.BYTE if processor.is_byte(i) else kinds.NORMAL))
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    scores = [processor.get_score(i) for i in range(processor.vocab_size())]
    unused = range(len(pieces), vocab)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*pieces, *(f"<|unused_{i}|>" for i in unused)])
    writer.add_token_scores([*scores, *(-1e6 for _ in unused)])
    writer.add_token_types([*types, *(kinds.UNUSED for _ in unused)])
    writer.add_unk_token_id(processor.unk_id())


def _add_byte_level(writer: Any, path: Path, vocab: int) -> None:
    import gguf

    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ConfigError(
            f"to=gguf: the tokenizer is {model.get('type')}, not byte-level BPE; only that can be written"
        )
    tokens = {index: token for token, index in model["vocab"].items()}
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    tokens |= {index: token["content"] for index, token in added.items()}
    kinds = gguf.TokenType
    words = [tokens.get(i, f"<|unused_{i}|>") for i in range(vocab)]
    types = [
        kinds.UNUSED
        if i not in tokens
        else kinds.CONTROL
        if added.get(i, {}).get("special")
        else kinds.NORMAL
        if i not in added
        else kinds.USER_DEFINED
        for i in range(vocab)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(content.get("pre_tokenizer")))
    writer.add_token_list(words)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]])


def _pre_tokenizer(found: dict[str, Any] | None) -> str:
    """Return llama.cpp's name of a pre-tokenizer. Raises ConfigError if it has none that splits in the same way."""
    steps = (found or {}).get("pretokenizers", [found or {}])
    if len(steps) == 1 and steps[0].get("type") == "ByteLevel" and steps[0].get("use_regex", True):
        return "gpt-2"
    pattern = steps[0].get("pattern", {}).get("Regex")
    name = next((name for name, known in PATTERNS.items() if known == pattern), None)
    if name is None:
        raise ConfigError(
            f"to=gguf: the tokenizer splits text by {pattern!r}, which llama.cpp does not know; it knows those of "
            f"gpt-2, {', '.join(PATTERNS)}"
        )
    return name
