"""The recipes do what they say on a newcomer's own folder of mixed files."""

import json
import pydoc_data.topics
import random
import re
from pathlib import Path

import jieba
import pytest
from support.raw_corpora import warc_response, web_page

from megatrain.config.choices import choices_of, conf_folder, read_yaml
from megatrain.config.compose import compose
from megatrain.data.card import Card
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.preparation import prepare
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import DataError

VOCABULARY = sorted(set(re.findall(r"\b[a-z]{4,9}\b", " ".join(pydoc_data.topics.topics.values()))))


def prose(seed):
    """Return paragraphs of English that begin with a sentence of their own."""
    draw = random.Random(seed)

    def sentence():
        between = ["the", "of the", "to", "and", "that", "have", "with a", "in the", "on", "for", "from this", "by"]
        words = [f"{draw.choice(between)} {draw.choice(VOCABULARY)}" for _ in range(6)]
        return " ".join(words).capitalize() + draw.choice(".....?!")

    paragraphs = [" ".join(sentence() for _ in range(5)) for _ in range(4)]
    return f"This is the text with the number {seed} of them. " + "\n\n".join(paragraphs)


def chinese(seed):
    """Return sentences of common two-character words of jieba's dictionary."""
    draw = random.Random(seed)
    lines = (Path(jieba.__file__).parent / "dict.txt").read_text(encoding="utf-8").splitlines()
    words = [word for word, count, *_ in map(str.split, lines) if len(word) == 2 and int(count) > 3000]

    def sentence():
        return "".join(
            f"{draw.choice(['的', '在', '是', '和', '了', '有', '也'])}{draw.choice(words)}" for _ in range(8)
        )

    return "\n".join("，".join(sentence() for _ in range(3)) + "。" for _ in range(6))


def as_page(text):
    paragraphs = "".join(f"<p>{paragraph}</p>\n" for paragraph in text.split("\n\n"))
    return web_page("MIDDLE").replace("<p>MIDDLE</p>", paragraphs)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Write a folder of prose in every kind of file, and what an English web recipe must leave out."""
    folder = tmp_path_factory.mktemp("mixed") / "mine"
    (folder / "code").mkdir(parents=True)
    for i in range(6):
        (folder / f"note{i}.txt").write_text(prose(i) + "\n")
        (folder / f"read{i}.md").write_text(f"# Title {i}\n\n{prose(10 + i)}\n")
        (folder / f"page{i}.html").write_text(as_page(prose(20 + i)))
        (folder / "code" / f"f{i}.py").write_text(f"def f{i}(x):\n    return {{x: {i}}}\n" * 9)
        (folder / f"chinese{i}.txt").write_text(chinese(i))
    rows = [{"text": prose(30 + i)} for i in range(6)] + [{"text": prose(3) + " One more."}]  # nearly note3
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    urls = [f"https://docs{i}.python.org/{i}" for i in range(4)] + ["https://docs.python.org/porn/tube-sex"] * 2
    pages = [warc_response(as_page(prose(40 + i)).encode(), url) for i, url in enumerate(urls)]
    (folder / "crawl.warc").write_bytes(b"".join(pages))
    (folder / "address.txt").write_text(prose(50) + " Write to ann@corp.example or 8.8.8.8 about it.")
    return folder


def prepared(folder, *words, workers=1):
    data = [f"data.paths=[{folder}]", f"data.dir={folder.parent}_out", "data.name=d", f"data.workers={workers}"]
    data.append("data.overwrite=true")
    return prepare(compose("prepare", ["data=files", *data, "tokenizer.vocab_size=2000", *words]))


def texts_of(dataset):
    tokenizer = load_tokenizer(dataset / "tokenizer")
    found = []
    for split in Card.load(dataset).splits:
        opened = IndexedDataset.open(dataset, split)
        ids = opened.read(0, opened.num_tokens).tolist()
        while ids:
            end = ids.index(tokenizer.end_of_document)
            found.append(tokenizer.decode(ids[:end]))
            ids = ids[end + 1 :]
    return found


def test_fineweb_keeps_english_prose_of_any_kind_of_file_and_nothing_else(mixed):
    dataset = prepared(mixed, "clean=fineweb")
    card = Card.load(dataset)
    texts = texts_of(dataset)
    kept = sorted(int(re.search(r"with the number (\d+) of them", text)[1]) for text in texts)
    assert kept == sorted([*range(6), *range(10, 16), *range(20, 26), *range(30, 36), *range(40, 44), 50])
    by_step = {report["name"]: report["rules"] for report in card.cleaning}
    assert sum(by_step["url_filter"].values()) == 2
    assert by_step["language"]["language_zh"] == 6
    assert card.counts["near_duplicates"] == 1
    (masked,) = [text for text in texts if "number 50 of them" in text]
    assert masked.endswith("Write to <EMAIL> or <IP> about it.")
    assert not any("Section 1" in text or "def f" in text for text in texts)


def test_code_and_chinese_have_recipes_that_keep_theirs(mixed):
    code = texts_of(prepared(mixed / "code", "clean=code", "clean.dedup=exact"))
    assert sorted(code) == sorted((mixed / "code" / f"f{i}.py").read_text() for i in range(6))
    with pytest.raises(DataError, match=r"the corpus is empty .*; clean=fineweb: language removed"):
        prepared(mixed / "code", "clean=fineweb")


def test_fineweb_has_the_published_steps_in_their_order():
    """The order of datatrove's examples/fineweb.py and of the paper (arXiv 2406.17557, 3.1 to 3.6)."""
    names = [step if isinstance(step, str) else next(iter(step)) for step in recipe("fineweb")["steps"]]
    assert names == [
        "url_filter", "html", "language", "gopher_repetition", "gopher_quality", "c4_quality", "fineweb_quality",
        "personal_data",
    ]  # fmt: skip
    assert {"language": {"keep": ["en"], "min_score": 0.65}} in recipe("fineweb")["steps"]
    composed = compose("prepare", ["data.name=d", "clean=fineweb"]).clean
    assert (composed.dedup, composed.minhash.bands, composed.minhash.rows, composed.minhash.ngram) == (
        "minhash",
        14,
        8,
        5,
    )


def recipe(name):
    return read_yaml(conf_folder() / "clean" / f"{name}.yaml")[0]


@pytest.mark.parametrize("name", choices_of("clean"))
def test_every_recipe_prepares_something_from_a_folder_of_its_kind(name, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(8):
        content = {"zh": chinese(i), "code": f"def f{i}(x):\n    return x + {i}\n"}.get(name, prose(60 + i))
        (folder / f"{i}.{'py' if name == 'code' else 'txt'}").write_text(content)
    dataset = prepared(folder, f"clean={name}")
    assert len(texts_of(dataset)) >= 4
