"""Assemble the stream of a run that learns from its own replies: prompts, rewards, a model to sample with."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from megatrain.checkpoint.manifest import Manifest, Progress
from megatrain.config import SAMPLING, TrainConfig
from megatrain.data.chat.template import ChatTemplate
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.distributed.world import World
from megatrain.engine.common import DTYPES, choose_kernels
from megatrain.engine.protocol import Engine
from megatrain.engine.whole_model import WholeModel
from megatrain.errors import CheckpointError
from megatrain.model.gpt import GPT
from megatrain.parallel.layout import Layout
from megatrain.reinforcement.heldout_replies import HeldoutReplies
from megatrain.reinforcement.judge import Judge
from megatrain.reinforcement.reward_model import RewardModel, check_kept, load_scorer
from megatrain.reinforcement.rewards import is_function
from megatrain.reinforcement.rollout import PREFIX, Rollout, Widths
from megatrain.reinforcement.sampler import Sampler
from megatrain.reinforcement.stream import RolloutStream
from megatrain.training.datasets import RunData
from megatrain.training.origin import Origin


def rollout_buffers(config: TrainConfig, manifest: Manifest) -> dict[str, Tensor]:
    """Return empty tensors for what a checkpoint holds besides the engine's, such as a rollout to go on with.

    Raises CheckpointError if it is missing, or has another number of replies than a step takes now.
    """
    if config.method.name not in SAMPLING:
        return {}
    found = {
        name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        for name, entry in manifest.tensors.items()
        if name.startswith(PREFIX)
    }
    if manifest.step % config.method.updates and not found:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} lies in the middle of a rollout (method.updates="
            f"{config.method.updates}), but holds none; continue from another step"
        )
    replies = found[f"{PREFIX}bounds"].shape[0] if found else config.train.global_batch_size
    if replies != config.train.global_batch_size:
        raise CheckpointError(
            f"train.global_batch_size={config.train.global_batch_size}: the checkpoint of step {manifest.step} lies in "
            f"the middle of a rollout of {replies} replies; change it at a step that is a multiple of method.updates="
            f"{config.method.updates} (checkpoint.resume=<checkpoint>)"
        )
    return found


def rollout_stream(
    data: RunData,
    engine: Engine,
    world: World,
    layout: Layout,
    progress: Progress,
    buffers: dict[str, Tensor],
    reference: GPT | None,
    judge: Judge,
) -> RolloutStream:
    """Return the stream of a run whose method samples. `buffers` holds what its checkpoint has besides the engine's.

    `reference` is the model of `method.kl`, `judge` gives the rewards.
    """
    config, prompts = data.config, data.prompts
    assert prompts is not None
    method = config.method
    tokenizer = load_tokenizer(data.folder / "tokenizer")
    ends = ChatTemplate(tokenizer).ends()
    sampler = Sampler(method, config.seed, world, tokenizer, ends, judge, reference)
    return RolloutStream(
        *(config, prompts, data.order, sampler, WholeModel(config, world), engine.state),
        dp_rank=layout.dp_rank(world.rank),
        dp_size=layout.dp,
        widths=row_widths(config, layout),
        first_step=progress.step + 1,
        cursor=progress.cursor,
        rollout=Rollout.of_state(buffers) if buffers else None,
    )


def load_judge(data: RunData, world: World, resumed: Origin | None) -> Judge | None:
    """Return the rewards of a run whose method samples; None for other methods. `resumed` is what it goes on from.

    Raises:
        RewardError: a function cannot be loaded.
        ConfigError: a path of `method.rewards` holds no reward model, or one without a chat template.
        CheckpointError: a reward model is damaged, or not the one that the run began with.
    """
    config, method = data.config, data.config.method
    if data.prompts is None:
        return None
    kept = resumed.manifest.identity.rewards if resumed else {}
    dtype = DTYPES[config.precision.name]
    models = []
    for name in method.rewards:
        if is_function(name):
            continue
        world.heartbeat.enter("load")
        loaded = load_scorer(name, kept)
        kernels = choose_kernels(replace(config, model=loaded.config), world.device)
        models.append(RewardModel(name, loaded, world.device, dtype, kernels))
        check_kept(models[-1], kept)
    return Judge(method.rewards, models, data.prompts.fields, method.reward_timeout_s, world.heartbeat.beat)


def heldout_replies(data: RunData, stream: object) -> HeldoutReplies | None:
    """Return what measures the held-out reward of a run; None if no prompts are held out."""
    if data.heldout_prompts is None or not isinstance(stream, RolloutStream):
        return None
    loop = data.config.train
    limit = loop.eval_steps * loop.global_batch_size if loop.eval_steps else None
    return HeldoutReplies(data.heldout_prompts, stream, limit)


def row_widths(config: TrainConfig, layout: Layout) -> Widths:
    """Return how long rows are: all of train.seq_len where the layout or the compiler wants one length."""
    if layout.pp > 1 or config.compile:
        return Widths(config.train.seq_len, config.train.seq_len)
    return Widths(config.train.seq_len, math.lcm(2 * layout.cp if layout.cp > 1 else 1, layout.tp))
