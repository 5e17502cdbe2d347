"""`megatrain tokenizers` counts bytes per token by source and language, for any kind of tokenizer and of text."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatrain.config import DataConfig, PrepareConfig, TokenizerConfig, TokenizersConfig
from megatrain.data import compare_tokenizers
from megatrain.data.compare_tokenizers import Comparison, Group
from megatrain.data.corpus.decoding import decode
from megatrain.data.preparation import prepare
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import ConfigError, DataError
from megatrain.verbs.tokenizers import _table, tokenizers

ENGLISH = "The old man went to the market and bought some bread, because his family was hungry that day. " * 4
CHINESE = "今天天气很好，我们一起去公园散步，看到很多孩子在湖边放风筝，老人们在树下下棋聊天。" * 8


@pytest.fixture
def bytes_tokenizer(tmp_path):
    """A byte-level tokenizer without merges: one token per byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate([*letters, "<|endoftext|>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "bytes").mkdir()
    tokenizer.save(str(tmp_path / "bytes" / "tokenizer.json"))
    return tmp_path / "bytes" / "tokenizer.json"


@pytest.fixture
def corpus(tmp_path):
    for name, text in (("web/a.txt", ENGLISH), ("web/b.txt", ENGLISH + "x"), ("zh/c.txt", CHINESE), ("d.md", "short")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    (tmp_path / "in" / "e.jsonl").write_text(json.dumps({"text": "a line"}) + "\n{bad\n")
    return tmp_path / "in"


@pytest.fixture
def dataset(tmp_path, corpus):
    data = DataConfig(
        name="d", dir=str(tmp_path), kind="files", paths=[str(corpus)], workers=1, on_bad_record="skip",
        heldout_fraction=0.4,
    )  # fmt: skip
    return prepare(PrepareConfig(data=data, tokenizer=TokenizerConfig(vocab_size=400)))


def compared(capsys, path, *given, **also):
    capsys.readouterr()
    tokenizers(TokenizersConfig(path=str(path), tokenizers=[str(tokenizer) for tokenizer in given], **also))
    return json.loads(capsys.readouterr().out)


def test_bytes_per_token_by_source_and_language(capsys, corpus, dataset, bytes_tokenizer):
    found = compared(capsys, corpus, bytes_tokenizer, dataset)
    groups = {(group["source"], group["language"]): group for group in found["groups"]}
    assert set(groups) == {("web", "en"), ("zh", "zh"), ("md", None), ("jsonl", None)}
    web = groups["web", "en"]
    assert (web["documents"], web["bytes"]) == (2, 2 * len(ENGLISH.rstrip()) + 3)
    assert all(group["bytes_per_token"][str(bytes_tokenizer)] == 1 for group in groups.values())
    ours = load_tokenizer(dataset / "tokenizer")
    tokens = len(ours.encode(CHINESE))
    assert groups["zh", "zh"]["bytes_per_token"][str(dataset)] == len(CHINESE.encode()) / tokens
    assert found["all"]["documents"] == 5
    assert found["all"]["bytes"] == sum(group["bytes"] for group in groups.values())


def test_a_prepared_dataset_is_decoded(capsys, dataset, bytes_tokenizer):
    found = compared(capsys, dataset, bytes_tokenizer, languages=False)
    assert {group["source"] for group in found["groups"]} == {"train", "heldout"}
    assert found["all"]["documents"] == 5 and found["all"]["bytes_per_token"] == {str(bytes_tokenizer): 1}


def test_only_so_much_of_each_source_is_encoded(capsys, corpus, bytes_tokenizer):
    found = compared(capsys, corpus, bytes_tokenizer, bytes_per_source=10)
    assert {group["source"]: group["documents"] for group in found["groups"]} == {
        "web": 1,
        "zh": 1,
        "md": 1,
        "jsonl": 1,
    }


def test_a_file_is_read_no_further_once_its_source_is_full(capsys, tmp_path, bytes_tokenizer, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        compare_tokenizers, "decode", lambda record, policy: decoded.append(record.where) or decode(record, policy)
    )
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text((json.dumps({"text": "a line"}) + "\n") * 9)
    (tmp_path / "in" / "b.txt").write_text("a text")
    (tmp_path / "in" / "c.txt").write_text("another")
    found = compared(capsys, tmp_path / "in", bytes_tokenizer, bytes_per_source=5)
    assert found["all"]["documents"] == len(decoded) == 2


def test_code_with_a_licence_file_is_read_as_other_files(capsys, tmp_path, bytes_tokenizer):
    (tmp_path / "in").mkdir()
    for name in ("a.py", "b.py", "LICENSE"):
        (tmp_path / "in" / name).write_text("a text")
    assert compared(capsys, tmp_path / "in", bytes_tokenizer)["all"]["documents"] == 2


def test_texts_of_no_tokens_are_shown(capsys):
    group = Group("md", "", 1, 5, [0, 0])
    table = _table(Comparison(["a", "b"], [group], group, [0.1, 0.1]), [7, 8])
    assert table.row_count == 3


@pytest.mark.parametrize(
    "path, given, error, message",
    [
        ("in", [], ConfigError, r"tokenizers: give some"),
        ("in", ["nothing/here/x"], ConfigError, r"tokenizers: nothing/here/x is not a Hugging Face tokenizer"),
        ("gone", ["bytes/tokenizer.json"], ConfigError, r"path: .*gone.* does not exist"),
        ("empty.txt", ["bytes/tokenizer.json"], DataError, r"empty.txt: there is no text to compare tokenizers on"),
    ],
)
def test_what_is_missing_is_named(tmp_path, corpus, bytes_tokenizer, path, given, error, message):
    (tmp_path / "empty.txt").write_text("")
    found = [str(tmp_path / name) if (tmp_path / name).exists() else name for name in given]
    with pytest.raises(error, match=message):
        tokenizers(TokenizersConfig(path=str(tmp_path / path), tokenizers=found))
