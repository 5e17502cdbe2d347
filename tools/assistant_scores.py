"""Figures of the toy world's assistant: how many held-out questions a model answers, and in which style.

Everything is measured on what a model writes, not on its loss: a model can prefer right replies and write none.
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
from megatrain.tracking.evaluation_records import run_folder_of, write_record

Judge = Callable[..., list[float]]

LONGEST = 24
"""Most tokens of a reply: twice what the longest right one has."""


@dataclass(frozen=True)
class Share:
    """A share of `count` cases, with its standard error."""

    value: float
    count: int

    @property
    def error(self) -> float:
        """The standard error of the share."""
        return math.sqrt(self.value * (1 - self.value) / self.count)

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


def text_loss(model_path: str, dataset: Path, windows: int = 128) -> float:
    """Return a model's loss on the first held-out windows of the base text, in nats a token: what is not forgotten."""
    trained = megatrain.load(model_path, "cpu")
    length = trained.config.max_seq_len
    data = IndexedDataset.open(dataset, "heldout")
    count = min(windows, (sum(map(int, map(sum, data.lengths()))) - 1) // length)
    ids = torch.from_numpy(data.read(0, count * length + 1).astype(np.int64))
    inputs, labels = ids[:-1].view(count, length), ids[1:].view(count, length)
    with torch.no_grad():
        logits = trained.model(inputs)
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def keep_scores(model_path: str, shares: Mapping[str, Share]) -> None:
    """Write the scores of a run's newest checkpoint into its folder, where its page and its descendants' show them."""
    found = peek(Path(model_path))
    run_dir = run_folder_of(found[0]) if found else None
    if found is None or run_dir is None:
        return
    scores = [Score(name, share.value, share.error, True) for name, share in shares.items()]
    result = TaskResult("toy", None, None, next(iter(shares.values())).count, scores)
    write_record(run_dir, found[1].step, "examples", "toy", result.to_dict(with_samples=False))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def score_replies(model_path: str, prompts: Sequence[Mapping[str, Any]], temperature: float = 0.0) -> dict[str, Share]:
    """Ask a model all questions, greedily or sampling, and return the share of replies that each judge accepts."""
    trained = megatrain.load(model_path, "cpu")
    model, tokenizer = trained.model, trained.tokenizer
    assert tokenizer is not None
    template = ChatTemplate(tokenizer)
    ends = frozenset([*template.ends(), *trained.end_tokens])
    asked = [template.encode([{"role": "user", "content": one["prompt"]}], asks=True).ids for one in prompts]
    settings = [
        SamplingSettings(LONGEST, temperature=temperature, seed=number, stop_ids=ends) for number in range(len(asked))
    ]
    replies = BatchGenerator(model, num_slots=64, capacity=model.config.max_seq_len).run(asked, settings)
    fields = {name: [record[name] for record in prompts] for name in prompts[0] if name != "prompt"}
    fields["completions"] = [tokenizer.decode([i for i in reply.ids if i not in ends]) for reply in replies]
    fields["stopped"] = [reply.finish == "stop" for reply in replies]
    judges: dict[str, Judge] = {"exact": judge.exact, "right": judge.right, "style": judge.full_sentence}
    return {name: Share(sum(one := judged(**fields)) / len(one), len(one)) for name, judged in judges.items()}
