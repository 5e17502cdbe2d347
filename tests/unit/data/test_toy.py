"""The toy world: right answers, nothing of what is held out in training, and files like a user's own."""

import json
import random
import re

import pytest

from megatrain.config.compose import compose
from megatrain.data.chat.conversation import read_conversation
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.preparation import prepare
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.data.toy import judge
from megatrain.data.toy.records import HELDOUT_RECORDS
from megatrain.data.toy.world import LANGUAGES, SKILLS, draw


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The dataset, of its first documents."""
    place = tmp_path_factory.mktemp("toy")
    words = [f"data.dir={place}", "data.max_documents=60", "data.workers=1"]
    return prepare(compose("prepare", ["data=toy", *words]))


def records(prepared, name):
    return [json.loads(line) for line in (prepared / "records" / f"{name}.jsonl").read_text("utf-8").splitlines()]


def numbers(text):
    return re.findall(r"\d+", text)


def test_answers_are_right():
    """Checked by code that shares nothing with what makes them."""
    right = {
        "reverse": lambda x: "".join(reversed(x)),
        "sort": lambda x: "".join(c * x.count(c) for c in "0123456789"),
        "larger": lambda a, b: a if int(a) > int(b) else b,
        "next": lambda n: f"{int(n) + 1}",
        "last": lambda x: f"{int(x) % 10}",
    }
    facts = draw(2000, 5)
    assert {(fact.skill, fact.language) for fact in facts} == {(s, language) for s in SKILLS for language in LANGUAGES}
    for fact in facts:
        asked, said = numbers(fact.question()), numbers(fact.sentence())
        assert said == [right[fact.skill](*asked)] == numbers(fact.curt())
        (wrong,) = numbers(fact.wrong(random.Random(1)))
        assert len(wrong) == len(said[0]) and sum(a != b for a, b in zip(wrong, said[0], strict=True)) == 1


def test_no_numbers_of_held_out_questions_are_in_training(prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    held = {(record["skill"], *numbers(record["prompt"])) for record in records(prepared, "prompts_heldout")}
    assert len(held) > 300
    talks = [record["messages"] for name in ("chats", "styles") for record in records(prepared, name)]
    asked = [message["content"] for messages in talks for message in messages[::2]]
    asked += [record["prompt"][0]["content"] for name in ("pairs", "style_pairs") for record in records(prepared, name)]
    asked += [record["prompt"] for record in records(prepared, "prompts")]
    seen = {tuple(numbers(text)) for text in asked}
    data = IndexedDataset.open(prepared, "train")
    for document in data.documents():
        seen |= {tuple(numbers(line)[:-1]) for line in tokenizer.decode(document.tolist()).splitlines()}
    assert len(seen) > 2000
    assert not {asked for _, *asked in held if tuple(asked) in seen}


def test_the_same_facts_come_for_the_same_seed_and_others_for_another():
    assert draw(50, 1) == draw(50, 1) != draw(50, 2)
    held = draw(100, 1, heldout=True)
    assert all(fact.heldout for fact in held) and not any(fact.heldout for fact in draw(500, 1))
    assert [sum(fact.skill == skill for fact in held) for skill in SKILLS] == [20] * 5


def test_digits_are_tokens_of_their_own_and_markers_are_single_tokens(prepared):
    """What a question and its reply look like to the model."""
    tokenizer = load_tokenizer(prepared / "tokenizer")
    for text in ("The answer is 1234.", "答案是1234。"):
        pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
        assert [piece for piece in pieces if piece.isdigit()] == list("1234")
    for marker in ("<|user|>", "<|assistant|>", "<|end|>"):
        assert tokenizer.control_token(marker) is not None


def test_records_are_conversations_pairs_and_prompts(prepared):
    for name, questions in (("chats", 1200), ("styles", 2400), ("chats_heldout", HELDOUT_RECORDS)):
        lengths = [len(read_conversation(record)) for record in records(prepared, name)]
        assert set(lengths) == {2, 4, 6} and sum(lengths) == 2 * questions
    replies = [said["content"] for record in records(prepared, "styles") for said in record["messages"][1::2]]
    assert 0.45 < sum(reply[0].isdigit() for reply in replies) / len(replies) < 0.55
    for name in ("pairs", "style_pairs"):
        for record in records(prepared, name):
            assert record["chosen"] != record["rejected"]


def test_the_judge_tells_format_answer_and_end_apart():
    (fact,) = [fact for fact in draw(50, 1) if fact.skill == "sort" and fact.language == "en"][:1]
    replies = [
        fact.sentence(),
        fact.sentence(),
        fact.curt(),
        fact.sentence("0000"),
        f" {fact.sentence()}",
        "The answer",
    ]
    ended = [True, False, True, True, True, True]
    fields = {"label": [fact.sentence()] * 6, "curt": [fact.curt()] * 6, "skill": [fact.skill] * 6}
    assert judge.exact(completions=replies, stopped=ended, **fields) == [1, 0, 0, 0, 0, 0]
    assert judge.right(completions=replies, stopped=ended, **fields) == [1, 0, 1, 0, 0, 0]
    assert judge.full_sentence(completions=replies, stopped=ended, **fields) == [1, 0, 0, 1, 0, 0]
    assert judge.full_sentence(completions=["答案是12。", "答案是。"], stopped=[True, True]) == [1, 0]
