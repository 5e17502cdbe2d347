"""Messages and threads of comments become plain text by one template; what is no message is a bad record."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megatrain.config import DataConfig
from megatrain.data.corpus.decoding import decode
from megatrain.data.corpus.record import BadRecordError, Policy, Record
from megatrain.data.corpus.sources import open_source


def read(value, column="text"):
    return decode(Record(json.dumps(value).encode(), "a.jsonl:1", kind="json"), Policy(column, "replace"))


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "你好! What is 2 + 2?\n"},
    {"role": "assistant", "content": "4"},
]
TEXT = "System: Be brief.\n\nUser: 你好! What is 2 + 2?\n\nAssistant: 4"


def test_messages_of_either_layout_are_written_by_the_same_template():
    decoded = read({"id": "c7", "messages": MESSAGES, "source": "made"})
    assert (decoded.text, decoded.kind, decoded.id, decoded.source) == (TEXT, "conversation", "c7", "made")
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": names[one["role"]], "value": one["content"]} for one in MESSAGES]
    assert read({"conversations": shared}).text == TEXT
    assert read({"chat": MESSAGES}, "chat").text == TEXT


def test_the_named_field_comes_before_a_conversation():
    decoded = read({"text": "rendered", "messages": MESSAGES, "id": 3})
    assert (decoded.text, decoded.kind, decoded.id) == ("rendered", "json", "3")
    assert read({"text": "rendered", "messages": MESSAGES}, "messages").text == TEXT


def test_content_in_parts_and_calls_of_tools_are_written_and_empty_messages_left_out():
    call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Add"}, {"type": "text", "text": "these."}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": " "},
    ]
    assert read({"messages": messages}).text == f"User: Add\nthese.\n\nAssistant: {json.dumps(call)}\n\nTool: 4"


@pytest.mark.parametrize(
    "messages, message",
    [
        ([{"role": "user"}], r"message 1 is not role and content, or from and value, both text \(it has 'role'\)"),
        ([*MESSAGES, {"content": "x"}], "message 4 is not"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "message 1 is not"),
        ([{"role": 1, "content": "x"}], "message 1 is not"),
        ([{"role": "", "content": "x"}], "message 1 is not"),
        ([{"role": {"id": 5}, "content": "x"}], "message 1 is not"),
        ([{"id": 1, "parent_id": None, "user": {"id": 5}, "body": "x"}], r"an author that is no name \(it has 'id'"),
        ([{"id": 1, "parent_id": None, "author": ["Ann"], "body": "x"}], "an author that is no name"),
        ([*MESSAGES, None], "message 4 is null"),
        ([*MESSAGES, "x"], "message 4 is no object"),
        ([{"id": 1, "parent_id": 2, "body": "a"}, {"id": 2, "parent_id": 1, "body": "b"}], "2 comments .* in a circle"),
        ([{"id": 1, "parent_id": 2, "score": 3}], r"comment '1' has no text .* \(it has 'id', 'parent_id', 'score'\)"),
    ],
)
def test_what_is_no_message_is_a_bad_record(messages, message):
    with pytest.raises(BadRecordError, match=message) as caught:
        read({"messages": messages})
    assert caught.value.problem.kind == "not_a_message"


def test_a_list_of_something_else_is_no_conversation():
    for value in (["a"], "text", None):
        with pytest.raises(BadRecordError, match="no text under 'text'"):
            read({"messages": value})


def test_an_answer_follows_what_it_answers():
    comments = [
        {"id": "a", "parent_id": "t3_post", "author": "Ann", "body": "First."},
        {"id": "b", "parent_id": "t3_post", "author": "Bob", "body": "Second."},
        {"id": "c", "parent_id": "t1_a", "author": "Cid", "body": "To the first."},
        {"id": "d", "parent_id": "t1_c", "author": "Dee", "body": "Deeper."},
        {"id": "e", "parent_id": "t1_a", "body": "Without a name."},
        {"id": "f", "parent_id": None, "author": "Fay", "body": " "},
    ]
    decoded = read({"title": "A thread", "selftext": "What do you say?", "comments": comments})
    assert decoded.text.split("\n\n") == [
        "A thread",
        "What do you say?",
        "Ann: First.",
        "Cid, to Ann: To the first.",
        "Dee, to Cid: Deeper.",
        "Comment, to Ann: Without a name.",
        "Bob: Second.",
    ]


@pytest.mark.parametrize("number", [int, float, str])
def test_ids_may_begin_at_zero_and_be_numbers_of_any_kind(number):
    answers = [(0, None, "Ann"), (1, 0, "Bob"), (2, None, "Cy"), (3, 0, "Dan")]
    comments = [
        {"id": own, "parent_id": None if parent is None else number(parent), "author": author, "body": "x"}
        for own, parent, author in answers
    ]
    assert read({"comments": comments}).text == "Ann: x\n\nBob, to Ann: x\n\nDan, to Ann: x\n\nCy: x"


def test_comments_without_ids_or_with_ids_like_words_keep_their_order():
    comments = [{"id": "None", "parent_id": None, "author": "Ann", "body": "x"}, {"parent_id": None, "body": "y"},
                {"id": "", "parent_id": "", "body": "z"}]  # fmt: skip
    assert read({"comments": comments}).text == "Ann: x\n\nComment: y\n\nComment: z"


def test_a_post_is_written_with_comments_that_have_no_parents_or_without_comments():
    post = {"title": "A post", "body": "What do you say?"}
    comments = [{"author": "Ann", "body": "Nothing."}]
    assert read(post | {"comments": comments}).text == "A post\n\nWhat do you say?\n\nAnn: Nothing."
    assert read(post | {"comments": []}).text == "A post\n\nWhat do you say?"


@pytest.mark.parametrize("author", [{"login": "ann", "id": 5}, {"id": 5, "name": "ann"}, {"username": "ann"}, "ann"])
def test_an_author_may_be_an_object_with_a_name(author):
    for field in ("user", "author"):
        assert read({"comments": [{"id": 1, "parent_id": None, field: author, "body": "x"}]}).text == "ann: x"
    assert read({"messages": [{"author": author, "content": "x"}]}).text == "Ann: x"


@pytest.mark.parametrize(
    "calls", [{"tool_calls": {"name": "f"}}, {"tool_calls": [{"name": "f"}]}, {"function_call": {"name": "f"}}]
)
@pytest.mark.parametrize("content", [{"content": ""}, {"content": None}, {}])
def test_a_call_of_a_tool_is_written_whatever_field_holds_it(calls, content):
    message = {"role": "assistant", **content, **calls}
    assert read({"messages": [message]}).text == 'Assistant: {"name": "f"}'
    assert read({"messages": [message | {"id": 1, "parent_id": None}]}).text == 'Assistant: {"name": "f"}'
    nulls = {"tool_calls": None, "function_call": {"name": None, "arguments": None}}
    assert read({"messages": [{"role": "user", "content": "x", **nulls}]}).text == "User: x"


def test_a_parent_that_is_no_id_makes_no_thread():
    assert read({"messages": [{**one, "parent": False} for one in MESSAGES]}).text == TEXT


def test_a_thread_of_any_depth_is_written():
    comments = [{"id": i, "parent_id": i - 1 or None, "author": f"n{i}", "text": f"t{i}"} for i in range(1, 5001)]
    lines = read({"comments": comments}).text.split("\n\n")
    assert lines == ["n1: t1", *(f"n{i}, to n{i - 1}: t{i}" for i in range(2, 5001))]


@pytest.mark.parametrize("column", ["text", "messages"])
def test_a_column_of_messages_is_read_from_parquet(tmp_path, column):
    rows = [MESSAGES, [{"role": "user", "content": None}], None, [{"role": None, "content": "x"}]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    config = DataConfig(name="d", paths=[str(tmp_path)], text_column=column)
    first, empty, null, bad = open_source(config).records()
    assert (first.payload, first.kind) == (TEXT, "conversation")
    assert [one.problem.kind for one in (empty, null, bad)] == ["not_a_message", "null", "not_a_message"]
    assert json.loads(bad.payload) == {"messages": [{"role": None, "content": "x"}]}


def parquet_texts(folder, rows):
    """Return what each row becomes when it is read from Parquet: its text, or the kind of its problem."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    found = []
    for record in open_source(DataConfig(name="d", kind="files", paths=[str(folder)])).records():
        found.append(record.problem.kind if record.problem else decode(record, Policy("text", "replace")).text)
    return found


