"""Documents lose what they share with evaluation sets: exactly what a search word by word finds."""

import gzip
import json
import os
import pickle
import random
import tracemalloc

import numpy as np
import pytest
import yaml

from megatrain.config import CleanConfig, DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import Card, made_by
from megatrain.data.corpus import evaluation_sets, ngram_table, words
from megatrain.data.corpus.document import Document
from megatrain.data.corpus.evaluation_sets import find_sets
from megatrain.data.corpus.ngram_table import NgramTable, write_table
from megatrain.data.corpus.recipe import build_recipe, settings_of
from megatrain.data.corpus.words import split
from megatrain.data.indexed import hash_file
from megatrain.data.preparation import prepare
from megatrain.errors import ConfigError, DataError

QUESTION = "Which of the following planets has the largest number of known moons in our solar system today?"
FILLER = " ".join(f"filler{i}" for i in range(100))


def step(**parameters):
    return build_recipe([{"decontaminate": parameters}])[0]


@pytest.fixture
def sets(tmp_path):
    """Write a set of questions and a set of plain text."""
    questions = [{"question": QUESTION, "choices": ["Saturn", "Jupiter"], "id": 1}, {"question": "short", "id": 2}]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n\n")
    (tmp_path / "poem.txt").write_text("The first line of a poem, which goes on\nto a second line, and so to the end.")
    return [str(tmp_path / "quiz.jsonl"), str(tmp_path / "poem.txt")]


def made(sets, size, folder):
    write_table(find_sets(sets), size, folder)
    return NgramTable(folder)


def reference(texts_by_set, document, size):
    """Return the word places at which an n-gram begins that a set has, by set and length, as plain tuples."""
    words = split(document)
    found = set()
    for number, texts in enumerate(texts_by_set):
        for text in texts:
            wanted = split(text)
            length = size if len(wanted) >= size else len(wanted)
            if length < min(size, 8):
                continue
            ngrams = {tuple(wanted[at : at + length]) for at in range(len(wanted) - length + 1)}
            for at in range(len(words) - length + 1):
                if tuple(words[at : at + length]) in ngrams:
                    found.add((number, length, at))
    return found


@pytest.mark.parametrize("batch", [2**21, 1])
@pytest.mark.parametrize("size", [2, 9, 13])
def test_the_hits_are_those_of_a_search_word_by_word(tmp_path, monkeypatch, size, batch):
    """Sets overlap, texts are shorter and longer than an n-gram, words recur, and batches are cut anywhere."""
    monkeypatch.setattr(ngram_table, "_BATCH", batch)
    random_ = random.Random(size)

    def text(count):
        letters = ["a", "b", "É", "字"] if size < 9 else ["a", "É"]
        return random_.choice([" ", ", "]).join(random_.choice(letters) for _ in range(count))

    texts = [[text(random_.randrange(1, 25)) for _ in range(12)] for _ in range(3)]
    texts[2][:3] = texts[1][:3]
    for number, part in enumerate(texts):
        (tmp_path / f"s{number}.json").write_text(json.dumps(part))
    table = made([str(tmp_path / f"s{number}.json") for number in range(3)], size, tmp_path / "table")
    total = 0
    for _ in range(60):
        document = " ".join([text(30), random_.choice(random_.choice(texts)).lower(), text(30), "end."])
        words = [(len(split(document[: hit.start])), hit) for hit in table.find(document)]
        found = {(hit.set, len(split(document[hit.start : hit.stop])), at) for at, hit in words}
        expected = reference(texts, document, size)
        assert found == expected and len(words) == len(found)
        total += len(found)
    assert total > 60


def test_a_document_with_a_question_is_dropped_whatever_its_case_and_spacing(sets):
    clean = step(sets=sets)
    inside = QUESTION.upper().replace(" ", "\n  ").replace("?", "")
    removal = clean.apply(Document(f"{FILLER} {inside} {FILLER}", "a"))
    assert removal.rule == "quiz" and "set quiz: WHICH\n  OF" in removal.detail
    twelve = " ".join(QUESTION.split()[:12])
    assert clean.apply(Document(f"{FILLER} {twelve} {FILLER}", "b")) is None
    assert step(sets=sets, ngram=12).apply(Document(f"{FILLER} {twelve} {FILLER}", "b")).rule == "quiz"
    poem = "a poem which goes on to a second line and so to the"
    assert clean.apply(Document(f"x {poem} y", "c")).rule == "poem"


