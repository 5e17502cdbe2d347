"""Comments that are records of their own become threads, as a search from answer to answer joins them."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatrain.config import DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import Card
from megatrain.data.corpus.decoding import decode
from megatrain.data.corpus.record import BadRecordError, Policy
from megatrain.data.corpus.sources import open_source
from megatrain.data.preparation import prepare
from megatrain.errors import ConfigError, DataError
from megatrain.verbs.value_checks import check_source

REDDIT = [
    {"id": "p1", "title": "A post", "selftext": "What do you say?", "author": "Ann"},
    {"id": "c1", "parent_id": "t3_p1", "link_id": "t3_p1", "author": "Bob", "body": "First."},
    {"id": "c9", "parent_id": "t3_p2", "link_id": "t3_p2", "author": "Eve", "body": "On a post of another file."},
    {"id": "c2", "parent_id": "t1_c1", "link_id": "t3_p1", "author": "[deleted]", "body": "[deleted]"},
    {"id": "c3", "parent_id": "t1_c2", "link_id": "t3_p1", "author": "Ann", "body": "To what is gone."},
    {"id": "c8", "parent_id": "t3_p2", "link_id": "t3_p2", "author": "Fay", "body": "On the same."},
    {"id": "c7", "parent_id": "t1_c6", "link_id": "t3_p2", "author": "Gus", "body": "To one that is missing."},
]
THREADS = [
    "Ann: A post\n\nWhat do you say?\n\nBob, to Ann: First.\n\nAnn, to [deleted]: To what is gone.",
    "Eve: On a post of another file.\n\nFay: On the same.\n\nGus: To one that is missing.",
]


def write(folder, rows, name="a.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def records(folder, **data):
    return list(open_source(DataConfig(name="d", paths=[str(folder)], join_comments=True, **data)).records())


def texts(folder, **data):
    policy = Policy(data.get("text_column", "text"), "replace")
    return [decode(record, policy).text for record in records(folder, **data)]


def test_comments_of_a_dump_become_threads_in_the_order_of_their_first(tmp_path):
    write(tmp_path / "in", REDDIT)
    assert texts(tmp_path / "in") == THREADS
    assert texts(tmp_path / "in", text_column="body") == THREADS
    found = records(tmp_path / "in")
    assert [record.where.rpartition(":")[2] for record in found] == ["1", "3"]


def test_a_tree_of_messages_is_written_with_its_roles(tmp_path):
    rows = [
        {"message_id": "m1", "parent_id": None, "message_tree_id": "m1", "role": "prompter", "text": "How?"},
        {"message_id": "m2", "parent_id": "m1", "message_tree_id": "m1", "role": "assistant", "text": "So."},
        {"message_id": "x1", "parent_id": None, "message_tree_id": "x1", "role": "prompter", "text": "Alone."},
        {"message_id": "m3", "parent_id": "m2", "message_tree_id": "m1", "role": "prompter", "text": "And then?"},
        {"message_id": "m4", "parent_id": "m1", "message_tree_id": "m1", "role": "assistant", "text": "Or so."},
    ]
    write(tmp_path / "in", rows)
    tree = "User: How?\n\nAssistant: So.\n\nUser: And then?\n\nAssistant, to User: Or so."
    assert texts(tmp_path / "in") == [tree, "User: Alone."]


def test_other_records_stay_as_they_are_and_bad_ones_are_bad(tmp_path):
    rows = [{"text": "no id"}, REDDIT[1], {"id": 5, "text": "nobody answers"}, {"id": 0, "text": "zero"},
            {"id": 1, "parent_id": 0, "text": "one"}, {"id": "x", "parent_id": "y", "text": "a"},
            {"id": "y", "parent_id": "x", "text": "b"}]  # fmt: skip
    write(tmp_path / "in", rows)
    (tmp_path / "in" / "b.jsonl").write_bytes(b'{"id": 1, \n\n[1]\n{"id": 2, "parent_id": 1, "text": "caf\xe9"}\n')
    found = records(tmp_path / "in")
    kept, bad = [], []
    for record in found:
        try:
            kept.append(decode(record, Policy("text", "replace")).text)
        except BadRecordError as error:
            bad.append((record.where.rpartition("/")[2], error.problem.kind))
    assert kept == [
        "no id",
        "Bob: First.",
        "nobody answers",
        "Comment: zero\n\nComment, to Comment: one",
        "Comment: caf\ufffd",
    ]
    assert bad == [("a.jsonl:6", "not_a_message"), ("b.jsonl:1", "not_json"), ("b.jsonl:3", "not_object")]


def test_ids_of_a_table_with_nulls_are_joined_and_false_is_no_parent(tmp_path):
    rows = [{"id": 1, "parent_id": None, "text": "one"}, {"id": 2, "parent_id": 1.0, "text": "two"},
            {"id": "False", "text": "three"}, {"id": 4, "parent": False, "text": "four"}]  # fmt: skip
    write(tmp_path / "in", rows)
    assert texts(tmp_path / "in") == ["Comment: one\n\nComment, to Comment: two", "three", "four"]


def test_threads_are_those_of_a_search_from_answer_to_answer(tmp_path):
    """The oracle links each comment with its parent, in the file or not, and takes what hangs together."""
    draw = random.Random(8)
    rows = []
    for i in range(300):
        parent = draw.choice([None, f"n{draw.randrange(400)}", f"n{draw.randrange(max(i, 1))}"])
        rows.append({"id": f"n{i}", "parent_id": parent, "text": f"text {i}"})
    draw.shuffle(rows)
    linked = {}
    for row in rows:
        for one, other in ((row["id"], row["parent_id"]), (row["parent_id"], row["id"])):
            if row["parent_id"] is not None:
                linked.setdefault(one, set()).add(other)
    in_file, seen, expected = [row["id"] for row in rows], set(), []
    for start in in_file:
        if start not in seen:
            group, waiting = set(), [start]
            while waiting:
                if (at := waiting.pop()) not in group:
                    group.add(at)
                    waiting += linked.get(at, ())
            seen |= group
            expected.append({one for one in group if one in set(in_file)})
    write(tmp_path / "in", rows)
    found = [{one["id"] for one in json.loads(record.payload)["comments"]} for record in records(tmp_path / "in")]
    assert found == expected and max(map(len, found)) > 10


def test_a_file_is_joined_whole_however_it_is_stored_and_whoever_works(tmp_path, monkeypatch):
    rows = [
        {"id": f"{t}-{i}", "parent_id": f"{t}-{i - 1}" if i else None, "text": f"t{t} i{i}"}
        for i in range(9)
        for t in range(40)
    ]
    write(tmp_path / "in", rows)
    monkeypatch.setattr("megatrain.data.corpus.files_source.SHARD_BYTES", 300)

    def prepared(name, workers):
        data = DataConfig(
            name=name, dir=str(tmp_path), paths=[str(tmp_path / "in")], workers=workers, join_comments=True
        )
        return prepare(PrepareConfig(data=data, tokenizer=TokenizerConfig(vocab_size=300)))

    card = Card.load(prepared("d", 1))
    assert (card.counts["read"], card.counts["kind_conversation"]) == (40, 40)
    assert Card.load(prepared("e", 2)).fingerprint == card.fingerprint
    plain = texts(tmp_path / "in")
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped" / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "in" / "a.jsonl").read_bytes()))
    (tmp_path / "array").mkdir()
    (tmp_path / "array" / "a.json").write_text(json.dumps(rows))
    assert texts(tmp_path / "zipped") == texts(tmp_path / "array") == plain
    assert plain[3].split("\n\n")[:2] == ["Comment: t3 i0", "Comment, to Comment: t3 i1"]


def test_limits_are_refused_by_name(tmp_path):
    write(tmp_path / "in", REDDIT)
    with pytest.raises(
        DataError, match=r"a.jsonl: data.join_comments=true holds .* data.max_thread_bytes=5000; raise it, or"
    ):
        records(tmp_path / "in", max_thread_bytes=5000)
    with pytest.raises(DataError, match=r"a.jsonl:1: longer than data.max_document_bytes=300"):
        records(tmp_path / "in", max_document_bytes=300)
    assert len(records(tmp_path / "in", max_document_bytes=300, oversized="skip")) == 2
    with pytest.raises(
        ConfigError, match=r"data.join_comments=true: data=code has no files of JSON to join; use data=files"
    ):
        check_source(DataConfig(name="d", kind="code", join_comments=True))


def test_a_note_says_that_comments_could_be_joined(tmp_path):
    write(tmp_path / "in", REDDIT[1:])
    (note,) = open_source(DataConfig(name="d", paths=[str(tmp_path / "in")])).notes()
    assert "a.jsonl: its records answer one another (parent_id)" in note and "data.join_comments=true" in note
    assert not list(open_source(DataConfig(name="d", paths=[str(tmp_path / "in")], join_comments=True)).notes())
    write(tmp_path / "in", [{"id": 1, "text": "x"}])
    assert not list(open_source(DataConfig(name="d", paths=[str(tmp_path / "in")])).notes())


def test_a_post_and_a_comment_of_one_id_are_told_apart(tmp_path):
    def comment(own, parent, body):
        return {"id": own, "parent_id": parent, "link_id": "t3_1", "author": own.upper(), "body": body}

    rows = [comment("1", "t3_1", "On it."), comment("2", "t1_1", "To that."), comment("b", "t3_1", "On it too.")]
    write(tmp_path / "in", rows)
    below = "2, to 1: To that.\n\n"
    assert texts(tmp_path / "in") == [f"1: On it.\n\n{below}B: On it too."]
    write(tmp_path / "in", [{"id": "1", "title": "A post", "author": "Ann"}, *rows])
    assert texts(tmp_path / "in") == [f"Ann: A post\n\n1, to Ann: On it.\n\n{below}B, to Ann: On it too."]


@pytest.mark.parametrize("parent", [None, "Category:Physics", "f0", {"id": 1}, [1]])
def test_records_with_a_parent_that_is_no_comment_stay_as_they_are(tmp_path, parent):
    write(tmp_path / "in", [{"id": n, "parent": parent, "text": f"text {n}"} for n in range(3)])
    assert texts(tmp_path / "in") == ["text 0", "text 1", "text 2"]
    write(tmp_path / "in", [{"id": n, "parent": None if n == 0 else 0, "text": f"text {n}"} for n in range(2)])
    assert texts(tmp_path / "in") == ["Comment: text 0\n\nComment, to Comment: text 1"]


def test_a_bad_comment_of_a_thread_is_named(tmp_path):
    write(tmp_path / "in", [{"id": "a", "parent_id": None, "body": "one"}, {"id": "b", "parent_id": "a"}])
    with pytest.raises(BadRecordError, match="the comment 'b' has no text under body, text or content"):
        texts(tmp_path / "in")


def test_rows_of_parquet_are_not_joined_and_it_is_said(tmp_path):
    table = pa.table({"id": ["a", "b"], "parent_id": [None, "a"], "text": ["one", "two"]})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    with pytest.raises(ConfigError, match=r"data.join_comments=true joins the records of .jsonl.*converted to .jsonl"):
        records(tmp_path / "in")
    write(tmp_path / "in", REDDIT, "b.jsonl")
    (note,) = open_source(DataConfig(name="d", paths=[str(tmp_path / "in")], join_comments=True)).notes()
    assert "a.parquet: data.join_comments=true joins no rows of .parquet" in note


def test_a_note_says_that_comments_of_an_array_could_be_joined(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(REDDIT[1:], indent=1))
    (note,) = open_source(DataConfig(name="d", paths=[str(tmp_path / "a.json")])).notes()
    assert "data.join_comments=true" in note
