"""Text stays text: no spelling of a control token in a document becomes its id, whatever a tokenizer.json says."""

import json
import re

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from megatrain.config import DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import Card
from megatrain.data.control_tokens import spellings
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.preparation import prepare
from megatrain.data.tokenizer_hf import HuggingFaceTokenizer
from megatrain.data.tokenizer_loading import find_tokenizer, load_tokenizer
from megatrain.errors import ConfigError, DataError
from megatrain.verbs.path_checks import check_dataset_folder

LETTERS = [*"abcdefghijklmnopqrstuvwxyz<>/|[]!.0123456789", "▁"]
NAMES = ["<unk>", "<s>", "</s>", "<pad>"]
SPELLED = "a </s> b<s></s>c <pad>d</s> <pad>"


def unigram(pieces=NAMES):
    score = [(name, 0.0) for name in pieces] + [(letter, -3.0 - i / 100) for i, letter in enumerate(LETTERS)]
    made = tokenizers.Tokenizer(models.Unigram([*score, ("</", -4.0), ("s>", -4.0)], pieces.index("<unk>"), False))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def bpe(ignore_merges):
    """A BPE whose merges, or whole words, spell `</s>`."""
    parts = ["</", "s>", "</s>"]
    vocabulary = {piece: i for i, piece in enumerate([*NAMES, *LETTERS, "</", "s>"])}
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", ignore_merges=ignore_merges))
    assert set(parts) <= vocabulary.keys()
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def words(model):
    vocabulary = {piece: i for i, piece in enumerate([*NAMES, *LETTERS, "##s", "##>", "##/"])}
    made = tokenizers.Tokenizer(model(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def byte_level():
    made = tokenizers.Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made


MODELS = {
    "unigram": unigram,
    "merges": lambda: bpe(False),
    "whole words": lambda: bpe(True),
    "word list": lambda: words(models.WordLevel),
    "word pieces": lambda: words(models.WordPiece),
    "bytes": byte_level,
}


def saved(folder, made, **config):
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


FLAGS = ["special", "plain", "normalized", "strips", "in the vocabulary only"]


@pytest.mark.parametrize(
    "model, flags", [(m, f) for m in MODELS for f in FLAGS if (m, f) != ("bytes", "in the vocabulary only")]
)
def test_no_spelling_becomes_a_control_token(tmp_path, model, flags):
    made = MODELS[model]()
    options = {"special": {}, "plain": dict(special=False), "normalized": dict(normalized=True, special=False)}
    options["strips"] = dict(lstrip=True, rstrip=True, single_word=True)
    if flags in options:
        made.add_tokens([AddedToken(name, **dict(special=True) | options[flags]) for name in NAMES])
    folder = saved(tmp_path / "t", made)
    tokenizer = find_tokenizer("hf", str(folder))
    control = {made.token_to_id(name) for name in ("<s>", "</s>", "<pad>")}
    ids = tokenizer.encode(SPELLED)
    assert control.isdisjoint(ids) and made.token_to_id("<unk>") not in tokenizer.encode("<") and ids
    if not model.startswith("word"):  # they know whole words only
        assert tokenizer.decode(ids) == SPELLED
        assert tokenizer.decode(tokenizer.encode("x<unk>")) == "x<unk>"
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.end_of_document]) == "a"
    plain = "abc de 123"
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode(plain) == library.encode(plain, add_special_tokens=False).ids
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").encode(SPELLED) == ids


def test_a_normaliser_cannot_make_a_control_token_of_other_characters(tmp_path):
    made = unigram()
    made.normalizer = normalizers.NFKC()
    made.add_special_tokens(NAMES)
    tokenizer = find_tokenizer("hf", str(saved(tmp_path / "t", made)))
    assert {1, 2, 3}.isdisjoint(tokenizer.encode("a \uff1c/s\uff1e b"))


def test_tokens_that_are_text_keep_their_ids(tmp_path):
    """A chat marker that is no special token, and padding with an ordinary character, as CLIP has it."""
    made = unigram(["<unk>", "<s>", "</s>"])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.add_tokens([AddedToken("<think>", special=False)])
    tokenizer = find_tokenizer("hf", str(saved(tmp_path / "t", made, pad_token="!")))
    assert made.token_to_id("<think>") in tokenizer.encode("a <think> b</s>")
    assert made.token_to_id("!") in tokenizer.encode("hey!</s>")