def test_a_table_is_built_in_bounded_memory_and_mapped_by_workers(tmp_path, monkeypatch):
    lines = [json.dumps({"text": " ".join(f"w{number}n{at} é" for at in range(150))}) for number in range(1000)]
    (tmp_path / "large.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(ngram_table, "_BATCH", 2**14)
    clean = step(sets=[str(tmp_path / "large.jsonl")])
    clean.share(tmp_path / "other")  # what words are made of is now in memory
    digest = hash_file(tmp_path / "large.jsonl")
    monkeypatch.setattr(evaluation_sets, "hash_file", lambda path: digest)  # its buffer is as large as this whole set
    peaks = []
    for again in range(3):  # what other threads of this process allocate meanwhile is traced too: the least counts
        tracemalloc.start()
        clean = step(sets=[str(tmp_path / "large.jsonl")])
        clean.share(tmp_path / ("tables" if again == 2 else f"tables{again}"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    (folder,) = (tmp_path / "tables").iterdir()
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size > 8e6 and min(peaks) < size / 4, peaks
    table = NgramTable(folder)
    assert all(
        isinstance(array, np.memmap) and not array.flags.writeable for array in (table._texts, *table._sizes[0][1:])
    )
    assert len(pickle.dumps(clean)) < 2000, "workers get the place of the table, not the table"
    assert (
        pickle.loads(pickle.dumps(clean)).apply(Document("w3n4 é w3n5 é w3n6 É w3n7 e w3n8 é w3n9 é w3n10", "a")).rule
        == "large"
    )


def test_the_table_is_made_once_and_not_again_by_another_process(sets, tmp_path, monkeypatch):
    step(sets=sets).share(tmp_path / "tables")
    monkeypatch.setattr("megatrain.data.corpus.steps.decontaminate.write_table", lambda *_: 1 / 0)
    again = step(sets=sets)
    again.share(tmp_path / "tables")
    assert again.apply(Document(f"{FILLER} {QUESTION}", "a")).rule == "quiz"
    with pytest.raises(ZeroDivisionError):
        step(sets=sets, ngram=12).share(tmp_path / "tables")


def test_an_equal_hash_of_other_words_is_no_hit(sets, monkeypatch, tmp_path):
    original = words.hash_ngrams

    def colliding(found, size, short):
        hashes, offsets = original(found, size, short)
        hashes[:] = 7
        return hashes, offsets

    table = made(sets, 13, tmp_path / "table")
    table._sizes = [(length, hashes * 0 + 7, rows) for length, hashes, rows in table._sizes]
    monkeypatch.setattr(ngram_table, "hash_ngrams", colliding)
    assert list(table.find(FILLER)) == []
    assert len(list(table.find(QUESTION))) == len(QUESTION.split()) - 12


def test_cut_removes_the_passages_and_their_margins_and_counts_them_by_set(sets):
    text = f"{FILLER} {QUESTION} {FILLER} {QUESTION[:-1]}\n{FILLER}"
    document = Document(text, "a")
    assert step(sets=sets, action="cut", margin=0, min_piece=0).apply(document) is None
    assert document.text == f"{FILLER} \n? {FILLER} \n\n{FILLER}"
    assert document.counts == {"quiz": 2}
    document = Document(text, "a")
    assert step(sets=sets, action="cut").apply(document) is None
    first = text.index(QUESTION)
    second, size = text.index(QUESTION[:-1], first + 1), len(QUESTION) - 1  # without the question mark
    assert document.text.split("\n") == [
        text[: first - 200],
        text[first + size + 200 : second - 200],
        text[second + size + 200 :],
    ]
    assert step(sets=sets, action="cut", max_pieces=2).apply(Document(text, "a")).rule == "many_pieces"
    assert step(sets=sets, action="cut").apply(Document(f"a {QUESTION} b", "a")).rule == "quiz"
    document = Document(f"a short piece, {QUESTION[:-1]} {FILLER}", "a")
    assert step(sets=sets, action="cut", margin=0).apply(document) is None and document.text == f" {FILLER}"
    untouched = Document(FILLER, "a")
    assert step(sets=sets, action="cut").apply(untouched) is None and untouched.text == FILLER


def test_fields_and_names_can_be_given_and_files_compressed(tmp_path):
    record = {"q": {"text": [QUESTION]}, "answer": FILLER}
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps(record))
    entry = {"path": str(tmp_path / "a.jsonl.gz"), "name": "mine", "fields": ["q"]}
    assert step(sets=[entry]).apply(Document(QUESTION, "a")).rule == "mine"
    assert step(sets=[entry]).apply(Document(FILLER, "a")) is None
    assert step(sets=[entry["path"]]).apply(Document(FILLER, "a")).rule == "a"
    with pytest.raises(DataError, match=r"a.jsonl.gz:1: no field 'p'"):
        step(sets=[entry | {"fields": ["p"]}]).apply(Document("a", "a"))


def test_what_cannot_work_is_refused(tmp_path, sets):
    for given, message in [
        ([], "sets: empty"),
        ([3], r"sets\[0\]: 3: expected a path"),
        ([{"file": "x"}], r"sets\[0\]: .* expected a path"),
        ([str(tmp_path / "none.txt")], r"sets\[0\]: .*none.txt cannot be read \(No such file"),
        ([sets[0], {"path": sets[1], "name": "quiz"}], "two have the name quiz"),
        ([{"path": sets[0], "fields": "question"}], r"sets\[0\].fields=question: expected a list"),
    ]:
        with pytest.raises(ConfigError, match=message):
            step(sets=given)
    (tmp_path / "few.txt").write_text("seven words are too few to match")
    with pytest.raises(DataError, match="no text of at least 8 words"):
        step(sets=[str(tmp_path / "few.txt")]).apply(Document("a", "a"))
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"bad.jsonl: not JSON"):
        step(sets=[str(tmp_path / "bad.jsonl")]).apply(Document("a", "a"))


def test_a_set_that_changes_on_disk_makes_another_dataset(tmp_path, sets):
    before = settings_of([step(sets=sets)])
    old = step(sets=sets)
    with open(sets[0], "a") as file:
        file.write(json.dumps({"question": FILLER}) + "\n")
    assert settings_of([step(sets=sets)]) != before
    with pytest.raises(DataError, match=r"quiz.jsonl: the evaluation set has changed"):
        old.apply(Document("a", "a"))
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / "in" / f"{i}.txt").write_text(
            f"document {i} {FILLER if i == 3 else QUESTION if i == 7 else 'fine'}"
        )

    def prepared(name, workers=1):
        data = DataConfig(
            name=name, dir=str(tmp_path / "out"), kind="files", paths=[str(tmp_path / "in")], workers=workers
        )
        steps = [{"decontaminate": {"sets": sets}}]
        tokenizer = TokenizerConfig(vocab_size=400)
        return Card.load(prepare(PrepareConfig(data=data, clean=CleanConfig(steps=steps), tokenizer=tokenizer)))

    card = prepared("d")
    assert card.cleaning[0]["rules"] == {"quiz": 2}
    (steps,) = [yaml.safe_load(word.partition("=")[2]) for word in made_by(card) if word.startswith("clean.steps=")]
    assert settings_of(build_recipe(steps)) == card.config["clean"]["steps"]
    assert prepared("two", workers=2).fingerprint == card.fingerprint
    with open(sets[1], "a") as file:
        file.write("more")
    os.utime(sets[1], ns=(1, 1))
    with pytest.raises(ConfigError, match=r"prepared with other settings: clean.steps"):
        prepared("d")
