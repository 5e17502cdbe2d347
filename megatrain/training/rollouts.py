"""Assemble the stream of a run that learns from its own replies: prompts, rewards, a model to sample with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatrain.checkpoint.manifest import Manifest, Progress
from megatrain.checkpoint.store import CheckpointStore
from megatrain.checkpoint.weights import plan_transfer
from megatrain.config import SAMPLING, TrainConfig
from megatrain.data.chat.template import ChatTemplate
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.distributed.world import World
from megatrain.engine.protocol import Engine
from megatrain.engine.whole_model import WholeModel
from megatrain.errors import CheckpointError
from megatrain.parallel.layout import Layout
from megatrain.reinforcement.rewards import RewardFunctions
from megatrain.reinforcement.rollout import PREFIX, Rollout, Widths
from megatrain.reinforcement.sampler import Sampler
from megatrain.reinforcement.stream import RolloutStream
from megatrain.training.datasets import RunData
from megatrain.training.origin import base_of, load_origin

REFERENCE = "buffer.reference.checksum"
"""The name of a checksum of the reference's weights in a checkpoint."""


def rollout_buffers(config: TrainConfig, manifest: Manifest) -> dict[str, Tensor]:
    """Return empty tensors for what a checkpoint holds besides the engine's, such as a rollout to go on with.

    Raises CheckpointError if it is missing.
    """
    if config.method.name not in SAMPLING:
        return {}
    found = {
        name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        for name, entry in manifest.tensors.items()
        if name.startswith((PREFIX, REFERENCE))
    }
    if manifest.step % config.method.updates and not any(name.startswith(PREFIX) for name in found):
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} lies in the middle of a rollout (method.updates="
            f"{config.method.updates}), but holds none; continue from another step"
        )
    return found


def reference_model(config: TrainConfig, engine: Engine, world: World, store: CheckpointStore) -> WholeModel | None:
    """Return the model that `method.kl` keeps a run close to: the weights that it begins from. None without it.

    They are loaded through the engine, whose own weights must be loaded afterwards.
    """
    if config.method.name not in SAMPLING or not config.method.kl:
        return None
    origin = base_of(config, store)
    assert origin is not None, "verbs/method_checks.py refuses method.kl without a base"
    taken = plan_transfer(origin.folder, origin.manifest, config.model, config.checkpoint.override).taken
    load_origin(origin, engine, world, taken)
    reference = WholeModel(config, world)
    reference.take(engine.state(), shares=False)
    return reference


def rollout_stream(
    data: RunData,
    engine: Engine,
    world: World,
    layout: Layout,
    progress: Progress,
    buffers: dict[str, Tensor],
    reference: WholeModel | None,
) -> RolloutStream:
    """Return the stream of a run whose method samples. `buffers` holds what its checkpoint has besides the engine's.

    Raises:
        RewardError: a reward cannot be loaded.
        CheckpointError: the reference is not the model that the run began from.
    """
    config, prompts = data.config, data.prompts
    assert prompts is not None
    method = config.method
    tokenizer = load_tokenizer(data.folder / "tokenizer")
    rewards = RewardFunctions(method.rewards, prompts.fields, method.reward_timeout_s, world.heartbeat.beat)
    ends = ChatTemplate(tokenizer).ends()
    sampler = Sampler(method, config.seed, world, tokenizer, ends, rewards, reference.model if reference else None)
    kept: dict[str, Tensor] = {}
    if reference is not None:
        kept[REFERENCE] = torch.tensor([int(reference.checksum(), 16) >> 1])
        if REFERENCE in buffers and not torch.equal(buffers.pop(REFERENCE), kept[REFERENCE]):
            raise CheckpointError(
                f"checkpoint.init_from={config.checkpoint.init_from} no longer holds the weights that this run began "
                "from, which method.kl compares with: they changed, or that run has gone on; give the step that it "
                "had then, such as checkpoint.init_from=<run>/checkpoints/step_00000100"
            )
    return RolloutStream(
        *(config, prompts, data.order, sampler, WholeModel(config, world), engine.state),
        dp_rank=layout.dp_rank(world.rank),
        dp_size=layout.dp,
        widths=row_widths(config, layout),
        first_step=progress.step + 1,
        cursor=progress.cursor,
        rollout=Rollout.of_state(buffers) if buffers else None,
        kept=kept,
    )


def row_widths(config: TrainConfig, layout: Layout) -> Widths:
    """Return how long rows are: all of train.seq_len where the layout or the compiler wants one length."""
    if layout.pp > 1 or config.compile:
        return Widths(config.train.seq_len, config.train.seq_len)
    return Widths(config.train.seq_len, math.lcm(2 * layout.cp if layout.cp > 1 else 1, layout.tp))
