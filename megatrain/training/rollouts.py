"""Assemble the stream of a run that learns from its own replies: prompts, rewards, a model to sample with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.checkpoint.manifest import Manifest, Progress
from megatrain.checkpoint.naming import checkpoint_name
from megatrain.checkpoint.store import CheckpointStore, load_into
from megatrain.checkpoint.weights import plan_transfer
from megatrain.config import SAMPLING, TrainConfig
from megatrain.data.chat.template import ChatTemplate
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.distributed.world import World
from megatrain.engine.protocol import Engine
from megatrain.engine.whole_model import WholeModel
from megatrain.errors import CheckpointError
from megatrain.model.gpt import GPT
from megatrain.parallel.layout import Layout
from megatrain.reinforcement.rewards import RewardFunctions
from megatrain.reinforcement.rollout import PREFIX, Rollout, Widths
from megatrain.reinforcement.sampler import Sampler
from megatrain.reinforcement.stream import RolloutStream
from megatrain.training.datasets import RunData
from megatrain.training.origin import Origin, base_of, checkpoint_at, load_origin

REFERENCE = "buffer.reference"
"""The name of what a checkpoint says of the reference, int64 `[2]`: a checksum of its weights, and its step."""


def rollout_buffers(config: TrainConfig, manifest: Manifest) -> dict[str, Tensor]:
    """Return empty tensors for what a checkpoint holds besides the engine's, such as a rollout to go on with.

    Raises CheckpointError if it is missing.
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
    return found


@dataclass(frozen=True)
class ReferenceModel:
    """The model that `method.kl` keeps a run close to; `record` is what checkpoints say of it."""

    model: GPT
    record: Tensor


def reference_model(
    config: TrainConfig, engine: Engine, world: World, store: CheckpointStore, resumed: Origin | None
) -> ReferenceModel | None:
    """Return the model that the run began from, if `method.kl` needs it. `resumed` is the checkpoint to go on from.

    Its weights are loaded through the engine, whose own must be loaded afterwards.

    Raises:
        CheckpointError: the weights that the run began from are gone or were changed.
    """
    if config.method.name not in SAMPLING or not config.method.kl:
        return None
    base = base_of(config, store)
    assert base is not None, "verbs/method_checks.py refuses method.kl without a base"
    record: Tensor | None = None
    if resumed is not None:
        record = torch.empty(2, dtype=torch.int64)
        load_into(resumed.folder, resumed.manifest, {REFERENCE: record}, resumed.node or world)
        if base.manifest.step != record[1]:  # the run that it is of has gone on
            base = checkpoint_at(base.folder.parent / checkpoint_name(int(record[1])), world)
    taken = plan_transfer(base.folder, base.manifest, config.model, config.checkpoint.override).taken
    load_origin(base, engine, world, taken)
    whole = WholeModel(config, world)
    whole.take(engine.state(), shares=False)
    found = torch.tensor([int(whole.checksum(), 16) >> 1, base.manifest.step])
    if record is not None and not torch.equal(record, found):
        raise CheckpointError(
            f"{base.folder} does not hold the weights that this run began from, which method.kl={config.method.kl:g} "
            "compares with; put them back, or begin another run.name"
        )
    return ReferenceModel(whole.model, found)


def rollout_stream(
    data: RunData,
    engine: Engine,
    world: World,
    layout: Layout,
    progress: Progress,
    buffers: dict[str, Tensor],
    reference: ReferenceModel | None,
) -> RolloutStream:
    """Return the stream of a run whose method samples. `buffers` holds what its checkpoint has besides the engine's.

    Raises:
        RewardError: a reward cannot be loaded.
    """
    config, prompts = data.config, data.prompts
    assert prompts is not None
    method = config.method
    tokenizer = load_tokenizer(data.folder / "tokenizer")
    rewards = RewardFunctions(method.rewards, prompts.fields, method.reward_timeout_s, world.heartbeat.beat)
    ends = ChatTemplate(tokenizer).ends()
    sampler = Sampler(method, config.seed, world, tokenizer, ends, rewards, reference.model if reference else None)
    return RolloutStream(
        *(config, prompts, data.order, sampler, WholeModel(config, world), engine.state),
        dp_rank=layout.dp_rank(world.rank),
        dp_size=layout.dp,
        widths=row_widths(config, layout),
        first_step=progress.step + 1,
        cursor=progress.cursor,
        rollout=Rollout.of_state(buffers) if buffers else None,
        kept={REFERENCE: reference.record} if reference else {},
    )


def row_widths(config: TrainConfig, layout: Layout) -> Widths:
    """Return how long rows are: all of train.seq_len where the layout or the compiler wants one length."""
    if layout.pp > 1 or config.compile:
        return Widths(config.train.seq_len, config.train.seq_len)
    return Widths(config.train.seq_len, math.lcm(2 * layout.cp if layout.cp > 1 else 1, layout.tp))
