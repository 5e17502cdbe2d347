"""Tokenizers decode every clean text exactly, run no foreign code, and are the same on every machine."""

import json
import random
import unicodedata

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatrain.config import TokenizerConfig
from megatrain.data import tokenizer_sentencepiece
from megatrain.data.corpus.normalise import normalise
from megatrain.data.tokenizer import segments
from megatrain.data.tokenizer_loading import find_tokenizer, load_tokenizer
from megatrain.data.train_sentencepiece import train_sentencepiece
from megatrain.errors import ConfigError, DataError

TEXTS = ["def f(self, x):\n    return self.x + x  # naïve\n\n" * 20, "The quick brown fox.\tIt jumps  over.\n" * 30]
HARD = [
    " ",
    "  leading and trailing  ",
    "\n\n\n",
    "\ttabs\t\tand spaces \t ",
    "▁",
    "▁▁ a▁b ▁ c▁",
    " ▁ ",
    "a\u2585b",
    "<s></s><unk><0x41><|endoftext|><pad>",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea 漢字 עברית",
    "e\u0301 ﬁ Å ½ \uff21\uff22 \u00a0\u2003\u3000\u200b\u2028",
    "\ufffd \ufffe \U0010ffff \ue000",
    "x" * 10000,
    "word " * 3000,
]


@pytest.fixture(scope="module")
def ours():
    return train_sentencepiece(iter(TEXTS), TokenizerConfig(vocab_size=400))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Return a folder with vocab.json and merges.txt of a GPT-2-like byte-level BPE, and the library's own object."""
    folder = tmp_path_factory.mktemp("gpt2")
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    )
    made.model.save(str(folder))
    return folder, made


@pytest.fixture(params=["sentencepiece", "hf"])
def tokenizer(request, ours, gpt2):
    return ours if request.param == "sentencepiece" else find_tokenizer("hf", str(gpt2[0]))


def random_text(rng):
    parts = [
        " ",
        "  ",
        "\n",
        "\t",
        "▁",
        "a",
        "foo",
        "é",
        "\u0301",
        "\U0001f600",
        "漢",
        "</s>",
        "<0x0A>",
        "\u2585",
        "\u200d",
    ]
    text = "".join(
        rng.choice(parts)
        if rng.random() < 0.8
        else chr(rng.choice([rng.randrange(32, 0xD800), rng.randrange(0xE000, 0x110000)]))
        for _ in range(rng.randrange(60))
    )
    return normalise(text)


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_are_decoded_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_clean_texts_are_decoded_exactly(tokenizer):
    rng = random.Random(0)
    for _ in range(400):
        text = random_text(rng)
        assert tokenizer.decode(tokenizer.encode(text)) == text, ascii(text)


def test_no_text_makes_a_control_token(tokenizer):
    for text in HARD:
        assert tokenizer.end_of_document not in tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocab_size for token in tokenizer.encode("".join(HARD)))


def test_the_end_of_a_document_decodes_to_nothing(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.end_of_document, *tokenizer.encode("c")]) == "abc"


def test_streamed_pieces_add_up_to_the_whole_and_show_no_broken_characters(tokenizer):
    rng = random.Random(1)
    for text in [*HARD[:12], *(random_text(rng) for _ in range(60))]:
        decoder = tokenizer.stream_decoder()
        pieces = [decoder.push(token) for token in tokenizer.encode(text)]
        assert "".join(pieces) + decoder.finish() == text
        if "\ufffd" not in text:
            assert "\ufffd" not in "".join(pieces)


def test_finish_shows_a_broken_character_at_the_end(tokenizer):
    ids = tokenizer.encode("ab\U0001f600")[:-1]
    decoder = tokenizer.stream_decoder()
    assert "".join(map(decoder.push, ids)) == "ab"
    assert set(decoder.finish()) == {"\ufffd"}


