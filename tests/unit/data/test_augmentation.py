"""Augmenting steps change documents as their seed and the document's id say, and keep what they promise to keep."""

import json
import random
import re
from collections import Counter

import pytest

from megatrain.config import CleanConfig, DataConfig, PrepareConfig, TokenizerConfig
from megatrain.config.choices import choices_of
from megatrain.config.compose import compose
from megatrain.data.card import Card
from megatrain.data.corpus.augmentation import Augmentation, sentences
from megatrain.data.corpus.cleaned import unpack_frame
from megatrain.data.corpus.cleaning import CleanTask, clean_chunk
from megatrain.data.corpus.document import Document
from megatrain.data.corpus.recipe import build_recipe, new_reports, run_recipe
from megatrain.data.corpus.record import Policy, Record
from megatrain.data.corpus.steps.registry import STEPS
from megatrain.data.funnel import funnel
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.preparation import prepare
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import ConfigError

ENGLISH = (
    'Dr. Smith went home. "Was it late?" he asked. It was! They ate bread (and cheese.) Nobody spoke of J. Doe again.\n'
    "    A second line, e.g. this one, stays below. It has two sentences.\n\nThe end."
)
CHINESE = "今天天气很好。我们去公园散步！你来吗？他说：“我来。”大家都很高兴……\n第二段只有一句话"
ALWAYS = {"rate": 1.0}


def step(name, **parameters):
    return build_recipe([{name: {**ALWAYS, **parameters}}])[0]


def changed(one, text, id="d"):
    document = Document(text, id)
    assert one.apply(document) is None
    return document.text


def test_no_recipe_augments_unless_it_is_told_to():
    augmenting = {name for name, kind in STEPS.items() if issubclass(kind, Augmentation)}
    assert augmenting == {"reorder_sentences", "replace_synonyms", "noise", "mix_turns", "back_translate"}
    for choice in choices_of("clean"):
        recipe = build_recipe(compose("prepare", [f"clean={choice}"]).clean.steps)
        assert augmenting.isdisjoint(one.name for one in recipe)


# ------------------------------------------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    "line, expected",
    [
        ("It was late. He left! Why? So.", ["It was late.", "He left!", "Why?", "So."]),
        ('"Was it?" he asked. Yes.', ['"Was it?" he asked.', "Yes."]),
        ("Dr. Smith met J. Doe, e.g. here. Then no.", ["Dr. Smith met J. Doe, e.g. here.", "Then no."]),
        ("Version 1.2 is out. See a.b.c now", ["Version 1.2 is out.", "See a.b.c now"]),
        ("好。我们去！你来吗？他说：“我来。”走", ["好。", "我们去！", "你来吗？", "他说：“我来。”", "走"]),
        ("  indented. Text", ["", "indented.", "Text"]),
        ("", []),
    ],
)
def test_sentences_of_a_line(line, expected):
    assert [text for text, _ in sentences(line)] == expected


def test_sentences_are_those_of_their_definition_as_one_expression():
    end = r"[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？；…]+[\"'”’」』）》]*"
    definition = re.compile(rf"(.+?(?:{end}|$))(\s*)")  # quadratic in the length of the line
    draw = random.Random(0)
    parts = [*".!?\"')]。！…」）” aAb\t\u3000你", "Mr", "etc", "A.", "approx.", ".. "]
    for _ in range(20_000):
        line = "".join(draw.choices(parts, k=draw.randrange(14)))
        indent = line[: len(line) - len(line.lstrip())]
        expected = [("", indent)] if indent else []
        for text, gap in definition.findall(line[len(indent) :]):
            before, space = expected[-1] if expected else ("", "")
            goes_on = re.search(r"(\b([A-Za-z]|Mr|approx)|\betc)\.$", before) or text[0].islower()
            if before and goes_on:
                expected[-1] = before + space + text, gap
            else:
                expected.append((text, gap))
        assert sentences(line) == expected, line


