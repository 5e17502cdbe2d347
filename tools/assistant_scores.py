"""Figures of the toy world's assistant: how many held-out questions it answers, in which style, and what it forgot.

Answers are judged on what a model writes, not by its loss: a model can prefer right replies and write none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import megatrain
from megatrain.checkpoint.find import peek
from megatrain.data.chat.template import ChatTemplate
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.toy import judge
from megatrain.evaluation.results import Score, TaskResult
from megatrain.inference.batch_generator import BatchGenerator
from megatrain.inference.draw import SamplingSettings
from megatrain.tracking.evaluation_records import records_folder, write_record

Judge = Callable[..., list[float]]

LONGEST = 24
"""Most tokens of a reply: twice what the longest right one has."""
ROWS = 64
"""Sequences that are computed at once."""


@dataclass(frozen=True)
class Mean:
    """A mean of `count` cases, with its standard error."""

    value: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Mean:
        """Return the mean of values: of zeros and ones, their share."""
        return cls(float(np.mean(values)), float(np.std(values)) / math.sqrt(len(values)), len(values))

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


def text_losses(model_path: str, dataset: Path) -> np.ndarray:
    """Return a model's mean loss in each held-out window of the base text, in nats a token.

    The windows are those that the base was trained on: `max_seq_len` tokens, whatever document they begin in.
    """
    trained = megatrain.load(model_path, "cpu")
    length = trained.config.max_seq_len
    data = IndexedDataset.open(dataset, "heldout")
    count = (data.num_tokens - 1) // length
    ids = torch.from_numpy(data.read(0, count * length + 1).astype(np.int64))
    losses = []
    for inputs, labels in zip(
        ids[:-1].view(count, length).split(ROWS), ids[1:].view(count, length).split(ROWS), strict=True
    ):
        with torch.no_grad():
            logits = trained.model(inputs).transpose(1, 2)
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none").mean(1))
    return torch.cat(losses).numpy()


def keep_scores(model_path: str, means: Mapping[str, Mean]) -> None:
    """Write the scores of a model beside its checkpoint, where its page and its descendants' show them."""
    found = peek(Path(model_path))
    assert found is not None, "the model was loaded before"
    scores = [Score(name, mean.value, mean.error, "loss" not in name) for name, mean in means.items()]
    result = TaskResult("toy", None, None, next(iter(means.values())).count, scores)
    write_record(records_folder(found[0]), found[1].step, "examples", "toy", result.to_dict(with_samples=False))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def score_replies(
    model_path: str, prompts: Sequence[Mapping[str, Any]], temperature: float = 0.0, after_another: bool = False
) -> dict[str, Mean]:
    """Ask a model all questions, greedily or sampling, and return the share of replies that each judge accepts.

    With `after_another` each question is the second one of its conversation, after the one before it in the list.
    """
    trained = megatrain.load(model_path, "cpu")
    model, tokenizer = trained.model, trained.tokenizer
    assert tokenizer is not None
    template = ChatTemplate(tokenizer)
    ends = frozenset([*template.ends(), *trained.end_tokens])
    asked = []
    for number, one in enumerate(prompts):
        before = prompts[number - 1]
        first = [("user", before["prompt"]), ("assistant", before["label"])] if after_another else []
        messages = [{"role": role, "content": text} for role, text in (*first, ("user", one["prompt"]))]
        asked.append(template.encode(messages, asks=True).ids)
    settings = [
        SamplingSettings(LONGEST, temperature=temperature, seed=number, stop_ids=ends) for number in range(len(asked))
    ]
    replies = BatchGenerator(model, num_slots=ROWS, capacity=model.config.max_seq_len).run(asked, settings)
    fields = {name: [record[name] for record in prompts] for name in prompts[0] if name != "prompt"}
    fields["completions"] = [tokenizer.decode([i for i in reply.ids if i not in ends]) for reply in replies]
    fields["stopped"] = [reply.finish == "stop" for reply in replies]
    judges: dict[str, Judge] = {"exact": judge.exact, "right": judge.right, "style": judge.full_sentence}
    return {name: Mean.of(judged(**fields)) for name, judged in judges.items()}