def test_a_saved_tokenizer_loads_unchanged(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    again = load_tokenizer(tmp_path / "t")
    assert (again.kind, again.fingerprint, again.vocab_size) == (
        tokenizer.kind,
        tokenizer.fingerprint,
        tokenizer.vocab_size,
    )
    assert again.end_of_document == tokenizer.end_of_document
    assert [again.encode(text) for text in HARD] == [tokenizer.encode(text) for text in HARD]


def test_a_folder_that_megatrain_wrote_says_its_kind_itself(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    for kind in ("sentencepiece", "unigram", "hf", "byte_level_bpe"):
        found = find_tokenizer(kind, str(tmp_path / "t"))
        assert (found.kind, found.fingerprint) == (tokenizer.kind, tokenizer.fingerprint)


def test_a_byte_order_mark_in_a_file_of_a_tokenizer_changes_nothing(tmp_path, gpt2):
    tokenizer = find_tokenizer("hf", str(gpt2[0]))
    tokenizer.save(tmp_path)
    for path in tmp_path.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_a_saved_tokenizer_whose_file_changed_is_refused(tmp_path, gpt2):
    tokenizer = find_tokenizer("hf", str(gpt2[0]))
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"add_prefix_space":false', '"add_prefix_space":true'))
    with pytest.raises(DataError, match="not the one that was saved"):
        load_tokenizer(tmp_path)


def test_training_gives_the_same_model_with_one_thread_and_with_eight(ours, monkeypatch):
    """The model file contains the thread count, so it is compared without it."""
    import sentencepiece

    pieces = []
    train = sentencepiece.SentencePieceTrainer.train
    for threads in (1, 8):
        monkeypatch.setattr(
            sentencepiece.SentencePieceTrainer,
            "train",
            lambda threads=threads, **options: train(**options | {"num_threads": threads}),
        )
        model = train_sentencepiece(iter(TEXTS * 5), TokenizerConfig(vocab_size=500))._processor
        pieces.append([(model.id_to_piece(i), model.get_score(i)) for i in range(model.vocab_size())])
    assert pieces[0] == pieces[1]
    monkeypatch.undo()
    assert train_sentencepiece(iter(TEXTS), TokenizerConfig(vocab_size=400)).fingerprint == ours.fingerprint


def test_runs_of_spaces_are_single_pieces(ours):
    assert len(ours.encode("    return")) <= 3


def test_ids_of_a_byte_level_bpe_are_the_librarys_own(gpt2):
    folder, library = gpt2
    tokenizer = find_tokenizer("hf", str(folder))
    for text in ["def f(self):\n    return 1", "  two  spaces\n\n\nand é 漢", *TEXTS]:
        assert tokenizer.encode(text) == library.encode(text).ids
    assert tokenizer.end_of_document == library.token_to_id("<|endoftext|>")


def test_transformers_loads_the_saved_hugging_face_tokenizer_with_the_same_ids(gpt2, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = find_tokenizer("hf", str(gpt2[0]))
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("def f(self):\n  x", add_special_tokens=False)["input_ids"] == tokenizer.encode("def f(self):\n  x")
    assert theirs.eos_token_id == tokenizer.end_of_document


def test_truncation_and_padding_of_a_tokenizer_json_are_ignored(gpt2, tmp_path):
    _, library = gpt2
    library = tokenizers.Tokenizer.from_str(library.to_str())
    library.enable_truncation(4)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = find_tokenizer("hf", str(tmp_path / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]


def test_dropout_of_a_tokenizer_json_is_ignored(gpt2, tmp_path):
    """Also for text that spells the end of a document, which a second tokenizer encodes."""
    definition = json.loads(gpt2[1].to_str())
    definition["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer, plain = find_tokenizer("hf", str(tmp_path / "tokenizer.json")), find_tokenizer("hf", str(gpt2[0]))
    for text in (TEXTS[0], f"<|endoftext|>{TEXTS[1]}"):
        assert tokenizer.encode(text) == plain.encode(text)


def test_the_end_of_document_is_the_eos_token_the_folder_names(gpt2, tmp_path):
    library = tokenizers.Tokenizer.from_str(gpt2[1].to_str())
    library.add_special_tokens(["<my_end>"])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<my_end>"}}))
    assert find_tokenizer("hf", str(tmp_path)).end_of_document == library.token_to_id("<my_end>")


def test_a_lossy_or_byteless_sentencepiece_model_is_refused(tmp_path):
    import io

    import sentencepiece

    for options, message in [
        ({"byte_fallback": False}, "byte fallback"),
        ({"byte_fallback": True, "normalization_rule_name": "nmt_nfkc"}, "decoding does not return the text exactly"),
    ]:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=model,
            vocab_size=400,
            model_type="bpe",
            hard_vocab_limit=False,
            **options,
        )
        (tmp_path / "m.model").write_bytes(model.getvalue())
        with pytest.raises(DataError, match=message):
            find_tokenizer("sentencepiece", str(tmp_path / "m.model"))


@pytest.mark.parametrize(
    "kind, path, error, message",
    [
        ("sentencepiece", "{}/none.model", ConfigError, "tokenizer.path"),
        ("hf", "{}/none/tokenizer.json", ConfigError, "tokenizer.path"),
        ("hf", "{}", ConfigError, "is not a Hugging Face tokenizer"),
        ("sentencepiece", "{}/junk", DataError, "not a SentencePiece model"),
        ("hf", "{}/junk", DataError, "not a Hugging Face tokenizer"),
    ],
)
def test_a_missing_or_invalid_tokenizer_is_named(tmp_path, kind, path, error, message):
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(error, match=message):
        find_tokenizer(kind, path.format(tmp_path))


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "".join(map(chr, range(0x4E00, 0x4E00 + 3000))),
            r"vocab_size=400: too small .* give tokenizer.vocab_size=3259",
        ),
        ("\n\n", r"the text to train a tokenizer on has nothing but line ends; give more text, or a trained tokenizer"),
        ("▁▁\n", r"nothing but line ends"),
    ],
)
def test_text_that_no_tokenizer_can_be_trained_on_is_explained(text, message):
    with pytest.raises(DataError, match=message) as error:
        train_sentencepiece(iter([text]), TokenizerConfig(vocab_size=400))
    assert ".cc(" not in str(error.value)
    if "vocab_size" in message:
        assert train_sentencepiece(iter([text]), TokenizerConfig(vocab_size=3259)).vocab_size == 3259


def test_a_model_that_is_none_is_refused_without_the_librarys_source_lines(tmp_path):
    for name, content in (("tokenizer.json", b"{}"), ("cut.model", b"\x0a\x0e\x0a\x05<unk")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            DataError, match=r"not a SentencePiece model.*; give a .model file, or tokenizer=hf"
        ) as error:
            find_tokenizer("sentencepiece", str(tmp_path / name))
        assert ".cc(" not in str(error.value)


def test_segments_are_bounded_end_at_newlines_and_join_to_the_text():
    rng = random.Random(2)
    text = "".join(rng.choice(["a", "b\n", "\n", "é"]) for _ in range(3000))
    pieces = list(segments(text, 100))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 100
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert list(segments("x" * 250, 100)) == ["x" * 100, "x" * 100, "x" * 50]


@pytest.mark.parametrize(
    "text",
    [
        *HARD,
        "a\r\nb\rc\r\r\n",
        "\ufeffbom",
        "\ufeff\ufeffboms",
        "\x00\ufeffbom",
        "\x00\x07\x1b[0m\x7f\x85\x9f.\x0c",
        "e\u0301",
        "\u1100\x01\u1161",
    ],
)
def test_normalising_is_idempotent_and_leaves_clean_nfc_text(text):
    clean = normalise(text)
    assert normalise(clean) == clean == unicodedata.normalize("NFC", clean)
    assert not [c for c in clean if unicodedata.category(c) == "Cc" and c not in "\n\t"]


def test_normalising_changes_only_what_is_documented():
    assert normalise("\ufeffa\r\nb\rc\x00\x0cd\te\u0301 ﬁ  ") == "a\nb\ncd\té ﬁ  "


def test_every_probe_of_the_load_time_check_is_clean_text():
    """Otherwise a model could be refused for changing text that it never gets."""
    assert normalise(tokenizer_sentencepiece._PROBE) == tokenizer_sentencepiece._PROBE
