"""Suggestions for unknown names."""

from megatrain.config import TrainConfig, walk
from megatrain.config.choices import GROUPS
from megatrain.config.suggest import OTHER_NAMES, did_you_mean, nearest_key

KEYS = {key: f.metadata["help"] for key, f in walk(TrainConfig).items()}


def test_every_name_of_another_trainer_leads_to_a_key_or_group_of_ours():
    for name, meant in OTHER_NAMES.items():
        assert nearest_key(name, KEYS, GROUPS["train"]) == meant
        assert meant in KEYS or meant.removesuffix("=<choice>") in GROUPS["train"]


def test_a_name_unlike_all_others_gets_no_suggestion():
    assert did_you_mean("data=", "mine", ["fineweb", "files"]) == ""
    assert did_you_mean("", "tiny-books", ["tiny-book", "small"]) == "; did you mean tiny-book?"
    assert nearest_key("xyzzy", KEYS, GROUPS["train"]) is None
