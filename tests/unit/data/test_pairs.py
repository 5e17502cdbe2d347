"""Preference pairs: the forms that records may have, what is refused, and a dataset with TRL's ids and masks."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import transformers

from megatrain.config import CleanConfig, DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.chat.errors import ConversationError
from megatrain.data.chat.pair import pair_from_text, pair_to_text, read_pair
from megatrain.data.indexed_dataset import IndexedDataset, verify_dataset
from megatrain.data.loader import heldout_batches
from megatrain.data.preparation import prepare
from megatrain.data.train_byte_level_bpe import train_byte_level_bpe
from megatrain.errors import DataError
from megatrain.kernels import IGNORE_INDEX

ASK = {"role": "user", "content": "q"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in "gb")
FORMS = [
    {"prompt": "q", "chosen": "g", "rejected": "b"},
    {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    {"prompt": "q", "chosen": [GOOD], "rejected": "b"},
    {"instruction": "q", "input": "", "chosen": "g", "rejected": "b"},
    {"messages": [ASK], "chosen": GOOD, "rejected": BAD},
    {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "g"},
        "rejected": {"from": "gpt", "value": "b"},
    },
]


@pytest.mark.parametrize("record", FORMS)
def test_the_forms_say_the_same(record):
    pair = read_pair(record)
    assert (pair.chosen, pair.rejected, pair.num_prompt) == ([ASK, GOOD], [ASK, BAD], 1)
    assert pair_from_text(pair_to_text(pair)) == pair


def test_earlier_replies_and_the_system_message_belong_to_the_prompt():
    history = [ASK, GOOD, {"role": "user", "content": "more"}]
    pair = read_pair({"system": "s", "chosen": [*history, GOOD], "rejected": [*history, BAD]})
    assert pair.num_prompt == 4 and pair.prompt[0] == {"role": "system", "content": "s"}


WRONG = [
    ({"prompt": "q", "chosen": "g"}, "no_pair", "rejected is null or missing"),
    ({"prompt": "q", "chosen": "g", "rejected": "g"}, "equal_pair", "are equal"),
    ({"prompt": "q", "chosen": "g ", "rejected": " "}, "empty_message", "rejected: message 2"),
    ({"prompt": " ", "chosen": "g", "rejected": "b"}, "empty_message", "chosen: message 1"),
    ({"chosen": [ASK, GOOD], "rejected": [{**ASK, "content": "r"}, BAD]}, "different_prompts", "differ before"),
    ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD, ASK, BAD]}, "different_prompts", "goes on"),
    ({"chosen": "g", "rejected": "b"}, "no_pair", "without a prompt"),
    ({"prompt": "q", "chosen": "g", "rejected": "b", "margin": 2}, "unknown_key", "'margin'"),
    ({"prompt": "q", "chosen": "g", "rejected": [{**BAD, "weight": 1}]}, "unknown_key", "'weight'"),
    ({"prompt": 3, "chosen": "g", "rejected": "b"}, "no_conversation", "prompt is no list"),
    ({"prompt": "q", "chosen": [ASK], "rejected": "b"}, "role_order", "chosen: message 2"),
]


@pytest.mark.parametrize(("record", "kind", "words"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_no_pair_is_refused(record, kind, words):
    with pytest.raises(ConversationError) as caught:
        read_pair(record)
    assert caught.value.kind == kind and words in caught.value.message


# ---------------------------------------------------------------------------------------------------- datasets

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
T = 160


def records(count=40):
    draw = random.Random(1)

    def words():
        return " ".join(draw.choice(["one", "two", "three", "four"]) for _ in range(draw.randrange(1, 5)))

    for number in range(count):
        prompt = [{"role": "user", "content": f"say {number} " + words()}]
        if number % 3 == 0:
            prompt = [*prompt, {"role": "assistant", "content": words()}, {"role": "user", "content": "again"}]
        sides = (f"yes {words()}", f"no {words()}")
        yield {
            "prompt": prompt,
            **{k: [{**GOOD, "content": v}] for k, v in zip(("chosen", "rejected"), sides, strict=True)},
        }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    (place / "t.jinja").write_text(TEMPLATE)
    config = TokenizerConfig(kind="byte_level_bpe", vocab_size=300, chat_template=str(place / "t.jinja"))
    config.special_tokens = ["<|user|>", "<|assistant|>", "<|end|>"]
    train_byte_level_bpe((json.dumps(record) for record in records()), config).save(place / "saved")
    return place / "saved"


@pytest.fixture
def make(tmp_path, tokenizer):
    def prepared(lines=None, **data):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in lines or records()))
        base = dict(name="d", dir=str(tmp_path / "out"), kind="pairs", paths=[str(path)], workers=1, heldout_fraction=0)
        words = TokenizerConfig(kind="hf", path=str(tokenizer))
        return prepare(PrepareConfig(seed=1, data=DataConfig(**base | data), clean=CleanConfig(), tokenizer=words))

    return prepared


def by_trl(tokenizer, record):
    """The ids of both sides, and which of them are the completion's, as trl's DPOTrainer tokenizes them."""
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer)

    def ids(messages, **options):
        return theirs.apply_chat_template(messages, return_dict=True, **options)["input_ids"]

    asked = ids(record["prompt"], add_generation_prompt=True)
    sides = [ids(record["prompt"] + record[side]) for side in ("chosen", "rejected")]
    assert all(side[: len(asked)] == asked for side in sides)
    return [(side, [at >= len(asked) for at in range(len(side))]) for side in sides]


def batch_of(folder, split="train", rows=50):
    dataset = IndexedDataset.open(folder, split)
    end = dataset.card.tokenizer.end_of_document
    options = dict(micro_batch_size=rows, dp_rank=0, dp_size=1, end_of_document=end, reset_positions=True)
    (batch,) = heldout_batches(dataset, seq_len=T, **options)
    return batch


def test_a_batch_has_the_ids_masks_and_last_tokens_of_trl(make, tokenizer):
    batch = batch_of(make())
    pairs, (tokens, labels) = batch.pairs, (batch.tokens.numpy(), batch.labels.numpy())
    expected = [by_trl(tokenizer, record) for record in records()]
    assert sorted(pairs.numbers.tolist()) == list(range(len(expected))) and len(pairs) == pairs.counted == 40
    assert any(len(row) > 4 for row in batch.documents.lengths), "several pairs share a row"
    for at, number in enumerate(pairs.numbers.tolist()):
        for side, (ids, mask) in enumerate(expected[number]):
            reply = 2 * at + side
            row, columns = np.nonzero(pairs.replies.numpy() == reply)
            assert tokens[row, columns].tolist() == ids
            counted = labels[row, columns] != IGNORE_INDEX
            assert counted.tolist() == [*mask[1:], False] and int(pairs.lengths[reply]) == counted.sum()
            assert tokens[pairs.ends.numpy() == reply].tolist() == ids[-1:]
            assert batch.positions.numpy()[row, columns].tolist() == list(range(len(ids)))


def test_a_pair_stays_whole_where_documents_would_be_cut(make, tokenizer):
    long = {"prompt": "q", "chosen": "yes " * 150, "rejected": "no"}
    folder = make([*records(), long])
    verify_dataset(folder)
    batch = batch_of(folder)
    assert 40 not in batch.pairs.numbers.tolist() and len(batch.pairs) == 40


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_bad_pair_is_named_by_its_line(make, policy, capsys):
    lines = [*records(3), {"prompt": "q", "chosen": "g", "rejected": "g"}]
    if policy == "stop":
        with pytest.raises(DataError, match=r"pairs\.jsonl:4.*are equal"):
            make(lines)
        return
    make(lines, on_bad_record="skip")
    assert "equal_pair" in capsys.readouterr().err.replace(" ", "_")


def test_a_pair_among_conversations_is_told_where_it_belongs(make):
    with pytest.raises(DataError, match=r"preference pair.*data=pairs"):
        make(kind="chat")
