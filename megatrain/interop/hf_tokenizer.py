"""Export a saved tokenizer to a Hugging Face folder; a SentencePiece model becomes an equivalent tokenizer.json.

Our own tokenizers are in megatrain/data/.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatrain.data.tokenizer import META, SEGMENT
from megatrain.data.tokenizer_hf import MORE_TEMPLATES, OWN_DEFINITION, HuggingFaceTokenizer, read_folder
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import ConfigError, EnvironmentFault, how_to_install

SPACE = "▁"
"""The character that stands for a space in a SentencePiece piece."""


def export_tokenizer(tokenizer_dir: Path, out: Path, max_seq_len: int) -> None:
    """Copy a saved tokenizer to the folder `out`, in a form that `AutoTokenizer` loads.

    What it puts before a text is what `Tokenizer.start` gives. A Hugging Face tokenizer whose own definition adds
    something else gets another post-processor; its own definition lies beside it, for our verbs.

    Raises:
        ConfigError: `tokenizer_dir` is not a saved tokenizer, or tokenizer.json cannot express its SentencePiece model.
    """
    model = tokenizer_dir / "tokenizer.model"
    if not model.is_file() and not (tokenizer_dir / "tokenizer.json").is_file():
        raise ConfigError(f"{tokenizer_dir}: not a saved tokenizer; it has neither tokenizer.model nor tokenizer.json")
    for file in (*tokenizer_dir.iterdir(), *tokenizer_dir.glob(MORE_TEMPLATES)):
        if file.is_file():
            copy = out / file.relative_to(tokenizer_dir)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    saved = load_tokenizer(tokenizer_dir) if (tokenizer_dir / META).is_file() else None
    if model.is_file():
        fast_tokenizer(model, max_seq_len, saved is not None and saved.starts_with_bos).save_pretrained(
            out, save_jinja_files=False
        )
    elif isinstance(saved, HuggingFaceTokenizer):
        definition = saved.definition_for_transformers()
        own = next(out / name for name in (OWN_DEFINITION, "tokenizer.json") if (out / name).is_file())
        if definition != own.read_text(encoding="utf-8"):
            own.rename(out / OWN_DEFINITION)
            (out / "tokenizer.json").write_text(definition, encoding="utf-8")


def fast_tokenizer(model: Path, max_seq_len: int, starts_with_bos: bool = False) -> Any:
    """Return a `PreTrainedTokenizerFast` that gives the same ids as ours for a SentencePiece model, BPE or unigram.

    The model must use byte fallback. Pieces keep their ids, and `▁` in them becomes a plain space. A `▁` in the text
    then matches no piece and falls back to its three bytes, as in our tokenizer. Text is split as in ours: around `▁`
    and into segments of at most `SEGMENT` characters. Control pieces in the text are treated as text
    (`split_special_tokens`), unless it has a chat template, whose markers transformers finds in text. With
    `starts_with_bos` it puts BOS before a text.
    """
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise EnvironmentFault(f"Hugging Face folders need transformers: {how_to_install('hf')}") from error
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [processor.id_to_piece(i).replace(SPACE, " ") for i in range(processor.vocab_size())]
    unknown = pieces[processor.unk_id()]
    backend = Tokenizer(_model(processor, pieces, model))
    # `segments` of megatrain/data/tokenizer.py as a pattern: all that is left, or up to the last newline, or a full one
    cut = rf"[\s\S]{{1,{SEGMENT}}}\z|[\s\S]{{0,{SEGMENT - 1}}}\n|[\s\S]{{{SEGMENT}}}"
    around = pre_tokenizers.Split(SPACE, "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([around, pre_tokenizers.Split(Regex(cut), "isolated")])
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    controls = [piece for i, piece in enumerate(pieces) if processor.is_control(i)]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in controls])
    template = read_folder(model.parent).chat_template()
    named = {"bos_token": processor.bos_id(), "pad_token": processor.pad_id()}
    special = {name: pieces[i] for name, i in named.items() if i >= 0}
    if starts_with_bos:
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, processor.bos_id())]
        )
        special["add_bos_token"] = True
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=pieces[processor.eos_id()],
        unk_token=unknown,
        **special,
        model_max_length=max_seq_len,
        clean_up_tokenization_spaces=False,
        split_special_tokens=template is None,
        chat_template=template,
    )
    _check_equal(processor, fast, model)
    return fast


def _model(processor: Any, pieces: list[str], path: Path) -> Any:
    """Return the library's model with these pieces, by id. Raises `ConfigError` unless it is BPE or unigram."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import models

    content = sentencepiece_model_pb2.ModelProto()
    content.ParseFromString(processor.serialized_model_proto())
    kinds = sentencepiece_model_pb2.TrainerSpec
    if content.trainer_spec.model_type == kinds.UNIGRAM:
        return models.Unigram(_scores(processor, pieces), processor.unk_id(), byte_fallback=True)
    if content.trainer_spec.model_type != kinds.BPE:
        raise ConfigError(f"{path}: neither BPE nor unigram; its tokenizer cannot be exported to Hugging Face")
    ranks = {pieces[i]: rank for i, rank in _merge_order(processor, path).items()}
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return models.BPE(vocab, _merges(ranks), unk_token=pieces[processor.unk_id()], byte_fallback=True)


def _is_plain(processor: Any, i: int) -> bool:
    """Return whether text may become a piece by its letters."""
    return not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) or processor.is_unused(i))


def _scores(processor: Any, pieces: list[str]) -> list[tuple[str, float]]:
    """Return each piece with its score, in fp64.

    The library finds names of bytes and control pieces in text too, so their scores are lower than that of any other
    way to write them, letter by letter.
    """
    scores = [processor.get_score(i) for i in range(len(pieces))]
    plain = [_is_plain(processor, i) for i in range(len(pieces))]
    least = min(score for score, is_plain in zip(scores, plain, strict=True) if is_plain)
    never = least * (2 + max(len(piece) for piece, is_plain in zip(pieces, plain, strict=True) if not is_plain))
    return [(piece, score if is_plain else never) for piece, score, is_plain in zip(pieces, scores, plain, strict=True)]


def _merge_order(processor: Any, model: Path) -> dict[int, int]:
    """Return each mergeable piece's rank in merge order, by piece id. A BPE model scores these 0, -1, -2, …"""
    ranks: dict[int, int] = {}
    for i in range(processor.vocab_size()):
        if _is_plain(processor, i):
            if processor.get_score(i) != -len(ranks):
                raise ConfigError(f"{model}: not a plain BPE model; its tokenizer cannot be exported to Hugging Face")
            ranks[i] = len(ranks)
    return ranks


def _merges(ranks: dict[str, int]) -> list[tuple[str, str]]:
    """Return every pair of pieces that merges into a piece, in merge order."""
    merges = []
    for piece in sorted(ranks, key=ranks.__getitem__):
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = [(left, right) for left, right in splits if left in ranks and right in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _check_equal(processor: Any, fast: Any, path: Path) -> None:
    """Raise `ConfigError` unless both tokenizers encode the spelling of every piece in the same way."""
    for i in range(processor.vocab_size()):
        text = processor.id_to_piece(i).replace(SPACE, " ")
        if processor.encode(text) != fast.encode(text, add_special_tokens=False, split_special_tokens=True):
            raise ConfigError(f"{path}: tokenizer.json would encode {text!r} differently, so it cannot be exported")