def test_a_null_in_a_list_of_messages_in_parquet_is_a_bad_record(tmp_path):
    rows = [{"messages": [MESSAGES[0], None]}, {"messages": MESSAGES}]
    assert parquet_texts(tmp_path, rows) == ["not_a_message", TEXT]


def test_an_empty_list_of_messages_is_an_empty_document_in_either_format(tmp_path):
    assert parquet_texts(tmp_path, [{"messages": []}, {"messages": MESSAGES}]) == ["", TEXT]
    assert (read({"messages": []}).text, read({"chat": []}, "chat").text) == ("", "")
    assert read({"messages": [], "conversations": MESSAGES}).text == TEXT


def test_a_thread_in_parquet_has_the_same_text_as_in_jsonl(tmp_path):
    comments = [{"id": "1", "parent_id": "t3_0", "author": "Ann", "body": "Hello"}]
    row = {"title": "A title", "selftext": "A question", "score": 3, "comments": comments}
    assert parquet_texts(tmp_path, [row]) == [read(row).text] == ["A title\n\nA question\n\nAnn: Hello"]


def test_messages_of_a_hugging_face_dataset_are_a_conversation(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets.Dataset.from_dict({"messages": [MESSAGES, None], "id": [1, 2]}).save_to_disk(str(tmp_path / "in"))
    config = DataConfig(name="d", kind="huggingface", hf_path=str(tmp_path / "in"))
    first, second = open_source(config).records()
    decoded = decode(first, Policy("text", "replace"))
    assert (decoded.text, decoded.kind, second.problem.kind) == (TEXT, "conversation", "no_field")
