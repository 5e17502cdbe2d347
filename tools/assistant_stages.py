"""The stages of tools/assistant.py: the commands of each, what it makes of what, and how that is measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from assistant_scores import Mean, keep_scores, read_lines, score_replies, text_losses

from megatrain.checkpoint.lineage import find_line
from megatrain.data.card import CARD, Card

DATA = Path("data/toy")
RECORDS = DATA / "records"
HELDOUT_PAIRS = Path("data/toy-pairs-heldout")
BASE, SFT, REWARD, STYLES, DPO, GRPO, RLHF, MERGED, COMPRESSED = (
    f"runs/toy-{name}" for name in ("base", "sft", "reward", "styles", "dpo", "grpo", "rlhf", "merged", "int8")
)

Figures = dict[str, str]


@dataclass(frozen=True)
class Stage:
    """A step of the story: its name, what it does, its commands, and how what it has reached is measured.

    `commands` make the folder `makes` of the models `made_from`. Of a run they end at once if it is finished;
    a folder that is no run is made once.
    """

    name: str
    title: str
    commands: Sequence[Sequence[str]]
    makes: str
    measure: Callable[[int], Figures]
    made_from: Sequence[str] = ()

    def is_made(self) -> bool:
        """Return whether the folder is there and no run, whose command would go on with it."""
        return Path(self.makes).exists() and self.commands[-1][0] in ("merge", "compress")

    def outdated(self) -> str | None:
        """Return which model the folder should have been made from and was not, if there is one."""
        line = find_line(Path(self.makes)) if self.made_from else []
        return next((path for path in self.made_from if line and fingerprint(path) not in line[-1].parents), None)


def fingerprint(path: str) -> str:
    """Return what identifies a dataset, or a model: the checksum of its newest checkpoint."""
    if (Path(path) / CARD).exists():
        return Card.load(Path(path)).fingerprint
    return find_line(Path(path))[-1].checksum


def of_model(path: str, before: str | None) -> Callable[[int], Figures]:
    """Return how a model is measured: its replies to held-out questions, and its loss on the base text.

    `before` is a model that it was made from; both are measured on the same text.
    """

    def measure(count: int) -> Figures:
        prompts = read_lines(RECORDS / "prompts_heldout.jsonl")[:count]
        greedy, sampled = score_replies(path, prompts), score_replies(path, prompts, temperature=1.0)
        second = score_replies(path, prompts, after_another=True)
        losses = text_losses(path, DATA)
        means = {
            "exact": greedy["exact"],
            "second exact": second["exact"],
            "right": greedy["right"],
            "full sentences": greedy["style"],
            "sampled exact": sampled["exact"],
            "text loss": Mean.of(losses),
        }
        keep_scores(path, means)
        figures = {name: str(mean) for name, mean in means.items()}
        return figures | ({"text loss before": str(Mean.of(text_losses(before, DATA)))} if before else {})

    return measure


def of_reward_model(count: int) -> Figures:
    """Return how often the reward model puts a right reply before a wrong one, on held-out pairs."""
    del count
    words = ["evaluate", REWARD, f"data={HELDOUT_PAIRS}", "split=train"]  # all pairs of the file, which are held out
    done = subprocess.run([sys.executable, "-m", "megatrain", *words], stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    share, pairs = found["accuracy"], found["pairs"]
    means = {"pairs in order": Mean(share, math.sqrt(share * (1 - share) / pairs), pairs)}
    keep_scores(REWARD, means)
    return {name: str(mean) for name, mean in means.items()}


def of_data(count: int) -> Figures:
    """Return how large the prepared text is."""
    del count
    return {name: f"{split.tokens:,} tokens" for name, split in Card.load(DATA).splits.items()}


def stages(overrides: Mapping[str, Sequence[str]]) -> list[Stage]:
    """Return all stages in order; `overrides` are further words for the command of a stage, or of `all` runs."""

    def tuned(name: str, title: str, base: str, *before: Sequence[str]) -> Stage:
        words = ["tune", base, f"experiment=assistant_toy_{name}", *overrides.get(name, ()), *overrides.get("all", ())]
        made = f"runs/toy-{name}"
        return Stage(name, title, [*before, words], made, of_model(made, base), [base])

    def derived(name: str, title: str, verb: str, made_from: Sequence[str], *words: str) -> Stage:
        made = f"runs/toy-{name}"
        command = [verb, *made_from, *words, f"out={made}", f"data={DATA}", *overrides.get(name, ())]
        return Stage(name, title, [command], made, of_model(made, made_from[0]), made_from)

    base = ["train", "experiment=assistant_toy", *overrides.get("base", ()), *overrides.get("all", ())]
    heldout = prepared("pairs", "pairs_heldout", HELDOUT_PAIRS.name, "data.heldout_fraction=0")
    reward = tuned("reward", "a reward model learns which replies are better", SFT, heldout)
    return [
        Stage(
            *("data", "text, a tokenizer, and files to tune on"),
            [["prepare", "data=toy", *overrides.get("data", ())]],
            *(str(DATA), of_data),
        ),
        Stage("base", "a base model learns five skills", [base], BASE, of_model(BASE, None)),
        tuned("sft", "it learns to answer", BASE, prepared("chat", "chats", "toy-chats")),
        replace(reward, measure=of_reward_model),
        tuned("styles", "another one learns to answer in two styles", BASE, prepared("chat", "styles", "toy-styles")),
        tuned("dpo", "by preferences, it chooses full sentences", STYLES),
        tuned("grpo", "by rewards, it is right, in full sentences", STYLES),
        replace(tuned("rlhf", "the same, by the scores of the reward model", STYLES), made_from=[STYLES, REWARD]),
        derived("merged", "a weighted mean of the last three", "merge", [DPO, GRPO, RLHF], "weights=[1,2,1]"),
        derived("int8", "its weights in 8 bits", "compress", [MERGED], "to=int8"),
    ]


def prepared(kind: str, file: str, name: str, *words: str) -> list[str]:
    """Return the command that makes a dataset of one of the files to tune on."""
    paths = f"data.paths=[{RECORDS}/{file}.jsonl]"
    return ["prepare", f"data={kind}", f"data.name={name}", paths, f"tokenizer.path={DATA}/tokenizer", *words]
