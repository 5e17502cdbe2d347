"""Keys of a method that contradict the others are refused with what would work, before anything is started."""

from __future__ import annotations

import pytest

from megatrain.config.compose import compose
from megatrain.errors import ConfigError
from megatrain.verbs.method_checks import check_method_files
from megatrain.verbs.value_checks import check_values

GRPO = [
    "model=tiny", "data=prompts", "method=grpo", "method.rewards=[exact_match]", "train.global_batch_size=16",
    "train.micro_batch_size=4", "train.seq_len=64", "method.max_new_tokens=16",
]  # fmt: skip


def test_a_config_that_agrees_passes() -> None:
    config = compose("train", [*GRPO, "method.kl=0.1", "checkpoint.init_from=runs/base"])
    check_values(config)
    assert config.resilience.spike_zscore == 0, "the loss of rewards goes up and down around 0"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.global_batch_size=20"], "is not a multiple of that; give train.global_batch_size=16 or 24"),
        (["train.global_batch_size=4"], "give train.global_batch_size=8"),
        (["method.rewards=[]"], "name at least one"),
        (["method.rewards=[exactly]"], "exactly is neither an embedded reward"),
        (["method.reward_weights=[1,2]"], "2 weights for 1 rewards"),
        (["method.max_new_tokens=64"], "leaves no room for a prompt in train.seq_len=64"),
        (["resilience.spike_zscore=9"], "give resilience.spike_zscore=0.0"),
        (["train.skip_ranges=[[0,8]]"], "give train.skip_ranges="),
        (["data.packing=best_fit", "train.mask_documents=true"], "give train.mask_documents=false"),
        (["method.kl=0.1"], "name that as checkpoint.init_from"),
        (
            ["method=pretrain", "data=files"],
            "method.rewards=.*: method=pretrain has no rewards; add method=grpo or method=ppo",
        ),
        (["method.group_size=1"], "compares the replies to a prompt with one another; give method.group_size=2"),
        (["method.whiten=false"], "method.whiten=false: method=grpo learns no values; .* use method=ppo"),
        (["method.gamma=0.9"], "method.gamma=0.9: method=grpo learns no values"),
        (["method=sft", "method.rewards=[]"], "data=prompts: method=sft does not sample replies"),
    ],
)
def test_keys_that_contradict_are_refused_with_what_would_work(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_values(compose("train", [*GRPO, *words]))


PPO = [word.replace("method=grpo", "method=ppo") for word in GRPO]


def test_a_config_of_ppo_that_agrees_passes() -> None:
    config = compose(
        "train", [*PPO, "checkpoint.init_from=runs/base", "method.gae_lambda=0.9", "method.value_clip=null"]
    )
    check_values(config)
    assert config.method.group_size == 1 and config.method.kl > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method.gamma=1.1"], "method.gamma=1.1 is out of range"),
        (["method.gae_lambda=-0.1"], "method.gae_lambda=-0.1 is out of range"),
        (["method.value_weight=0"], "method.value_weight=0.0 is out of range: must be above 0"),
        (["method.value_clip=0"], "method.value_clip=0.0 is out of range: must be above 0"),
        (["method.rewards=[]"], "name at least one"),
        (["method.advantages=none"], "method=ppo takes advantages from values, not from groups; .* use method=grpo"),
        ([], "name that as checkpoint.init_from"),
        (["method=sft", "data=chat", "method.rewards=[]", "method.value_clip=0.1"], "method=sft learns no values"),
    ],
)
def test_keys_of_ppo_that_contradict_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_values(compose("train", [*PPO, *words]))


def test_a_file_of_rewards_must_exist() -> None:
    with pytest.raises(ConfigError, match=r"method\.rewards=nowhere\.py: no such file"):
        check_method_files(compose("train", [*GRPO, "method.rewards=[nowhere.py:f]"]))