@pytest.mark.parametrize(
    "model",
    [models.WordLevel({"</s>": 0, "x": 1}), models.WordPiece({"</s>": 0, "x": 1}), models.Unigram([("</s>", 0.0)])],
    ids=["word list", "word pieces", "unigram"],
)
def test_a_tokenizer_that_cannot_encode_every_text_is_refused_by_name(tmp_path, model):
    """Its library raises on the first unknown character, so the word x alone proves nothing."""
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match=r"cannot encode characters outside its vocabulary .* unk_token"):
        HuggingFaceTokenizer(made.to_str(), "</s>", str(tmp_path))


@pytest.mark.parametrize("unknown", ["</s>", "<s>"])
def test_a_tokenizer_whose_unknown_token_marks_documents_is_refused_by_name(tmp_path, unknown):
    vocabulary = {piece: i for i, piece in enumerate([*NAMES, *LETTERS])}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    made.add_special_tokens(NAMES)
    folder = saved(tmp_path / "t", made, unk_token=unknown)
    with pytest.raises(DataError, match=rf"t: text becomes the control token '{unknown}'"):
        find_tokenizer("hf", str(folder))


# a newline, a digit, a space, and three single bytes of longer characters, as byte-level BPE writes them
@pytest.mark.parametrize("end", ["\u010a", "7", "\u0120", "\u0122", "\u00c4", "\u00f4"])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("key", ["eos_token", "bos_token"])
def test_a_control_token_that_text_needs_is_refused_by_name(tmp_path, end, added, key):
    made = byte_level()
    made.add_special_tokens(["</s>", *([end] if added else [])])
    folder = saved(tmp_path / "t", made, **dict(bos_token=None, pad_token=None, unk_token=None) | {key: end})
    with pytest.raises(
        DataError, match=rf"t: the token '{end}' marks documents, but it is also .* special tokens that"
    ):
        find_tokenizer("hf", str(folder))


def test_a_control_token_that_text_needs_only_beside_the_spelling_of_another_is_refused(tmp_path):
    """The byte 0xC3 is always merged with the byte after it, until a text also spells `</s>`."""
    vocabulary = byte_level().get_vocab()
    merges = []
    for code in range(0xC0, 0x100):
        (whole, _), *_ = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(code))
        vocabulary[whole] = len(vocabulary)
        merges.append((whole[0], whole[1]))
    made = byte_level()
    made.model = models.BPE(vocabulary, merges)
    made.add_special_tokens(["</s>", "<s>"])
    plain = dict(bos_token="<s>", pad_token=None, unk_token=None)
    tokenizer = find_tokenizer("hf", str(saved(tmp_path / "good", made, **plain)))
    assert tokenizer.decode(tokenizer.encode("na\u00efve </s>")) == "na\u00efve </s>"
    with pytest.raises(DataError, match="t: the token '\u00c3' marks documents"):
        find_tokenizer("hf", str(saved(tmp_path / "t", made, **plain | dict(bos_token="\u00c3"))))


@pytest.mark.parametrize("model", ["word list", "word pieces", "unigram"])
def test_a_control_token_that_is_an_ordinary_word_or_letter_is_refused(tmp_path, model):
    folder = saved(tmp_path / "t", MODELS[model](), eos_token="a")
    with pytest.raises(DataError, match=r"the token 'a' marks documents, but it is also a piece of ordinary text"):
        find_tokenizer("hf", str(folder))


def test_the_texts_that_a_piece_of_one_character_is_tried_with_have_every_byte_of_utf_8():
    tried = set("".join(spellings("x", "x")).encode())
    assert set(range(256)) - tried == {0xC0, 0xC1, *range(0xF5, 0x100)}


