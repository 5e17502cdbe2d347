"""What a run that learns from preferences is refused before it starts: another output, other data, pairs too long."""

from __future__ import annotations

import json

import pytest

from megatrain.config import CleanConfig, DataConfig, PrepareConfig, TokenizerConfig, TrainConfig
from megatrain.data.card import Card
from megatrain.data.preparation import prepare
from megatrain.data.train_byte_level_bpe import train_byte_level_bpe
from megatrain.errors import ConfigError, DataError
from megatrain.verbs.preference_checks import check_output, check_pairs


def config(method, output="vocabulary", **data):
    made = TrainConfig()
    made.method.name, made.model.output, made.train.seq_len = method, output, 64
    for name, value in data.items():
        setattr(made.data, name, value)
    return made


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("sft", "score"), "writes nothing"),
        (("reward", "vocabulary"), "leave model.output out"),
        (("dpo", "vocabulary", "mixture"), "one dataset of pairs"),
    ],
    ids=str,
)
def test_methods_outputs_and_kinds_of_data_that_do_not_go_together(given, words):
    method, output, *kind = given
    with pytest.raises(ConfigError, match=words):
        check_output(config(method, output, **({"kind": kind[0]} if kind else {})))


def test_a_reward_model_may_have_low_rank_layers():
    given = config("reward", "score", kind="pairs")
    given.method.lora.rank = 8
    check_output(given)


def test_what_goes_together_passes():
    check_output(config("dpo", kind="pairs"))
    check_output(config("reward", "score", kind="pairs"))
    check_output(config("sft", kind="chat"))


@pytest.fixture
def folder(tmp_path):
    """Return a dataset of four pairs, one of which is longer than 65 tokens."""
    lines = [{"prompt": "q", "chosen": "yes", "rejected": f"no {n}"} for n in range(3)]
    lines.append({"prompt": "q", "chosen": "yes " * 60, "rejected": "no"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = TokenizerConfig(kind="byte_level_bpe", vocab_size=300, chat_template="chatml")
    train_byte_level_bpe(iter(["yes no q " * 20]), words).save(tmp_path / "tokenizer")
    data = DataConfig(name="d", dir=str(tmp_path), kind="pairs", paths=[str(tmp_path / "pairs.jsonl")], workers=1)
    data.heldout_fraction = 0
    tokens = TokenizerConfig(kind="hf", path=str(tmp_path / "tokenizer"))
    return prepare(PrepareConfig(seed=1, data=data, clean=CleanConfig(), tokenizer=tokens))


def test_pairs_that_are_too_long_stop_or_are_left_out(folder, capsys):
    card, place = Card.load(folder), {"dir": str(folder.parent), "name": "d", "kind": "pairs"}
    with pytest.raises(DataError, match=r"1 of 4 pairs .*d/train.bin have more than train.seq_len=64"):
        check_pairs(config("dpo", **place), card)
    capsys.readouterr()
    check_pairs(config("dpo", **place, on_bad_record="skip"), card)
    assert "they are left out" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"method=sft: .* has preference pairs"):
        check_pairs(config("sft", **place), card)
    card.config["data"]["kind"] = "chat"
    with pytest.raises(ConfigError, match="method=dpo learns from preference pairs"):
        check_pairs(config("dpo", **place), card)