@pytest.mark.parametrize("line", ["." * 10**6 + "a", "?!" * 10**5 + "x", "a. " * 10**5, "some words. " * 10**5])
def test_a_long_line_of_marks_takes_no_longer_than_another(line):
    assert sentences(line.strip()) == [(line.strip(), "")]  # hours, were the time quadratic


def test_sentences_joined_are_the_line():
    rng = random.Random(1)
    parts = [" ", "  ", ". ", "。", "!", "? ", "a", "Dr", "1.5", "\t", "“", "”", "x y", "…", "\u3000"]
    for _ in range(2000):
        line = "".join(rng.choices(parts, k=rng.randrange(12)))
        assert "".join(text + gap for text, gap in sentences(line)) == line


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_reordered_lines_have_the_same_sentences_in_their_places(text):
    found = {changed(step("reorder_sentences", seed=seed), text) for seed in range(20)}
    assert len(found) > 10
    for result in found:
        for line, before in zip(result.split("\n"), text.split("\n"), strict=True):
            now, was = sentences(line), sentences(before)
            assert Counter(one for one, _ in now) == Counter(one for one, _ in was)
            assert re.findall(r"^\s*", line) == re.findall(r"^\s*", before)
            assert len(line) == len(before)


def test_a_sentence_moves_no_further_than_the_distance():
    text = " ".join(f"Sentence {number} is here." for number in range(40))
    for distance in (1, 3):
        moved = [changed(step("reorder_sentences", distance=distance, seed=seed), text) for seed in range(20)]
        places = [[int(number) for number in re.findall(r"\d+", one)] for one in moved]
        furthest = max(abs(place - number) for order in places for place, number in enumerate(order))
        assert furthest == distance


# ------------------------------------------------------------------------------------------------- noise


def noisy(text, **only):
    return changed(step("noise", **{"swap": 0.0, "drop": 0.0, "typo": 0.0, **only}), text)


LONG = "The quick brown fox, 42 of them, jumps over lazy dogs.\n今天天气很好，我们去公园。\n" * 300


def test_dropped_letters_are_as_many_as_the_rate_says_and_no_others_change():
    result = noisy(LONG, drop=0.1)
    letters = sum(map(str.isalpha, LONG))
    missing = len(LONG) - len(result)
    assert abs(missing - 0.1 * letters) < 4 * (0.09 * letters) ** 0.5
    rest = iter(LONG)
    assert all(letter in rest for letter in result)  # a subsequence
    assert re.sub(r"[^\W\d_]", "", result) == re.sub(r"[^\W\d_]", "", LONG)


def test_swapped_letters_stay_in_their_word_or_run():
    result = noisy(LONG, swap=0.1)
    assert result != LONG and len(result) == len(LONG)
    words, before = re.split(r"[\W\d_]+", result), re.split(r"[\W\d_]+", LONG)
    assert [Counter(word) for word in words] == [Counter(word) for word in before]


def test_repeated_letters_are_beside_themselves():
    result = noisy(LONG, repeat=0.05)
    letters = sum(map(str.isalpha, LONG))
    assert abs(len(result) - len(LONG) - 0.05 * letters) < 4 * (0.05 * letters) ** 0.5
    assert re.sub(r"(\w)\1+", r"\1", result) == re.sub(r"(\w)\1+", r"\1", LONG)


def test_typos_are_keys_beside_the_letter_in_its_case():
    result = noisy(LONG, typo=0.2)
    pairs = {(was, now) for was, now in zip(LONG, result, strict=True) if was != now}
    assert {now for was, now in pairs if was == "o"} <= set("ipkl") and ("T", "t") not in pairs
    assert all(was.isascii() and was.isalpha() and was.isupper() == now.isupper() for was, now in pairs)
    assert {now for was, now in pairs if was == "s"} <= set("qweadzxc")


