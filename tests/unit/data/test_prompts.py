"""A dataset of prompts has the ids of transformers' generation prompts, and gives the records' fields back."""

import json

import pytest
import transformers

from megatrain.config import DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import check_dataset
from megatrain.data.indexed_dataset import IndexedDataset, verify_dataset
from megatrain.data.preparation import prepare
from megatrain.data.prompts import Prompts, holds_prompts
from megatrain.data.train_byte_level_bpe import train_byte_level_bpe
from megatrain.errors import ConfigError, DataError

SYSTEM = {"role": "system", "content": "Be brief."}
RECORDS = [
    {"prompt": "What is 2+2?", "answer": "4"},
    {"messages": [SYSTEM, {"role": "user", "content": "And 3+3, é?"}], "answer": 6, "level": "leicht für é 中"},
    {"instruction": "Add.", "input": "4 and 4", "answer": [8, "acht"]},
    {"prompt": [{"role": "user", "content": "<|im_end|> is text"}], "answer": None},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    config = TokenizerConfig(kind="byte_level_bpe", vocab_size=300, chat_template="chatml")
    train_byte_level_bpe(iter(["What is 2+2? Be brief. Add. 4 and 4"] * 4), config).save(place)
    return place


@pytest.fixture
def make(tmp_path, tokenizer):
    """Return a function that prepares records and returns the dataset's folder."""

    def prepared(records, name="d", **data):
        path = tmp_path / "questions.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in records))
        base = dict(name=name, dir=str(tmp_path), kind="prompts", paths=[str(path)], workers=1, heldout_fraction=0)
        words = TokenizerConfig(kind="hf", path=str(tokenizer))
        return prepare(PrepareConfig(seed=1, data=DataConfig(**base | data), tokenizer=words))

    return prepared


def test_questions_have_the_ids_of_transformers_and_fields_come_back(make, tokenizer):
    folder = make(RECORDS)
    prompts = Prompts(IndexedDataset.open(folder, "train"))
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer)
    talks = [
        [{"role": "user", "content": "What is 2+2?"}],
        RECORDS[1]["messages"],
        [{"role": "user", "content": "Add.\n\n4 and 4"}],
    ]
    assert len(prompts) == len(RECORDS)
    for number, talk in enumerate(talks):
        expected = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert prompts.read(number).ids == expected
    ends = theirs.convert_tokens_to_ids("<|im_end|>")
    assert prompts.read(3).ids.count(ends) == 1, "what a user spells ends no turn"
    assert [prompts.read(n).prompt for n in range(3)] == ["What is 2+2?", talks[1], "Add.\n\n4 and 4"]
    assert prompts.read(1).fields == {"answer": 6, "level": "leicht für é 中"}
    assert prompts.read(2).fields == {"answer": [8, "acht"]}
    assert prompts.fields == ["answer"], "what every record has"
    assert holds_prompts(check_dataset(folder))
    verify_dataset(folder)


def test_another_answer_is_another_dataset(make):
    first = check_dataset(make(RECORDS)).fingerprint
    changed = [{**RECORDS[0], "answer": "5"}, *RECORDS[1:]]
    assert check_dataset(make(changed, name="other")).fingerprint != first


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question": "?"}, "no prompt .it has 'question'."),
        ({"prompt": " "}, "message 1 .user. is empty"),
        ({"prompt": [SYSTEM]}, "does not end with the user's message"),
        ({"messages": [*RECORDS[1]["messages"], {"role": "assistant", "content": "6"}]}, "end with the user's message"),
        ({"prompt": "a", "completions": 1}, "it has 'completions', which rewards get of every reply; rename it"),
        ({"prompt": 3}, "prompt is no list"),
    ],
)
def test_bad_records_are_named_by_file_and_line(make, record, said):
    with pytest.raises(DataError, match=rf"questions\.jsonl:2: .*{said}"):
        make([RECORDS[0], record])


def test_bad_records_can_be_skipped(make):
    assert len(Prompts(IndexedDataset.open(make([*RECORDS, {"prompt": ""}], on_bad_record="skip"), "train"))) == 4


def test_a_prompt_that_leaves_no_room_for_a_reply_is_refused_with_what_would_work(make):
    prompts = Prompts(IndexedDataset.open(make(RECORDS), "train"))
    longest = max(len(prompts.read(number).ids) for number in range(4))
    prompts.check(longest + 9, 10, 300)
    with pytest.raises(ConfigError, match=f"1 of 4 prompts leave no room .* give train.seq_len={longest + 9} or more"):
        prompts.check(longest + 8, 10, 300)
    with pytest.raises(DataError, match="outside the vocabulary of 20"):
        prompts.check(longest + 9, 10, 20)


def test_prompts_that_leave_no_room_can_be_left_out(make):
    prompts = Prompts(IndexedDataset.open(make(RECORDS), "train"))
    questions = [prompts.read(number) for number in range(4)]
    longest = max(len(one.ids) for one in questions)
    with pytest.raises(ConfigError, match="4 of 4 prompts leave no room"):
        prompts.check(10, 10, 300, skip=True)
    assert prompts.check(longest + 8, 10, 300, skip=True) == 1
    assert [prompts.read(number) for number in range(len(prompts))] == [q for q in questions if len(q.ids) < longest]
