"""`method.*`: what a run is trained for, and the keys of each method. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatrain.config.key import key

METHODS = ("pretrain", "distill", "sft", "reward", "dpo", "grpo", "ppo")
"""What a run can be trained for."""

SAMPLING = ("grpo", "ppo")
"""Methods that learn from replies which the model samples while it trains."""

WITH_VALUES = ("ppo",)
"""Methods whose model estimates the value of each token too, with a head beside that of the vocabulary."""


TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""The projections of a block that can have low-rank layers."""


@dataclass
class LoraConfig:
    """Low-rank layers beside the projections of the blocks (LoRA, Hu et al., 2021, arXiv:2106.09685)."""

    rank: int = key(
        0, "rank of the low-rank layers, which are trained in place of the weights; 0 trains all weights", minimum=0
    )
    alpha: float = key(16.0, "the product of the low-rank layers counts alpha / rank times", above=0)
    targets: list[str] = key(list(TARGETS), "projections of each block that have low-rank layers", each_choices=TARGETS)
    dropout: float = key(0.0, "dropout of the input of the low-rank layers", minimum=0, below=1)


@dataclass
class MethodConfig:
    """What a run is trained for: pretraining, or a method of tuning."""

    name: str = key("pretrain", "what the run is trained for", choices=METHODS)
    margin: float = key(
        0.0, "method=reward: how much more than the rejected reply the chosen one should get", minimum=0
    )
    centering: float = key(
        0.0, "method=reward: weight of the square of both rewards' sum, which keeps rewards near 0", minimum=0
    )
    label_smoothing: float = key(
        0.0,
        "pretrain and sft: share of a label's probability that all tokens get equal parts of, in training; dpo: share "
        "of the pairs that are taken to be labelled the wrong way round, less than half",
        minimum=0,
        below=1,
    )
    beta: float = key(0.1, "method=dpo: how strongly the model is held to the base", above=0)
    sft_weight: float = key(
        1.0,
        "method=dpo: weight of the supervised loss of the chosen replies, without which both sides of a pair may "
        "become unlikely",
        minimum=0,
    )
    teacher: str | None = key(
        None,
        "distill: the model to learn from, of the same tokenizer: a run, a checkpoint or a Hugging Face folder",
        path=True,
    )
    teacher_weight: float = key(
        0.5,
        "distill: weight of the divergence from the teacher's distribution; the cross-entropy has the rest",
        minimum=0,
        maximum=1,
    )
    reverse: float = key(
        0.0,
        "distill: 0 is the divergence KL(teacher, model), 1 is KL(model, teacher), and what is between them the "
        "generalised Jensen-Shannon divergence",
        minimum=0,
        maximum=1,
    )
    lora: LoraConfig = field(default_factory=LoraConfig)
    rewards: list[str] = key(
        [],
        "grpo, ppo: what judges the replies: exact_match, contains, matches or ends_by_itself, functions of your own "
        "as module:function or path.py:function, or reward models by the path of a run, a checkpoint or an exported "
        "folder",
    )
    reward_weights: list[float] = key([], "grpo, ppo: a weight for each of method.rewards; empty gives each 1")
    reward_timeout_s: float = key(60.0, "grpo, ppo: seconds in which a reward must judge a rank's replies", above=0)
    group_size: int = key(8, "grpo, ppo: replies to each prompt of a step; grpo needs at least 2", minimum=1)
    max_new_tokens: int = key(128, "grpo, ppo: largest number of tokens of a reply", minimum=1)
    temperature: float = key(
        1.0,
        "grpo, ppo: softmax temperature at which replies are sampled, and learnt from; distill: of both distributions",
        above=0,
    )
    generate_batch_size: int = key(64, "grpo, ppo: replies that a rank generates at once", minimum=1)
    updates: int = key(1, "grpo, ppo: optimizer steps that learn from the same replies", minimum=1)
    advantages: str = key(
        "group",
        "grpo: what a reply's reward minus its group's mean is divided by: the group's standard deviation (group), or "
        "nothing (none)",
        choices=("group", "none"),
    )
    loss: str = key(
        "dapo",
        "grpo, ppo: how the losses of tokens are averaged: each token weighs the same (dapo), each reply does (grpo), "
        "or their sum is divided by the largest possible number of tokens (dr_grpo)",
        choices=("dapo", "grpo", "dr_grpo"),
    )
    clip: float = key(
        0.2,
        "grpo, ppo: how far below 1 the ratio of a token's probability to the sampled one may fall unclipped",
        above=0,
    )
    clip_high: float | None = key(None, "grpo, ppo: how far above 1 it may rise; null means method.clip", above=0)
    kl: float = key(
        0.0,
        "how strongly the model is held to the one that the run begins from; grpo: weight of the KL divergence from it "
        "in the loss, per token; ppo: what is taken off a token's reward for each nat that it is likelier than there",
        minimum=0,
    )
    gamma: float = key(
        1.0, "ppo: how much a reward one token later counts, as a share of one at once", minimum=0, maximum=1
    )
    gae_lambda: float = key(
        0.95,
        "ppo: how far advantages rely on the rewards that came (1) rather than on the next token's value (0)",
        minimum=0,
        maximum=1,
    )
    value_weight: float = key(0.1, "ppo: weight of the value head's loss", above=0)
    value_clip: float | None = key(
        0.2, "ppo: how far a value may move from that at sampling before its loss is clipped; null never clips", above=0
    )
    whiten: bool = key(True, "ppo: normalise the advantages of a rollout to mean 0 and standard deviation 1")
