"""The stages of tools/assistant.py: the commands of each, and how what it reached is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from assistant_scores import Share, keep_scores, read_lines, score_replies, text_loss

DATA = Path("data/toy")
RECORDS = DATA / "records"
BASE, SFT, REWARD, STYLES, DPO, GRPO = (
    f"runs/toy-{name}" for name in ("base", "sft", "reward", "styles", "dpo", "grpo")
)
COMPRESSED = "runs/toy-int8"

Figures = dict[str, str]


@dataclass(frozen=True)
class Stage:
    """A step of the story: its name, what it does, its commands, and how what it has reached is measured.

    `commands` end at once if they were done before. A stage whose folder `makes` is there needs no command.
    """

    name: str
    title: str
    commands: Sequence[Sequence[str]]
    measure: Callable[[int], Figures]
    makes: str = ""


def of_model(path: str) -> Callable[[int], Figures]:
    """Return how a model is measured: its replies to held-out questions, and its loss on the base text."""

    def measure(count: int) -> Figures:
        prompts = read_lines(RECORDS / "prompts_heldout.jsonl")[:count]
        greedy, sampled = score_replies(path, prompts), score_replies(path, prompts, temperature=1.0)
        shares = {
            "exact": greedy["exact"],
            "right": greedy["right"],
            "full sentences": greedy["style"],
            "sampled exact": sampled["exact"],
        }
        keep_scores(path, shares)
        return {
            **{name: str(share) for name, share in shares.items()},
            "loss on base text": f"{text_loss(path, DATA):.3f}",
        }

    return measure


def of_reward_model(path: str, dataset: Path) -> Callable[[int], Figures]:
    """Return how a reward model is measured: on held-out pairs of a right and a wrong reply."""

    def measure(count: int) -> Figures:
        del count
        words = ["evaluate", path, f"data={dataset}", "split=train"]  # all pairs of the file, which are held out
        done = subprocess.run([sys.executable, "-m", "megatrain", *words], stdout=subprocess.PIPE, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        return {"held-out pairs in order": str(Share(found["accuracy"], found["pairs"]))}

    return measure


def of_data(count: int) -> Figures:
    """Return how large the prepared text is."""
    del count
    splits = json.loads((DATA / "card.json").read_text(encoding="utf-8"))["splits"]
    return {name: f"{split['tokens']:,} tokens" for name, split in splits.items()}


def stages(overrides: Mapping[str, Sequence[str]]) -> list[Stage]:
    """Return all stages in order; `overrides` are further words for the commands of a stage, or of `all` runs."""

    def run(name: str, title: str, path: str, *command: str) -> Stage:
        words = [*command, *overrides.get(name, ()), *overrides.get("all", ())]
        return Stage(name, title, [words], of_model(path))

    compress = ["compress", GRPO, "to=int8", f"out={COMPRESSED}", f"data={DATA}", *overrides.get("int8", ())]
    prepare = ["prepare", "data=toy", *overrides.get("data", ())]
    pairs = Path("data/toy-pairs-heldout")
    reward = [
        ["tune", SFT, experiment("reward"), *overrides.get("reward", ()), *overrides.get("all", ())],
        [
            *("prepare", "data=pairs", f"data.name={pairs.name}", f"data.paths=[{RECORDS}/pairs_heldout.jsonl]"),
            *(f"tokenizer.path={DATA}/tokenizer", "data.heldout_fraction=0"),
        ],
    ]
    return [
        Stage("data", "text, a tokenizer, and files to tune on", [prepare], of_data),
        run("base", "a base model learns five skills", BASE, "train", "experiment=assistant_toy"),
        run("sft", "it learns to answer", SFT, "tune", BASE, "experiment=assistant_toy_sft"),
        Stage("reward", "a reward model learns to tell right from wrong", reward, of_reward_model(REWARD, pairs)),
        run("styles", "another one learns to answer in two styles", STYLES, "tune", BASE, experiment("styles")),
        run("dpo", "by preferences, it chooses full sentences", DPO, "tune", STYLES, experiment("dpo")),
        run("grpo", "by rewards, it is right, in full sentences", GRPO, "tune", STYLES, experiment("grpo")),
        Stage("int8", "its weights in 8 bits", [compress], of_model(COMPRESSED), makes=COMPRESSED),
    ]


def experiment(name: str) -> str:
    """Return the word that chooses a stage's settings."""
    return f"experiment=assistant_toy_{name}"
