"""Tokenizers of exported folders: transformers' AutoTokenizer gives the ids and texts that ours gives."""

import io
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatrain.config import ModelConfig, TokenizerConfig
from megatrain.data.tokenizer import SEGMENT
from megatrain.data.tokenizer_hf import HuggingFaceTokenizer
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.data.train_sentencepiece import train_sentencepiece
from megatrain.errors import ConfigError
from megatrain.interop.hf_tokenizer import export_tokenizer, fast_tokenizer
from megatrain.interop.huggingface import export_model
from megatrain.model.init import build_model
from megatrain.model.sampling import generate


def stdlib_texts() -> list[str]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(iter(stdlib_texts()[:40]), TokenizerConfig(vocab_size=1500)).save(folder)
    return folder


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_tokenizer(trained, folder, max_seq_len=10**6)
    return folder


def test_real_text_gets_the_same_ids_and_comes_back(trained, exported):
    """Whole files of the standard library, most of them not in the training text, many longer than a segment."""
    ours, theirs = load_tokenizer(trained), AutoTokenizer.from_pretrained(exported)
    texts = stdlib_texts()[20:100]
    assert sum(len(text) > 3 * SEGMENT for text in texts) > 10
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  leading,   inner and trailing   ",
        "\t\r\n\n \n",
        "a ▁ b▁▁c",
        "</s><unk><0x41> <s>",
        "naïve \ufb01 \uff21 \U0001f600 العربية 中文 \u0000\u200b",
        " " * (2 * SEGMENT + 3),
        "x" * SEGMENT + "\n" + " " * 9,
        "\n" + "ab " * SEGMENT,
        ("y" * 100 + "\n    ") * 200 + "▁" + ("    \n" * SEGMENT),
        "=" * 1001,
    ],
)
def test_strange_text_gets_the_same_ids_and_comes_back(trained, exported, text):
    ours, theirs = load_tokenizer(trained), AutoTokenizer.from_pretrained(exported)
    ids = ours.encode(text)
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids) == text


def test_the_end_of_document_is_the_end_of_sequence_and_never_read_from_text(trained, exported):
    ours, theirs = load_tokenizer(trained), AutoTokenizer.from_pretrained(exported)
    assert theirs.eos_token_id == ours.end_of_document
    assert ours.end_of_document not in theirs(theirs.eos_token).input_ids
    assert theirs.decode([ours.end_of_document], skip_special_tokens=True) == ""
    assert len(theirs) == ours.vocab_size


def test_our_own_verbs_read_the_exported_folder_too(trained, exported):
    assert load_tokenizer(exported).fingerprint == load_tokenizer(trained).fingerprint


def train(model_type: str) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stdlib_texts()[0].splitlines()),
        model_writer=model,
        model_type=model_type,
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
    )
    return model.getvalue()


def test_a_model_that_tokenizer_json_cannot_express_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train("char"))
    with pytest.raises(ConfigError, match="neither BPE nor unigram"):
        fast_tokenizer(tmp_path / "tokenizer.model", 64)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_model_that_normalises_is_refused(tmp_path, model_type):
    """SentencePiece's defaults put a space before the text: tokenizer.json would be another tokenizer."""
    (tmp_path / "tokenizer.model").write_bytes(train(model_type))
    with pytest.raises(ConfigError, match="differently"):
        fast_tokenizer(tmp_path / "tokenizer.model", 64)


def test_a_hugging_face_tokenizer_goes_along_with_the_model(tmp_path):
    """A byte-level BPE saved by the data room, exported with a Llama, encodes as it did."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    byte_level.train_from_iterator(stdlib_texts()[:3], trainer)
    ours = HuggingFaceTokenizer(byte_level.to_str(), None, "test")
    ours.save(tmp_path / "tokenizer")
    config = ModelConfig(num_heads=2, hidden_size=16, vocab_size=ours.vocab_size)
    weights = {name: p.detach() for name, p in build_model(config, seed=1).named_parameters()}
    export_model(config, weights, tmp_path / "hf", tokenizer_dir=tmp_path / "tokenizer", end_of_document=0)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = stdlib_texts()[5]
    assert theirs(text).input_ids == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.end_of_document == 0


def test_text_in_text_out_through_transformers_alone(trained, tmp_path):
    """The exported folder is enough for `pipeline`: tokenizer, model and the end of generation."""
    from transformers import pipeline

    tokenizer = load_tokenizer(trained)
    config = ModelConfig(num_heads=2, hidden_size=16, vocab_size=tokenizer.vocab_size)
    model = build_model(config, seed=1)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    end = tokenizer.end_of_document
    export_model(config, weights, tmp_path / "hf", tokenizer_dir=trained, end_of_document=end)
    write = pipeline("text-generation", model=str(tmp_path / "hf"))
    written = write("def f(", max_new_tokens=8, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    prompt = tokenizer.encode("def f(")
    drawn = list(generate(model, prompt, max_new_tokens=8, temperature=0, stop_ids=[end]))
    assert written in (prompt + drawn, [*prompt, *drawn, end])
    assert write.tokenizer("▁</s>  x").input_ids == tokenizer.encode("▁</s>  x")