def test_probabilities_that_exceed_one_are_refused():
    with pytest.raises(ConfigError, match=r"swap, drop, repeat and typo add up to 1.1"):
        step("noise", swap=0.5, drop=0.6, typo=0.0)
    with pytest.raises(ConfigError, match=r"add up to 1.0000001, more than 1"):
        step("noise", swap=0.5, drop=0.5, typo=0.0, repeat=1e-7)
    tenths = step("noise", swap=0.7, drop=0.1, typo=0.1, repeat=0.1)  # 1 exactly, though not where added in turn
    assert tenths.swap == 0.7


# ------------------------------------------------------------------------------------------------- synonyms


@pytest.fixture
def table(tmp_path):
    english = "big\tlarge\nquick\tfast\tswift\n\nwell-known\tfamous\n"
    (tmp_path / "t.tsv").write_text(f"{english}高兴\t开心\n公园\t园林\n好人\t坏\n")
    return str(tmp_path / "t.tsv")


def test_synonyms_are_written_like_the_words(table):
    one = step("replace_synonyms", table=table, word_rate=1.0)
    assert changed(one, "Big BIG big bigger well-known, big.") == "Large LARGE large bigger famous, large."
    assert {changed(one, "quick", id=str(number)) for number in range(20)} == {"fast", "swift"}


def test_chinese_words_are_those_of_jieba(table):
    one = step("replace_synonyms", table=table, word_rate=1.0)
    assert changed(one, "我们很高兴地去公园big玩。你好人们") == "我们很开心地去园林large玩。你好人们"


def test_the_share_of_words_is_replaced(table):
    result = changed(step("replace_synonyms", table=table, word_rate=0.3), "big " * 2000)
    assert 480 < result.count("large") < 720


def test_a_table_may_be_json_and_another_table_is_another_recipe(tmp_path):
    place = tmp_path / "t.json"
    place.write_text(json.dumps({"big": ["large"]}))
    first = step("replace_synonyms", table=str(place), word_rate=1.0)
    assert changed(first, "big") == "large"
    place.write_text(json.dumps({"big": ["vast!"]}))
    second = step("replace_synonyms", table=str(place), word_rate=1.0)
    assert changed(second, "big") == "vast!" and second.settings() != first.settings()


