"""Fill-in-the-middle loses no text, has its markers where they belong, and depends on the text and the seed alone."""

import json
import re
import unicodedata
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatrain.config import DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.corpus.fill_in_the_middle import FillInTheMiddle, gap_prompt
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.preparation import prepare
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import ConfigError

NAMES = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]


def texts(count=300):
    """Code-like texts, some of which spell a marker."""
    body = ["def f(x):\n", "    return x + 1\n", "# é 東京 x\u0323 ▁\n", "\n\n", "class A:\n\tpass\n", "<|fim_middle|>"]
    random = np.random.default_rng(5)
    drawn = ["".join(body[i] for i in random.integers(0, len(body), 12)) + f"# {n}" for n in range(count)]
    return [unicodedata.normalize("NFC", text) for text in drawn]


@pytest.fixture
def make(tmp_path):
    """Return a function that prepares the texts and returns the folder."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))

    def prepared(name="d", seed=1, tokenizer=(), **data):
        base = dict(name=name, dir=str(tmp_path / "out"), kind="files", paths=[str(path)], workers=1, fim_rate=0.5)
        given = {"vocab_size": 500, "fim_tokens": True, **dict(tokenizer)}
        return prepare(PrepareConfig(seed, DataConfig(**base | data), TokenizerConfig(**given)))

    return prepared


def parts_of(folder, split="train", names=NAMES):
    """Return the ids of each document without its end, and the texts between markers by the marker before them."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    marks = {tokenizer.control_token(name): name for name in names}
    found = []
    for ids in IndexedDataset.open(folder, split).documents():
        ids = ids[:-1].tolist()
        at = [i for i, token in enumerate(ids) if token in marks]
        parts = [(marks[ids[a]], tokenizer.decode(ids[a + 1 : b])) for a, b in pairwise([*at, len(ids)])]
        found.append((parts, tokenizer.decode(ids)))
    return found


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram", "byte_level_bpe"])
def test_without_its_markers_every_document_is_there_again(make, kind):
    """In PSM the middle is the last part; in SPM, which begins with two markers, the last part is prefix and middle."""
    folder = make(tokenizer={"kind": kind})
    prefix, middle, suffix = NAMES
    seen, orders = [], Counter()
    for parts, plain in parts_of(folder):
        texts_of = dict(parts)
        if not parts:
            seen.append(plain)
            orders["plain"] += 1
            continue
        assert [name for name, _ in parts] == [prefix, suffix, middle]
        whole = texts_of[prefix] + texts_of[middle] + texts_of[suffix]  # SPM: the prefix's part is empty
        seen.append(whole)
        orders["PSM" if texts_of[prefix] else "SPM"] += 1
    held_out = [plain for _, plain in parts_of(folder, "heldout")]
    assert sorted([*seen, *held_out]) == sorted(texts())
    total = sum(orders.values())
    assert 0.4 < orders["plain"] / total < 0.6 and 0.15 < orders["SPM"] / total < 0.35


def test_held_out_documents_stay_as_they_are(make):
    assert all(not parts for parts, _ in parts_of(make(fim_rate=1.0), "heldout"))


@pytest.mark.parametrize(("spm", "first_is_empty"), [(0.0, False), (1.0, True)])
def test_the_rates_choose_the_order(make, spm, first_is_empty):
    found = [parts for parts, _ in parts_of(make(fim_rate=1.0, fim_spm_rate=spm))]
    assert all(len(parts) == 3 for parts in found)
    empty = [parts[0][1] == "" for parts in found]
    assert all(empty) if first_is_empty else np.mean(empty) < 0.1


def test_a_document_grows_by_three_markers_and_the_words_that_are_cut(make):
    plain, rearranged = make("plain", fim_rate=0.0), make("fim", fim_rate=1.0)
    before, after = (np.concatenate(list(IndexedDataset.open(f, "train").lengths())) for f in (plain, rearranged))
    assert len(before) == len(after) and 3 <= np.mean(after - before) < 9


def test_workers_change_nothing(make):
    first = make("first").joinpath("train.bin").read_bytes()
    assert make("again", workers=2).joinpath("train.bin").read_bytes() == first


def test_the_seed_and_the_text_decide(make):
    one, other = (FillInTheMiddle(0.5, 0.5, seed, prefix=-1, middle=-2, suffix=-3) for seed in (1, 2))
    results = [
        [fim.encode(text, lambda part: np.full(len(part), 7)).tolist() for text in texts()] for fim in (one, other)
    ]
    assert np.mean([a == b for a, b in zip(*results, strict=True)]) < 0.5  # both leave a quarter as it is
    assert results[0] == [one.encode(text, lambda part: np.full(len(part), 7)).tolist() for text in texts()]


