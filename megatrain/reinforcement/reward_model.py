"""A reward model judges replies: it lays a conversation out by its own chat template and tokenizer, and scores it.

The score is that of the last token that the template writes, as in training (`optim/preferences.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from megatrain.checkpoint.lineage import find_line, line_of
from megatrain.checkpoint.manifest import Ancestor, KeptReward
from megatrain.data.chat.conversation import Message, messages_of
from megatrain.data.chat.template import PREPARED_ON, ChatTemplate
from megatrain.data.corpus.normalise import normalise
from megatrain.errors import CheckpointError, ConfigError, RewardError
from megatrain.interop.load_model import Loaded, load
from megatrain.kernels.choice import REFERENCE, Kernels
from megatrain.reinforcement.rewards import Replies, named, quoted

BATCH = 16
"""Conversations that are scored at once. Who scores which batch changes nothing of it, and so nothing of the scores."""


class RewardModel:
    """A reward model on one device, in `dtype`.

    `name` is how the config calls it, `kept` says which it is, `line` where it came from.
    """

    def __init__(
        self, name: str, loaded: Loaded, device: torch.device, dtype: torch.dtype, kernels: Kernels = REFERENCE
    ) -> None:
        """Take the model that `load_scorer` returned.

        Raises:
            ConfigError: it comes without a tokenizer or a chat template.
        """
        self.name, self.device = name, device
        self._limit = loaded.config.max_seq_len
        try:
            self._template = ChatTemplate(loaded.need_tokenizer(writes=False), date=PREPARED_ON)
        except ConfigError as error:
            raise ConfigError(f"{named(name)}: {str(error).removeprefix('path: ')}") from error
        self.kept = KeptReward(str(loaded.folder), content_hash(loaded, self._template))
        self.line = _line(loaded, self.kept)
        self._model = loaded.build(device, kernels).to(dtype).requires_grad_(False)

    def conversation(self, prompt: Any, reply: str) -> list[int]:
        """Return the ids of a prompt (text, or messages) with a reply, in the model's own template."""
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else messages_of("prompt", prompt)
        messages: list[Message] = [*asked, {"role": "assistant", "content": reply}]
        return self._template.encode([{**one, "content": normalise(one["content"])} for one in messages]).ids

    @torch.no_grad()
    def scores(self, replies: Replies, beat: Callable[[], None] = lambda: None) -> list[float]:
        """Return the score of each reply. A batch of `BATCH` in their order is computed at once.

        Raises:
            RewardError: a conversation is too long for the model, or its score is no finite number.
        """
        rows = [
            self.conversation(prompt, reply) for prompt, reply in zip(replies.prompts, replies.completions, strict=True)
        ]
        for sample, row in enumerate(rows):
            if len(row) > self._limit:
                raise RewardError(
                    f"{named(self.name)} takes at most model.max_seq_len={self._limit} tokens, and a conversation has "
                    f"{len(row)} in its template; {quoted(replies, sample)}"
                )
        found: list[float] = []
        for first in range(0, len(rows), BATCH):
            beat()
            found += self._last_scores(rows[first : first + BATCH]).tolist()
        for sample, score in enumerate(found):
            if not math.isfinite(score):
                raise RewardError(f"{named(self.name)} returned {score}; {quoted(replies, sample)}")
        return found

    def _last_scores(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the score of each row's last token, fp32 `[B]`. It sees nothing of the padding, which comes after."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.device)
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        scores: Tensor = self._model(ids)
        return scores.gather(1, last[:, None])[:, 0]


def load_scorer(name: str, kept: Mapping[str, KeptReward] | None = None) -> Loaded:
    """Load the reward model that a run, a checkpoint or an exported folder `name` holds.

    A run that resumes gives what it `kept` of its rewards, and gets the checkpoint that it began with.

    Raises:
        ConfigError: the path holds no model, or a language model.
        CheckpointError: it is damaged, or the checkpoint that the run began with is gone.
    """
    place = Path(name)
    if kept is not None and name in kept:
        place = Path(kept[name].folder)
        if not place.is_dir():
            raise CheckpointError(
                f"{named(name)}: {place} is gone, the reward model that this run began with; put it back, or begin "
                "another run.name"
            )
    try:
        loaded = load(place.expanduser())
    except ConfigError as error:
        raise ConfigError(f"{named(name)}: {error}") from error
    if loaded.config.output != "score":
        raise ConfigError(
            f"{named(name)}: {loaded.folder} is a language model, which gives no score; name a reward model, as "
            "megatrain tune method=reward makes it"
        )
    return loaded


def check_kept(model: RewardModel, kept: Mapping[str, KeptReward]) -> None:
    """Refuse a reward model that is not the one that a run began with. Raises CheckpointError."""
    before = kept.get(model.name)
    if before is not None and before.checksum != model.kept.checksum:
        raise CheckpointError(
            f"{named(model.name)}: {model.kept.folder} holds another reward model than when this run began (weights, "
            "tokenizer or template changed); put it back, or begin another run.name"
        )


def content_hash(loaded: Loaded, template: ChatTemplate) -> str:
    """Return 32 hex digits over what makes a reward model's scores: config, weights, tokenizer and chat template."""
    digest = xxhash.xxh3_128()
    config = {key: value for key, value in asdict(loaded.config).items() if key != "name"}
    digest.update(json.dumps([config, template.tokenizer.fingerprint, template.source], sort_keys=True).encode())
    for name, weight in sorted(loaded.weights.items()):
        digest.update(name.encode())
        digest.update(_bytes(weight))
    for name, stored in sorted(loaded.quantized.items()):
        digest.update(f"{name}.{stored.kind}".encode())
        for tensor in (stored.values, stored.scale):
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _line(loaded: Loaded, kept: KeptReward) -> list[Ancestor]:
    """Return the models that a reward model came from, and itself. A folder of another library is known by itself."""
    if loaded.manifest is not None:
        return line_of(loaded.folder, loaded.manifest)
    name, folder = loaded.folder.name, str(loaded.folder)
    return find_line(loaded.folder) or [Ancestor(name, "import", folder, kept.checksum, imported_from=folder)]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data
