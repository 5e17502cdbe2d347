"""What a record's conversation is, in each form that datasets have, and what is refused by its place."""

import json

import pytest

from megatrain.data.chat.conversation import from_text, read_conversation, to_text
from megatrain.data.chat.errors import ConversationError
from megatrain.data.corpus.decoding import decode
from megatrain.data.corpus.record import BadRecordError, Policy, Record

HELLO = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": HELLO, "id": "7"},
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
        {"messages": [{"role": "User", "content": "hello", "name": None, "tool_calls": []}, HELLO[1]]},
        {"instruction": "hello", "input": "", "output": "hi"},
        {"instruction": "hello", "output": "hi"},
        {"prompt": "hello", "completion": "hi"},
        {"prompt": "hello", "response": "hi"},
        {"prompt": HELLO[:1], "completion": HELLO[1:]},
    ],
)
def test_each_form_gives_the_same_messages(record):
    assert read_conversation(record) == HELLO


def test_a_system_message_and_an_input_are_kept():
    system = {"role": "system", "content": "Be kind."}
    assert read_conversation({"messages": [system, *HELLO, *HELLO]}) == [system, *HELLO, *HELLO]
    asked = read_conversation({"instruction": "Translate.", "input": "Haus", "output": "house"})
    assert asked[0] == {"role": "user", "content": "Translate.\n\nHaus"}


@pytest.mark.parametrize(
    "record, kind, words",
    [
        ({}, "no_conversation", "no conversation (it has no fields)"),
        ({"text": "x", "url": "y"}, "no_conversation", "(it has 'text', 'url')"),
        ({"messages": []}, "no_conversation", "messages is empty"),
        ({"messages": "x"}, "no_conversation", "messages is no list"),
        ({"messages": [None]}, "bad_message", "message 1 is null"),
        ({"messages": [{"text": "x"}]}, "bad_message", "message 1 has no role (it has 'text')"),
        ({"messages": [{"role": "user", "content": 3}]}, "bad_message", "message 1: its content is no text"),
        ({"messages": [{"role": 1, "content": "x"}]}, "bad_message", "message 1: its role is no text"),
        ({"messages": [{**HELLO[0], "weight": 0}, HELLO[1]]}, "unknown_key", "message 1 has 'weight' beside role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "bad_role", "message 1 has the role 'tool'"),
        ({"messages": [HELLO[0], {"role": "assistant", "content": " \n"}]}, "empty_message", "message 2 (assistant)"),
        ({"messages": [HELLO[0], HELLO[0]]}, "role_order", "message 2 is the user's, where the assistant's turn is"),
        ({"messages": HELLO[1:]}, "role_order", "message 1 is the assistant's, where the user's turn is"),
        ({"messages": [*HELLO, {"role": "system", "content": "x"}]}, "role_order", "message 3 is the system's"),
        ({"messages": HELLO[:1]}, "no_reply", "it does not end with the assistant's reply"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no_reply", "it does not end"),
        ({"instruction": "x", "output": None}, "no_conversation", "output is null or missing"),
        ({"instruction": "x", "input": ["y"], "output": "z"}, "no_conversation", 'input is no text (["y"])'),
        ({"prompt": "x", "completion": 3}, "no_conversation", "completion is no text (3)"),
    ],
)
def test_what_is_no_conversation_is_told_with_its_place(record, kind, words):
    with pytest.raises(ConversationError) as found:
        read_conversation(record)
    assert found.value.kind == kind and words in found.value.message and found.value.remedy


@pytest.mark.parametrize("record", [{"messages": HELLO}, {"instruction": "hello", "output": "hi"}])
def test_a_system_message_may_have_a_field_of_its_own(record):
    assert read_conversation(record | {"system": "Be kind."}) == [{"role": "system", "content": "Be kind."}, *HELLO]
    assert read_conversation(record | {"system": "", "history": [], "tools": None}) == HELLO
    with pytest.raises(ConversationError, match="its system message is no text"):
        read_conversation(record | {"system": ["Be kind."]})
    with pytest.raises(ConversationError, match="it has 'history', which would be lost"):
        read_conversation(record | {"history": [["a", "b"]]})


def test_messages_are_normalised_like_other_text():
    talk = [{"role": "user", "content": "a\r\nb\x00\x1b[31m e\u0301"}, {"role": "assistant", "content": "\ufeffyes\r"}]
    assert [message["content"] for message in _decoded({"messages": talk})] == ["a\nb[31m \xe9", "yes\n"]
    with pytest.raises(BadRecordError, match="is empty"):
        _decoded({"prompt": "\x07", "completion": "yes"})


def _decoded(record):
    read = Record(json.dumps(record).encode(), "talks.jsonl:1", kind="json")
    return from_text(decode(read, Policy("text", "refuse", kind="chat")).text)


def test_messages_are_one_line_of_text_until_they_are_encoded():
    messages = [{"role": "user", "content": 'two\nlines, "quotes" and 漢字'}]
    assert from_text(to_text(messages)) == messages
    assert "\n" not in to_text(messages) and "漢字" in to_text(messages)