def test_cuts_are_spread_over_the_whole_text():
    fim = FillInTheMiddle(1.0, 0.0, 3, prefix=-1, middle=-2, suffix=-3)
    cuts = []
    for number in range(2000):
        text = f"{number:010d}" * 10
        ids = fim.encode(text, lambda part: np.full(len(part), 7)).tolist()
        assert len(ids) == 103
        cuts += [ids.index(-3) - 1, 100 - (ids.index(-2) - ids.index(-3) - 1)]
    assert min(cuts) == 0 and max(cuts) == 100
    counts = np.histogram(cuts, bins=10, range=(0, 101))[0]
    assert counts.min() > 300 and counts.max() < 500


def test_an_empty_prefix_middle_or_suffix_and_a_text_of_one_character_are_whole(make):
    fim = FillInTheMiddle(1.0, 0.5, 3, prefix=-1, middle=-2, suffix=-3)
    for text in "abcdefgh":
        ids = fim.encode(text, lambda part: np.frombuffer(part.encode(), np.uint8)).tolist()
        assert sorted(ids) == [-3, -2, -1, ord(text)]


def test_markers_of_another_name_are_named(make):
    own = ["[PRE]", "[MID]", "[SUF]"]
    folder = make(fim_tokens=own, fim_rate=1.0, tokenizer={"fim_tokens": False, "special_tokens": own})
    assert all(len(parts) == 3 for parts, _ in parts_of(folder, names=own))


def test_a_tokenizer_without_the_markers_is_refused(make, tmp_path):
    with pytest.raises(
        ConfigError, match=r"data.fim_rate=0.5: the tokenizer to be trained has no control token .*fim_p"
    ):
        make(tokenizer={"fim_tokens": False})
    assert not (tmp_path / "out" / "d").exists()
    plain = make("plain", fim_rate=0.0, tokenizer={"fim_tokens": False})
    path = str(plain / "tokenizer" / "tokenizer.model")
    with pytest.raises(ConfigError, match=rf"the tokenizer {path} has no control token .*data\.fim_tokens"):
        make(tokenizer={"path": path})
    with pytest.raises(ConfigError, match=r"data.fim_tokens=.*three names"):
        make(fim_tokens=NAMES[:2])
    with pytest.raises(ConfigError, match=r"data.fim_rate=0.5: the ids of data=megatron stay"):
        make(kind="megatron", paths=[str(plain / "train")])


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind, bounds", [("sentencepiece", ["</s>", "<s>"]), ("byte_level_bpe", ["<|endoftext|>"])])
def test_a_marker_that_ends_or_begins_documents_is_refused(make, tmp_path, kind, bounds, bos):
    """A document with such a marker would be two to masks, positions and packing."""
    trained = make("trained", bos=bos, tokenizer={"kind": kind, "special_tokens": bounds})
    given = {"kind": "hf" if kind == "byte_level_bpe" else kind, "path": str(trained / "tokenizer")}
    for name in bounds if bos else bounds[:1]:
        names = [NAMES[0], name, NAMES[2]]
        with pytest.raises(ConfigError, match=rf"data.fim_tokens=.*: {re.escape(name)} marks where documents begin or"):
            make(fim_tokens=names, bos=bos, tokenizer=given)
        with pytest.raises(ConfigError, match=rf"data.fim_tokens=.*: {re.escape(name)} marks where documents begin or"):
            make(fim_tokens=names, bos=bos, tokenizer={"kind": kind, "special_tokens": bounds})
    assert not (tmp_path / "out" / "d").exists()


def test_other_rates_are_another_dataset(make):
    make()
    with pytest.raises(ConfigError, match=r"data.fim_rate \(was 0.5, now 0.2\)"):
        make(fim_rate=0.2)


def test_a_tokenizer_that_marks_the_beginning_of_each_text_is_refused(make, tmp_path):
    """Llama 2's form: each part of a document would begin with a space."""
    tokenizer = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate("▁def(arg):umnt")}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["</s>", *NAMES])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    given = {"kind": "hf", "path": str(tmp_path / "tokenizer.json"), "fim_tokens": False}
    with pytest.raises(ConfigError, match=r"data.fim_rate=0.5: the tokenizer .* puts a mark before each text"):
        make(tokenizer=given)


@pytest.mark.parametrize("kind", ["unigram", "byte_level_bpe"])
def test_the_prompt_for_a_gap_is_how_training_showed_it(make, kind):
    """A rearranged document up to its middle is the prompt that prefix and suffix make."""
    folder = make(tokenizer={"kind": kind}, fim_rate=1.0, fim_spm_rate=0.0)
    tokenizer = load_tokenizer(folder / "tokenizer")
    middle = tokenizer.control_token("<|fim_middle|>")
    seen = 0
    for ids, (parts, _) in zip(IndexedDataset.open(folder, "train").documents(), parts_of(folder), strict=True):
        before, after = (dict(parts)[name] for name in ("<|fim_prefix|>", "<|fim_suffix|>"))
        ids = ids.tolist()
        assert gap_prompt(tokenizer, NAMES, before, after) == ids[: ids.index(middle) + 1]
        seen += bool(before and after)
    assert seen > 100