@pytest.mark.parametrize("given", [7, 0, False, ["</s>"], {"lstrip": True}, {"content": 7}])
@pytest.mark.parametrize("key", ["eos_token", "bos_token", "pad_token"])
def test_a_special_token_that_is_no_text_is_refused_by_key(tmp_path, given, key):
    made = byte_level()
    made.add_special_tokens(NAMES)
    with pytest.raises(DataError, match=rf"t: {key} is {re.escape(json.dumps(given))}, not text; in tokenizer_config"):
        find_tokenizer("hf", str(saved(tmp_path / "t", made, **{key: given})))


CONFIG = {
    "bos_token": {"content": "<s>", "__type": "AddedToken"},
    "pad_token": "<pad>",
    "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "additional_special_tokens": ["<extra>"],
    "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
    "tokenizer_class": "EvilTokenizer",
}


def test_special_tokens_and_the_chat_template_are_saved_with_the_tokenizer(tmp_path):
    """Twice in a row: a dataset's tokenizer becomes a run's, a checkpoint's and an export's. BOS has id 0 here."""
    made = unigram(["<s>", "</s>", "<unk>", "<pad>"])
    made.add_special_tokens(["<s>", "</s>", "<unk>", "<pad>", "<extra>"])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    folder = saved(tmp_path / "t", made, **CONFIG, add_bos_token=False)
    (folder / "chat_template.jinja").write_text("a template")
    tokenizer = find_tokenizer("hf", str(folder))
    for name in ("once", "twice"):
        assert (tokenizer.beginning_of_document, tokenizer.end_of_document, tokenizer.padding) == (0, 1, 3)
        assert tokenizer.starts_with_bos and tokenizer.start() == [0]
        tokenizer.save(tmp_path / name)
        tokenizer = load_tokenizer(tmp_path / name)
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        kept = {key: value for key, value in CONFIG.items() if key not in ("auto_map", "tokenizer_class")}
        assert kept.items() <= config.items() and not {"auto_map", "add_bos_token"} & config.keys()
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert (tmp_path / name / "chat_template.jinja").read_text() == "a template"


def test_ids_of_a_models_config_name_special_tokens_where_the_tokenizers_files_do_not(tmp_path):
    made = unigram(["<a>", "<b>", "<unk>", "<c>"])
    made.add_special_tokens(["<a>", "<b>", "<c>"])
    folder = saved(tmp_path / "t", made, bos_token=None, eos_token=None, pad_token=None, unk_token=None)
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 3], "pad_token_id": 99}))
    tokenizer = find_tokenizer("hf", str(folder))
    assert (tokenizer.beginning_of_document, tokenizer.end_of_document, tokenizer.padding) == (0, 1, None)
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").beginning_of_document == 0


def prepared(tmp_path, name, **also):
    """Prepare three short documents; return the dataset's folder and the ids of each document."""
    if not (tmp_path / "in").exists():
        (tmp_path / "in").mkdir()
        lines = [json.dumps({"text": f"a </s> b <s>{i}"}) + "\n" for i in range(3)]
        (tmp_path / "in" / "a.jsonl").write_text("".join(lines))
    tokenizer = TokenizerConfig(**dict(vocab_size=300) | also.pop("tokenizer", {}))
    data = dict(name=name, dir=str(tmp_path / "out"), paths=[str(tmp_path / "in" / "*")], workers=1)
    folder = prepare(PrepareConfig(data=DataConfig(**data | dict(heldout_fraction=0.0) | also), tokenizer=tokenizer))
    return folder, [ids.tolist() for ids in IndexedDataset.open(folder, "train").documents()]


