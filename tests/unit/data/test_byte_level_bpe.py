"""tiktoken's engine gives the ids of the library tokenizers, or leaves the text to it, or is not used."""

import json
import random
import re
import sys
import sysconfig
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatrain.config import DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data import byte_level_bpe
from megatrain.data.byte_level_bpe import ByteLevelBpe
from megatrain.data.corpus import encoding
from megatrain.data.preparation import prepare
from megatrain.data.tokenizer_hf import HuggingFaceTokenizer

SOURCES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
END = "<|endoftext|>"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


@pytest.fixture(scope="module", params=SPLITS)
def definition(request):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = SPLITS[request.param]
    tokenizer.decoder = decoders.ByteLevel()
    texts = [path.read_text(errors="replace") for path in SOURCES] + ["中文文本，你好世界。" * 50]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


HARD = [
    "",
    END,
    f"a{END}b {END}",
    "I'LL we'd 12345  x\n\n \t y\r\n",
    "naïve ﬁ ﷺ 👩‍👩‍👧 e\u0301\u0300",
    "你好，世界。１２３ かな",
    "\u00a0\u2003 \u200b\ufeff",
    "a" * 3000 + " " * 3000 + "\n" * 500,
]


def test_its_ids_are_those_of_the_library(definition):
    """Every character that Unicode assigns; then real, hard and random texts."""
    tokenizer = HuggingFaceTokenizer(definition, END, "made")
    encode = tokenizer.bulk_encoder()
    characters = [
        chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) not in ("Cs", "Cn")
    ]
    for at in range(0, len(characters), 4096):
        text = " ".join(characters[at : at + 4096])
        assert encode(text).tolist() == tokenizer.encode(text), hex(at)
    chosen = random.Random(1)
    letters = [chr(code) for code in (*range(32, 0x600), *range(0x4E00, 0x4E40), *range(0x1F600, 0x1F620))]
    made = ["".join(chosen.choices(letters, k=200)) for _ in range(200)]
    for text in [*HARD, *made, *(path.read_text(errors="replace") for path in SOURCES)]:
        assert encode(text).tolist() == tokenizer.encode(text), text[:100]


def test_long_text_is_cut_as_the_library_cuts_it(definition, monkeypatch):
    monkeypatch.setattr("megatrain.data.tokenizer_hf._HF_SEGMENT", 100)
    tokenizer = HuggingFaceTokenizer(definition, END, "made")
    text = SOURCES[3].read_text()
    assert tokenizer.bulk_encoder()(text).tolist() == tokenizer.encode(text)


def test_characters_that_are_cut_differently_are_left_to_the_library(definition):
    """A library of another Unicode version might take some letter for none; here it is w."""
    tokenizer = HuggingFaceTokenizer(definition, END, "made")

    def other(text):
        return [number for part in re.split("(w)", text) for number in tokenizer.encode(part)]

    engine = ByteLevelBpe(definition, other)
    assert engine("a cafe") is not None and engine("a wall") is None


def test_other_differences_are_found(definition):
    tokenizer = HuggingFaceTokenizer(definition, END, "made")

    def other(text):
        return tokenizer.encode(text.replace("self", "selfs"))

    with pytest.raises(ValueError, match="is encoded differently"):
        ByteLevelBpe(definition, other)


def test_an_added_token_of_ordinary_text_is_left_to_the_library(definition):
    changed = Tokenizer.from_str(definition)
    changed.add_tokens(["def run"])
    tokenizer = HuggingFaceTokenizer(changed.to_str(), END, "made")
    encode = tokenizer.bulk_encoder()
    text = "    def run(self):"
    assert encode(text).tolist() == tokenizer.encode(text)
    assert changed.token_to_id("def run") in encode(text)


def changes():
    def with_normaliser(tokenizer, content):
        tokenizer.normalizer = normalizers.Lowercase()

    def with_prefix_space(tokenizer, content):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)

    def with_digits_apart(tokenizer, content):
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), SPLITS["gpt2"]])

    def reordered(tokenizer, content):
        merges = content["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]

    def with_unknown(tokenizer, content):
        content["model"]["unk_token"] = END

    def without_a_byte(tokenizer, content):
        del content["model"]["vocab"]["ÿ"]

    def with_a_word_that_no_merge_makes(tokenizer, content):
        content["model"] |= {"ignore_merges": True, "vocab": content["model"]["vocab"] | {"zzyzx": 99999}}

    return [
        with_a_word_that_no_merge_makes,
        with_normaliser,
        with_prefix_space,
        with_digits_apart,
        reordered,
        with_unknown,
        without_a_byte,
    ]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_another_kind_of_tokenizer_is_not_tried(definition, change):
    tokenizer = Tokenizer.from_str(definition)
    change(tokenizer, {"model": {"merges": [0, 0], "vocab": {"ÿ": 0}}})
    content = json.loads(tokenizer.to_str())
    change(tokenizer, content)
    with pytest.raises(ValueError):
        ByteLevelBpe(json.dumps(content), tokenizer.encode)


def test_prepare_writes_the_same_ids_with_it(definition, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for path in SOURCES[:20]:
        (tmp_path / "in" / f"{path.stem}.txt").write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text(definition)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))

    def prepared(name):
        data = DataConfig(name=name, dir=str(tmp_path / "out"), kind="files", paths=[str(tmp_path / "in")], workers=1)
        given = TokenizerConfig(kind="hf", path=str(tmp_path / "tokenizer.json"))
        return (prepare(PrepareConfig(data=data, tokenizer=given)) / "train.bin").read_bytes()

    calls = []
    original = ByteLevelBpe.__call__
    monkeypatch.setattr(ByteLevelBpe, "__call__", lambda self, text: calls.append(text) or original(self, text))
    fast = prepared("fast")
    assert len(calls) == 2000 + 20 and len(np.frombuffer(fast, np.uint16)) > 1000

    def unfit(content, model):
        raise ValueError("not today")

    monkeypatch.setattr(byte_level_bpe, "_check", unfit)
    encoding._load.cache_clear()
    assert prepared("slow") == fast