@pytest.mark.parametrize("name, content", [("t.tsv", "big\tlarge\r\n"), ("t.JSON", '{"big": ["large"]}')])
def test_a_table_may_begin_with_a_byte_order_mark(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert changed(step("replace_synonyms", table=str(tmp_path / name), word_rate=1.0), "big") == "large"


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "table: .*t.tsv"),
        (b"word\n", "line 1: expected a word and its synonyms"),
        (b"a\ta\n", "line 1: expected a word and its synonyms"),
        (b"\n", "has no words"),
        (b"\xe9\tb", "not a text in UTF-8"),
        (b"hot dog\tsausage\n12\ttwelve", "no entry is a single word of letters, as '12'"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.tsv").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        step("replace_synonyms", table=str(tmp_path / "t.tsv"))
    with pytest.raises(ConfigError, match=r"replace_synonyms.table: missing"):
        step("replace_synonyms")


@pytest.mark.parametrize("content", ["[1]", "{", '{"a": "b"}', '{"a": ["\\ud800"]}'])
def test_a_bad_json_table_is_refused(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ConfigError, match=r"t.json"):
        step("replace_synonyms", table=str(tmp_path / "t.json"))


# ------------------------------------------------------------------------------------------------- conversations


def chat(number):
    turns = [{"role": "system", "content": "Be kind."}] if number % 2 else []
    for place in range(4):
        turns += [
            {"role": "user", "content": f"question {number}.{place}\n\nmore of it"},
            {"role": "assistant", "content": f"answer {number}.{place}"},
        ]
    return Record(json.dumps({"messages": turns}).encode(), f"f:{number}", kind="json")


def cleaned(records, *steps):
    result = clean_chunk(CleanTask(records, Policy("text", "replace"), build_recipe(list(steps)), 1))
    return [text.decode() for text in unpack_frame(result.frame, len(result.documents))], result


def test_exchanges_of_earlier_conversations_are_mixed_in_whole():
    mixing = {"mix_turns": {"rate": 1.0, "exchange_rate": 0.5}}
    texts, result = cleaned([chat(number) for number in range(60)], mixing)
    foreign = 0
    for number, text in enumerate(texts):
        assert text.startswith("System: Be kind.\n\nUser: ") == bool(number % 2)
        pairs = re.findall(r"User: question (\d+)\.(\d)\n\nmore of it\n\nAssistant: answer (\d+)\.(\d)", text)
        assert len(pairs) == 4 and all(pair[:2] == pair[2:] for pair in pairs)
        assert all(int(pair[0]) <= number for pair in pairs)
        foreign += sum(int(pair[0]) != number for pair in pairs)
    assert 80 < foreign < 160
    assert result.reports[0].changes["exchanges"] == foreign
    assert texts[0] == cleaned([chat(0)])[0][0]


def test_documents_that_are_no_conversations_stay():
    plain = Record(json.dumps({"text": "User: a\n\nAssistant: b"}).encode(), "f:1", kind="json")
    assert (
        cleaned([chat(0), plain], {"mix_turns": {"rate": 1.0, "exchange_rate": 1.0}})[0][1] == "User: a\n\nAssistant: b"
    )


# ------------------------------------------------------------------------------------------------- all of them


def test_what_is_drawn_depends_on_the_seed_and_the_id_alone():
    texts = {str(number): f"One {number}. Two. Three. Four. Five. Six." for number in range(2000)}

    def chosen(seed, order):
        one = build_recipe([{"reorder_sentences": {"rate": 0.3, "seed": seed}}])[0]
        return {number: changed(one, texts[number], number) for number in order}

    first = chosen(1, texts)
    assert first == chosen(1, reversed(texts))
    augmented = {number for number in texts if first[number] != texts[number]}
    assert 500 < len(augmented) < 700
    again = chosen(2, texts)
    assert len(augmented ^ {number for number in texts if again[number] != texts[number]}) > 300


def test_augmented_documents_are_marked_and_counted():
    recipe = build_recipe([{"noise": {"rate": 1.0, "drop": 0.0, "swap": 0.0}}, {"reorder_sentences": {"rate": 1.0}}])
    document, reports = Document(ENGLISH, "d"), new_reports(recipe)
    assert run_recipe(recipe, document, reports, 1)
    assert document.augmented == ("noise", "reorder_sentences") and document.id == "d+noise+reorder_sentences"
    assert [report.changes["augmented"] for report in reports] == [1, 1]
    unchanged, reports = Document("123", "e"), new_reports(recipe)
    assert run_recipe(recipe, unchanged, reports, 1) and unchanged.augmented == () and unchanged.id == "e"
    assert reports[0].changes == {"unchanged": 1}


def test_an_original_that_is_kept_goes_through_the_later_steps():
    records = [Record(f"Write to ann{n}@example.org. {'Word. ' * n}".encode(), f"f:{n}") for n in range(2, 12)]
    keeping = {"noise": {"rate": 1.0, "drop": 0.2, "keep_original": True}}
    texts, result = cleaned(records, keeping, "personal_data", {"length": {"min_characters": 60}})
    plain, _ = cleaned(records, "personal_data", {"length": {"min_characters": 60}})
    assert set(plain) < set(texts) and len(texts) > len(plain) + 2
    assert not any("ann" in text and "@example.org" in text for text in texts)
    noise, personal, length = result.reports
    assert (noise.documents_in, noise.documents_out, noise.added) == (10, 20, 10)
    assert personal.documents_in == 20 and length.documents_out == len(texts)
    assert noise.bytes_out == personal.bytes_in
    assert result.counts["augmented"] == len(texts) - len(plain)


def test_an_original_and_its_augmented_document_are_held_out_together(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"id": str(n), "text": f"Document {n}. Two. Three. Four."}) + "\n" for n in range(300))
    )
    words = [
        "data=files", f"data.paths=[{tmp_path / 'a.jsonl'}]", f"data.dir={tmp_path}", "data.name=d", "data.workers=1",
        "data.heldout_fraction=0.3", "tokenizer.vocab_size=300",
        "clean.steps=[{reorder_sentences: {rate: 0.5, keep_original: true}}]",
    ]  # fmt: skip
    folder = prepare(compose("prepare", words))
    card, tokenizer = Card.load(folder), load_tokenizer(folder / "tokenizer")
    numbers = {}
    for split in ("train", "heldout"):
        texts = [tokenizer.decode(ids.tolist()) for ids in IndexedDataset.open(folder, split).documents()]
        numbers[split] = Counter(re.search(r"Document (\d+)", text)[1] for text in texts)
    assert numbers["train"].keys().isdisjoint(numbers["heldout"].keys())
    assert len(numbers["train"]) + len(numbers["heldout"]) == 300
    added = card.cleaning[0]["added"]
    assert 100 < added < 200 and numbers["heldout"].total() > len(numbers["heldout"])
    assert numbers["train"].total() + numbers["heldout"].total() == 300 + added == 300 + card.counts["augmented"]
    stage = next(stage for stage in funnel(card) if stage.name == "reorder_sentences")
    assert (stage.removed, stage.added, stage.documents_out) == (0, added, 300 + added)