def test_documents_begin_with_bos_on_request_and_are_another_dataset(tmp_path, capsys):
    """Id 0 is BOS. The same documents without it differ in the fingerprint and under the same name are refused."""
    made = unigram(["<s>", "</s>", "<unk>", "<pad>"])
    made.add_special_tokens(["<s>", "</s>", "<unk>", "<pad>"])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    given = dict(kind="hf", path=str(saved(tmp_path / "t", made)))
    bare, without = prepared(tmp_path, "bare", tokenizer=given)
    assert "data.bos=true adds it" in capsys.readouterr().err
    folder, with_bos = prepared(tmp_path, "d", tokenizer=given, bos=True)
    assert with_bos == [[0, *ids] for ids in without] and all(ids.count(0) == 1 for ids in with_bos)
    assert all(ids[-1] == 1 and 1 not in ids[:-1] for ids in with_bos)
    assert Card.load(folder).fingerprint != Card.load(bare).fingerprint
    assert Card.load(folder).config["data"]["bos"] is True
    assert Card.load(folder).tokenizer.beginning_of_document == 0
    assert Card.load(bare).tokenizer.beginning_of_document is None
    assert load_tokenizer(folder / "tokenizer").start() == [0] and load_tokenizer(bare / "tokenizer").start() == []
    with pytest.raises(ConfigError, match=r"data.bos \(was true, now false\)"):
        prepared(tmp_path, "d", tokenizer=given)
    adopted = dict(kind="megatron", paths=[str(folder / "train")], tokenizer=dict(path=str(folder / "tokenizer")))
    adopted["tokenizer"]["kind"] = "hf"
    assert load_tokenizer(prepared(tmp_path, "m", **adopted)[0] / "tokenizer").start() == [0]
    with pytest.raises(ConfigError, match=r"data.bos=true: the ids of data=megatron stay as they are"):
        prepared(tmp_path, "n", bos=True, **adopted)
    with pytest.raises(ConfigError, match=r"data.bos=true: the documents of .*bare do not begin with BOS"):
        check_dataset_folder(DataConfig(name="bare", dir=str(tmp_path / "out"), bos=True), mask_documents=False)


def test_a_tokenizer_trained_here_has_bos_on_request(tmp_path):
    folder, documents = prepared(tmp_path, "d", bos=True)
    tokenizer = load_tokenizer(folder / "tokenizer")
    first, end = tokenizer.beginning_of_document, tokenizer.end_of_document
    assert first not in (None, end) and [ids[0] for ids in documents] == [first] * 3
    assert [tokenizer.decode(ids) for ids in documents] == [f"a </s> b <s>{i}" for i in range(3)]
    assert prepared(tmp_path, "again", tokenizer=dict(path=str(folder / "tokenizer")), bos=True)[1] == documents


@pytest.mark.parametrize("config, message", [({}, "has no BOS token"), ({"bos_token": "</s>"}, "is its end-of-docu")])
def test_bos_is_refused_where_the_tokenizer_has_none_of_its_own(tmp_path, config, message):
    made = unigram(["<unk>", "</s>"])
    made.add_special_tokens(["<unk>", "</s>"])
    path = str(saved(tmp_path / "t", made, **dict(bos_token=None, pad_token=None) | config))
    with pytest.raises(ConfigError, match=rf"data.bos=true: .*{message}"):
        prepared(tmp_path, "d", bos=True, tokenizer=dict(kind="hf", path=path))
    assert not (tmp_path / "out").exists()


def test_a_dataset_prepared_by_an_older_version_is_still_found(tmp_path, capsys):
    folder, _ = prepared(tmp_path, "d")
    card = json.loads((folder / "card.json").read_text())
    for key in ("bos", "on_bad_record", "max_bad_fraction"):
        card["config"]["data"].pop(key, None)
    card["tokenizer"].pop("beginning_of_document")
    (folder / "card.json").write_text(json.dumps(card))
    assert prepared(tmp_path, "d")[0] == folder and "already prepared" in capsys.readouterr().err


def test_a_tokenizer_that_changes_text_is_told_so_before_a_model_is_trained_on_it(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("Some Text\n" * 50)
    for name, normalizer in (("exact", None), ("lower", normalizers.Lowercase()), ("nfkc", normalizers.NFKC())):
        made = tokenizers.Tokenizer(models.BPE())
        if normalizer is not None:
            made.normalizer = normalizer
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
        )
        made.train_from_iterator(["Some Text"], trainer)
        made.save(str(tmp_path / f"{name}.json"))
        data = DataConfig(name=name, dir=str(tmp_path / "out"), paths=[str(tmp_path / "a.txt")], workers=1)
        prepare(PrepareConfig(data=data, tokenizer=TokenizerConfig(kind="hf", path=str(tmp_path / f"{name}.json"))))
        said = capsys.readouterr().err
        assert (f"note: the tokenizer {tmp_path / name}.json changes text: 'The END" in said) == (name != "exact")
