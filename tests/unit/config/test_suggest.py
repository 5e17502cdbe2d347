"""Suggestions for unknown names."""

from megatrain.config import TrainConfig, walk
from megatrain.config.choices import GROUPS
from megatrain.config.suggest import OTHER_NAMES, did_you_mean, meant_keys, nearest_key, nearest_path

KEYS = {key: f.metadata["help"] for key, f in walk(TrainConfig).items()}


def test_every_name_of_another_trainer_leads_to_a_key_or_group_of_ours():
    for name, meant in OTHER_NAMES.items():
        assert nearest_key(name, KEYS, GROUPS["train"]) == meant
        assert meant in KEYS or meant.removesuffix("=<choice>") in GROUPS["train"]


def test_the_start_of_a_name_and_names_with_several_meanings_are_completed():
    assert did_you_mean("model=", "gpt2", ["gpt2_124m", "gpt2_774m"]) == "; did you mean model=gpt2_124m?"
    assert nearest_key("temp", {"step": "a", "max_new_tokens": "b", "temperature": "c"}, ()) == "temperature"
    assert nearest_key("train.sequence_length", KEYS, GROUPS["train"]) == "train.seq_len"
    for name in ("batch_size", "train.batch-size"):
        assert meant_keys(name, KEYS, GROUPS["train"]) == "train.global_batch_size or train.micro_batch_size"


def test_the_gpu_is_called_cuda_although_cpu_is_spelt_more_like_it():
    assert did_you_mean("", "gpu", ["auto", "cuda", "cpu"]) == "; did you mean cuda?"
    assert did_you_mean("", "gpu", ["auto", "cpu"]) == "; did you mean cpu?"


def test_a_path_is_compared_part_by_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "corpus").mkdir()
    assert nearest_path("run/a") == "runs/a" and nearest_path("corpsu") == "corpus"
    assert nearest_path(f"{tmp_path}/corpis") == f"{tmp_path}/corpus" and nearest_path("xyz/a") is None


def test_a_name_unlike_all_others_gets_no_suggestion():
    assert did_you_mean("data=", "mine", ["fineweb", "files"]) == ""
    assert did_you_mean("runs/", "nothing", ["g", "in"]) == "", "a letter or two are in many names"
    assert did_you_mean("", "tiny-books", ["tiny-book", "small"]) == "; did you mean tiny-book?"
    assert nearest_key("xyzzy", KEYS, GROUPS["train"]) is None