def test_the_dataset_is_the_same_on_any_number_of_workers(tmp_path, monkeypatch, table):
    for part in range(3):
        lines = [chat(number).payload.decode() for number in range(part * 40, part * 40 + 40)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    steps = (
        f"clean.steps=[mix_turns: {{rate: 0.5, keep_original: true}}, reorder_sentences, noise: {{rate: 0.5}}, "
        f"replace_synonyms: {{table: {table}}}]"
    )
    steps = re.sub(r"(\w+: \{rate[^}]*\}|\w+: \{table[^}]*\})", r"{\1}", steps)
    fingerprints = []
    for name, workers in (("one", 1), ("two", 2)):
        words = ["data=files", f"data.paths=[{tmp_path}/*.jsonl]", f"data.dir={tmp_path}", f"data.name={name}",
                 f"data.workers={workers}", "tokenizer.vocab_size=320", "clean.dedup=none", steps]  # fmt: skip
        fingerprints.append(Card.load(prepare(compose("prepare", words))).fingerprint)
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize("fraction", [0.3, 0.001])
@pytest.mark.parametrize("passages", ["none", "lines"])
def test_an_original_and_its_copy_are_on_one_side_of_the_held_out_split(tmp_path, passages, fraction):
    """Also where repeated lines are cut out of the texts, and where one document is held out whatever its draw."""
    many = " and of rivers and of stones" * 20
    lines = [{"text": f"Document {i} tells of hills{many}.\nA line that all of them have.\n"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataConfig(
        name="d", dir=str(tmp_path), kind="files", paths=[str(tmp_path / "a.jsonl")], workers=1,
        heldout_fraction=fraction,
    )  # fmt: skip
    clean = CleanConfig(steps=[{"noise": {"rate": 1.0, "keep_original": True}}], dedup_passages=passages)
    folder = prepare(PrepareConfig(data=data, clean=clean, tokenizer=TokenizerConfig(vocab_size=300)))
    splits = Card.load(folder).splits
    assert splits["heldout"].documents >= 2 and splits["heldout"].documents % 2 == 0
    assert splits["train"].documents + splits["heldout"].documents == 80


def test_one_document_and_its_copy_are_not_held_out_together(tmp_path):
    (tmp_path / "a.txt").write_text("A document tells of hills and of rivers and of stones. " * 20)
    data = DataConfig(name="d", dir=str(tmp_path), kind="files", paths=[str(tmp_path / "a.txt")], workers=1)
    clean = CleanConfig(steps=[{"noise": {"rate": 1.0, "keep_original": True}}])
    tokenizer = TokenizerConfig(vocab_size=285)
    folder = prepare(PrepareConfig(data=data, clean=clean, tokenizer=tokenizer))
    assert {name: split.documents for name, split in Card.load(folder).splits.items()} == {"train": 2}
