"""Near duplicates: signatures against plain sets, what is found against what was planted, and its independence."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest

from megatrain.config import CleanConfig, DataConfig, PrepareConfig, TokenizerConfig
from megatrain.config.clean_config import MinhashConfig
from megatrain.data.card import Card
from megatrain.data.corpus import near_duplicates, pipeline
from megatrain.data.corpus.cleaned import CleanedShardWriter, describe, pack
from megatrain.data.corpus.near_duplicates import drop_near_duplicates
from megatrain.data.corpus.selection import DROPPED, NEAR_DUPLICATE, TRAIN, Selection
from megatrain.data.corpus.signatures import Signing, jaccard, sign
from megatrain.data.corpus.words import split
from megatrain.data.preparation import prepare
from megatrain.errors import ConfigError, DataError

CONFIG = MinhashConfig()


def words_of(random_, count):
    return [f"w{random_.randrange(5000)}" for _ in range(count)]


def changed(random_, words, count):
    """Replace a number of words."""
    words = list(words)
    for at in random_.sample(range(len(words)), count):
        words[at] = f"x{random_.randrange(10**6)}"
    return words


def ngrams(text, size=5):
    words = split(text)
    return {tuple(words[at : at + size]) for at in range(max(len(words) - size + 1, min(len(words), 1)))}


def true_jaccard(one, other):
    one, other = ngrams(one), ngrams(other)
    return len(one & other) / len(one | other)


def selection_of(folder, groups, signing, frame=7):
    folder.mkdir()
    shards = []
    for number, group in enumerate(groups):
        writer = CleanedShardWriter(folder, f"s{number}", signing.settings())
        for start in range(0, len(group), frame):
            part = group[start : start + frame]
            encoded = [text.encode() for text in part]
            writer.add(pack(encoded), describe(encoded, 5), sign(part, signing))
        shards.append(writer.finish())
    return Selection(shards, folder / "flags")


def found(folder, groups, config=CONFIG, memory=2**30):
    """Return the flags and the report."""
    selection = selection_of(folder, groups, Signing.of(config))
    selection.drop_duplicates(memory)
    report = drop_near_duplicates(selection, config, Signing.of(config), memory, folder / "bands")
    assert not (folder / "bands").exists()
    return selection.flags.tolist(), report


@pytest.fixture(scope="module")
def planted():
    """Documents, and for each the one it is a copy of: itself, or one with 1 in 100 words replaced (Jaccard ~ 0.9)."""
    random_ = random.Random(0)
    texts, origin = [], []
    for _ in range(400):
        words = words_of(random_, random_.randrange(200, 400))
        copies = random_.choice([0, 0, 1, 1, 2])
        first = len(texts)
        for variant in [words, *(changed(random_, words, len(words) // 120) for _ in range(copies))]:
            texts.append(" ".join(variant))
            origin.append(first)
    order = list(range(len(texts)))
    random_.shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    groups: dict[int, list[int]] = {}
    for old, first in enumerate(origin):
        groups.setdefault(first, []).append(place[old])
    kept = {number: min(group) for group in groups.values() for number in group}
    return [texts[old] for old in order], [kept[number] for number in range(len(texts))]


def test_the_jaccard_similarity_is_that_of_the_sets_of_ngrams():
    random_ = random.Random(1)
    for count in (0, 1, 5, 40):
        words = words_of(random_, 100)
        one, other = " ".join(words), ", ".join(changed(random_, words, count)).upper()
        assert jaccard(one, other, 5) == pytest.approx(true_jaccard(one, other))
    assert jaccard("One two.", "one TWO", 5) == 1 and jaccard("one two", "one three", 5) == 0


def test_signatures_estimate_the_similarity_as_well_as_theory_says():
    """112 hashes: a standard deviation of at most 0.047 (binomial), so a mean of 200 pairs is within 0.012."""
    random_ = random.Random(2)
    signing = Signing.of(CONFIG)
    for count in (3, 12, 30):
        errors = []
        for _ in range(200):
            words = words_of(random_, 200)
            pair = [" ".join(words), " ".join(changed(random_, words, count))]
            one, other = sign(pair, signing)
            errors.append(float((one == other).mean()) - true_jaccard(*pair))
        assert abs(np.mean(errors)) < 0.012
        assert np.std(errors) < 0.055


def test_the_estimate_is_as_good_as_datasketchs():
    datasketch = pytest.importorskip("datasketch")
    random_ = random.Random(3)
    signing, ours, theirs = Signing.of(CONFIG), [], []
    for _ in range(60):
        words = words_of(random_, 150)
        pair = [" ".join(words), " ".join(changed(random_, words, random_.randrange(1, 20)))]
        one, other = sign(pair, signing)
        true = true_jaccard(*pair)
        ours.append(abs((one == other).mean() - true))
        sketches = datasketch.MinHash.bulk([[repr(n).encode() for n in ngrams(text)] for text in pair], num_perm=112)
        theirs.append(abs(sketches[0].jaccard(sketches[1]) - true))
    assert np.mean(ours) < 1.3 * np.mean(theirs)


def test_a_signature_depends_on_its_document_alone_and_on_how_it_is_made():
    random_ = random.Random(4)
    texts = [" ".join(words_of(random_, count)) for count in (3, 50, 700)] + ["...", ""]
    signing = Signing.of(CONFIG)
    together = sign(texts, signing)
    for text, signature in zip(texts, together, strict=True):
        assert (sign([text], signing)[0] == signature).all()
    assert not together[3:].any() and together[:3].any(axis=1).all()
    assert (sign(texts, Signing.of(MinhashConfig(seed=2)))[1] != together[1]).any()


def test_planted_copies_are_found_and_others_are_kept(tmp_path, planted):
    """Recall at least 0.97 of copies of a Jaccard similarity of 0.9 and more, precision at least 0.99."""
    texts, kept = planted
    copies = [number for number, first in enumerate(kept) if first != number]
    close = [number for number in copies if true_jaccard(texts[number], texts[kept[number]]) >= 0.9]
    assert len(close) > 100
    flags, report = found(tmp_path / "s", [texts])
    dropped = {number for number, flag in enumerate(flags) if flag == NEAR_DUPLICATE}
    assert len(dropped & set(close)) >= 0.97 * len(close)
    assert len(dropped & set(copies)) >= 0.99 * len(dropped)
    assert report.documents == len(dropped)
    assert report.checked == 100 and report.below <= 5 and report.mean_jaccard > 0.85


def test_unrelated_and_merely_related_documents_are_kept(tmp_path):
    """Of pairs that share most words (Jaccard ~ 0.5) hardly any is dropped; some are compared and rejected."""
    random_ = random.Random(5)
    texts = []
    for _ in range(400):
        words = words_of(random_, 100)
        texts += [" ".join(words), " ".join(words[:70] + words_of(random_, 30))]
    flags, report = found(tmp_path / "s", [texts])
    assert flags.count(NEAR_DUPLICATE) <= 0.01 * len(texts)
    assert report.rejected >= 1 and report.rejected + report.documents <= report.compared


@pytest.mark.parametrize("cut", [(0, 1, 50, 333), ()])
@pytest.mark.parametrize("memory", [2**30, 5000])
@pytest.mark.parametrize("block", [2**14, 13])
def test_no_cut_and_no_memory_changes_what_is_found(tmp_path, monkeypatch, planted, cut, memory, block):
    texts, _ = planted
    expected = found(tmp_path / "whole", [texts])
    monkeypatch.setattr(near_duplicates, "_BLOCK", block)
    edges = [0, *cut, len(texts)]
    groups = [texts[start:stop] for start, stop in pairwise(edges)]
    assert found(tmp_path / "cut", groups, memory=memory) == expected


def test_exact_duplicates_go_first_and_documents_without_words_are_no_duplicates(tmp_path):
    text = " ".join(words_of(random.Random(6), 100))
    texts = ["...", text, text, "--", text.replace("w", "W", 1), "!"]
    flags, report = found(tmp_path / "s", [texts])
    assert flags == [1, 1, DROPPED, 1, NEAR_DUPLICATE, 1]
    assert (report.documents, report.clusters, report.largest) == (1, 1, 2)


def test_a_chain_is_one_cluster_and_the_largest_clusters_are_shown(tmp_path):
    """Each copy is like the one before it, the last hardly like the first."""
    random_ = random.Random(7)
    chain = [words_of(random_, 200)]
    for _ in range(11):
        chain.append(changed(random_, chain[-1], 2))
    pair = [words_of(random_, 150)] * 2
    texts = [" ".join(words) for words in [*chain, pair[0], changed(random_, pair[1], 1), words_of(random_, 90)]]
    texts[3], texts[13] = texts[13], texts[3]
    flags, report = found(tmp_path / "s", [texts])
    assert true_jaccard(texts[0], texts[11]) < 0.5
    assert [number for number, flag in enumerate(flags) if flag == TRAIN] == [0, 3, 14]
    assert (report.documents, report.clusters, report.largest) == (12, 2, 12)
    assert report.sizes == {"2": 1, "8": 1}
    largest, other = report.examples
    assert largest["documents"] == 12 and [member["id"] for member in largest["members"]] == [0, 1]
    assert other["members"] == [{"id": 3, "text": texts[3][:200]}, {"id": 12, "text": texts[12][:200]}]
    assert other["jaccard"] == pytest.approx(true_jaccard(texts[3], texts[12]), abs=1e-4)


def test_each_document_is_compared_with_the_first_of_its_band_and_the_one_before_it(tmp_path):
    """The last two differ from the first of every band that they share."""
    config = MinhashConfig(bands=4, rows=1, threshold=0.75)
    rows = [[1, 11, 12, 13], [21, 2, 22, 23], [31, 32, 3, 33], [1, 2, 3, 4], [1, 2, 3, 5]]
    signing = Signing.of(config)
    writer = CleanedShardWriter(tmp_path, "s", signing.settings())
    texts = [f"text {i}".encode() for i in range(5)]
    writer.add(pack(texts), describe(texts, 5), np.array(rows, np.uint32))
    selection = Selection([writer.finish()], tmp_path / "flags")
    report = drop_near_duplicates(selection, config, signing, 2**30, tmp_path / "bands")
    assert selection.flags.tolist() == [1, 1, 1, 1, NEAR_DUPLICATE]
    assert (report.compared, report.rejected) == (9, 6)


def test_signatures_made_in_another_way_are_refused(tmp_path):
    selection = selection_of(tmp_path / "s", [["some words here"]], Signing.of(MinhashConfig(seed=3)))
    with pytest.raises(DataError, match=r"'seed': 3.*'seed': 1"):
        drop_near_duplicates(selection, CONFIG, Signing.of(CONFIG), 2**30, tmp_path / "bands")


# ---------------------------------------------------------------------------------------------------- prepare


def config(folder, name="d", workers=1, dedup="minhash", **data):
    given = DataConfig(
        name=name, dir=str(folder.parent / "out"), kind="files", paths=[str(folder)], workers=workers, **data
    )
    return PrepareConfig(data=given, clean=CleanConfig(dedup=dedup), tokenizer=TokenizerConfig(vocab_size=400))


@pytest.fixture
def corpus(tmp_path, planted, monkeypatch):
    """Write the first planted documents, in two files and shards of about 4,000 bytes."""
    for module in ("shard", "files_source"):
        monkeypatch.setattr(f"megatrain.data.corpus.{module}.SHARD_BYTES", 40_000)
    folder = tmp_path / "in"
    folder.mkdir()
    texts = planted[0][:240]
    for name, part in (("a", texts[:170]), ("b", texts[170:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder


def test_prepare_drops_near_duplicates_on_any_number_of_workers_and_after_an_interruption(
    corpus, planted, monkeypatch, capsys
):
    whole = prepare(config(corpus, "whole"))
    card = Card.load(whole)
    kept = planted[1][:240]
    copies = sum(first != number for number, first in enumerate(kept))
    assert 0.95 * copies <= card.counts["near_duplicates"] <= copies
    assert card.counts["near_duplicates"] == card.near_duplicates["documents"]
    assert card.config["clean"]["minhash"]["bands"] == 14
    assert "near duplicates: " in capsys.readouterr().err
    examples = [json.loads(line) for line in (whole / "examples.jsonl").read_text().splitlines()]
    assert {example["step"] for example in examples} == {"near_duplicates"} and len(examples) == 20

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("megatrain.data.corpus.near_duplicates._check", interrupted)
        prepare(config(corpus))
    monkeypatch.setattr(pipeline, "CHUNK_RECORDS", 11)
    for name, workers in (("d", 1), ("two", 2)):
        again = Card.load(prepare(config(corpus, name, workers)))
        assert (again.fingerprint, again.near_duplicates) == (card.fingerprint, card.near_duplicates)
    assert "parts of the corpus were cleaned earlier" in capsys.readouterr().err


def test_the_older_key_and_older_cards_mean_the_same_as_ever(corpus, capsys):
    (corpus / "c.jsonl").write_text(2 * '{"text": "twice"}\n')
    for name, old, dedup, duplicates in (
        ("yes", True, "exact", 1),
        ("no", False, "none", 0),
        ("none", True, "none", 0),
    ):
        folder = prepare(config(corpus, name, deduplicate=old, dedup="none" if name == "none" else "exact"))
        card = json.loads((folder / "card.json").read_text())
        assert card["counts"].get("duplicates", 0) == duplicates
        assert card["config"]["clean"] == {"steps": [], "dedup": dedup}
        assert "deduplicate" not in card["config"]["data"]
        card["config"]["data"]["deduplicate"] = dedup == "exact"
        del card["config"]["clean"], card["near_duplicates"]
        (folder / "card.json").write_text(json.dumps(card))
        capsys.readouterr()
        prepare(config(corpus, name, dedup=dedup))
        assert "already prepared" in capsys.readouterr().err
        with pytest.raises(ConfigError, match=rf"clean.dedup \(was {dedup}, now minhash\)"):
            prepare(config(corpus, name))
    with pytest.raises(ConfigError, match=r"data.deduplicate=false and clean.dedup=minhash contradict"):
        prepare(config(corpus, "both", deduplicate=False))
