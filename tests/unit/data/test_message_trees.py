"""Messages that answer one another by parent ids become a conversation for each tree: its best-ranked path."""

import json

import pytest

from megatrain.config import DataConfig
from megatrain.data.corpus.decoding import decode
from megatrain.data.corpus.record import BadRecordError, Policy
from megatrain.data.corpus.sources import open_source
from megatrain.errors import DataError


def message(name, parent, text=None, **others):
    role = "prompter" if name[0] == "u" else "assistant"
    return {"message_id": name, "parent_id": parent, "text": text or name, "role": role, "lang": "en", **others}


TREE = [
    message("a2", "u1", rank=0),
    message("u1", None),
    message("a1", "u1", rank=1),
    message("a3", "u1", rank=-1, deleted=True),
    message("u2", "a2"),
    message("a4", "u2"),
    message("a5", "u2"),
    message("u3", "a4"),
]
PATH = [("user", "u1"), ("assistant", "a2"), ("user", "u2"), ("assistant", "a4")]


def nested(name):
    own = next(one for one in TREE if one["message_id"] == name)
    return own | {"replies": [nested(one["message_id"]) for one in TREE if one["parent_id"] == name]}


def read(folder, rows, **data):
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(DataConfig(kind="chat", paths=[str(folder)], **data))
    found, bad = [], []
    for record in (record for shard in source.shards() for record in source.read(shard)):
        try:
            talk = json.loads(decode(record, Policy("text", "refuse", kind="chat")).text)
            found.append([(one["role"], one["content"]) for one in talk])
        except BadRecordError as error:
            bad.append((record.where.rpartition(":")[2], error.problem.kind))
    return found, bad


def test_flat_and_nested_messages_give_the_best_path_to_an_answer(tmp_path):
    assert read(tmp_path, TREE) == ([PATH], [])
    assert read(tmp_path, [{"message_tree_id": "u1", "prompt": nested("u1")}]) == ([PATH], [])


@pytest.mark.parametrize(
    "rows, bad",
    [
        ([message("a9", "gone")], [("9", "no_parent")]),
        ([message("a9", "u9"), message("u9", "a9")], [("9", "circle"), ("10", "circle")]),
        ([message("u9", None, deleted=True), message("a9", "u9")], [("9", "deleted")]),
        ([message("u9", None, role="tool"), message("a9", "u9")], [("9", "bad_role")]),
        ([message("u9", None), message("a9", "u9", rank="best")], [("9", "bad_message")]),
        ([message("u9", None)], [("9", "no_reply")]),
        ([message("u1", None)], [("9", "duplicate_id")]),
    ],
)
def test_what_is_no_tree_is_bad_by_its_line(tmp_path, rows, bad):
    assert read(tmp_path, [*TREE, *rows]) == ([PATH], bad)


def test_a_file_of_messages_that_memory_does_not_hold_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"data=chat holds a file's messages in memory.*max_thread_bytes=2000"):
        read(tmp_path, TREE, max_thread_bytes=2000)


def test_a_large_file_of_messages_is_not_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("megatrain.data.corpus.files_source.SHARD_BYTES", 100)
    assert read(tmp_path, TREE) == ([PATH], [])
