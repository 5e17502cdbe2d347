"""`megatrain prepare`: make a dataset ready for training. `data/preparation.py` does the work."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatrain.config import DataConfig, PrepareConfig
from megatrain.config.choices import CONFIG_DIR, CONFIG_FILE, SEARCH_PATH
from megatrain.config.compose import compose, default_choices, last_words, own_folders
from megatrain.config.own_dataset import find_dataset
from megatrain.config.suggest import next_step
from megatrain.config.values import quoted
from megatrain.data import preparation
from megatrain.data.demo.corpus import prepare_demo
from megatrain.launch import prepare_jobs

QUICKSTART = "quickstart"
"""The experiment of README's first run, and its dataset."""

EXPERIMENTS = {("python_stdlib", QUICKSTART): QUICKSTART, ("toy", "toy"): "assistant_toy"}
"""Experiments that are made for a dataset, by its kind and name."""

STEPS = 1000
"""Steps of the run that is advised. The default of train.steps is for a trial."""

TUNED = {
    "chat": ("method=sft",),
    "pairs": ("method=dpo",),
    "prompts": ("method=grpo", "method.rewards=[exact_match]"),
}
"""The words of `megatrain tune` that learn from each kind of data to tune on."""


def prepare(config: PrepareConfig, overrides: Sequence[str] = (), flags: Sequence[str] = ()) -> Path:
    """Prepare the dataset that `config` describes, say what to type next, and return its folder.

    With `launch=slurm` submit the jobs that prepare it. `overrides` and `flags` are those of the command; what is to be
    typed next has its folders, config file, choice of data and mixture.
    """
    stage = config.launch.stage
    if config.launch.name == "slurm" and stage == "all":
        if not preparation.is_done(config):
            arguments = [word for word in overrides if not word.lstrip("+").startswith(("launch=", "launch."))]
            arguments = [*(flag for flag in flags if flag != "--dry-run"), *arguments]
            prepare_jobs.submit(config, arguments, "--dry-run" in flags, preparation.settings(config))
        return Path(config.data.dir) / config.data.name
    folder = prepare_demo(config) if config.data.kind == "demo" else preparation.prepare(config)
    if stage in ("all", "publish"):
        mixture = ("data.mixture", "data.mixture_temperature", "data.phases")  # of data=demo, which train takes too
        words = last_words(overrides, (CONFIG_DIR, CONFIG_FILE, SEARCH_PATH, "data", *mixture))
        if experiment := EXPERIMENTS.get((config.data.kind, config.data.name)):
            words = [f"experiment={experiment}"]
        if config.data.kind == "files" and _is_a_choice(config, overrides):
            words = [word for word in words if word not in last_words(words, ("data",))]
            words.append(quoted("data", config.data.name))
            words += [quoted("data.dir", config.data.dir)] * (config.data.dir != DataConfig().dir)
        given = {"data.name": config.data.name, "data.dir": config.data.dir}
        default = asdict(compose("train", words).data)
        words += [quoted(key, value) for key, value in given.items() if value != default[key.removeprefix("data.")]]
        report = shlex.join(["megatrain", "report", str(folder)])
        if method := TUNED.get(config.data.kind):
            named = [quoted(key, value) for key, value in given.items() if value != getattr(DataConfig(), key[5:])]
            words = ["megatrain", "tune", "<run>", *method, *named]
            print(next_step(shlex.join(words), *([report] * (config.data.kind != "prompts"))), file=sys.stderr)
            return folder
        if not any(word.startswith((CONFIG_FILE + "=", "experiment=")) for word in words):  # these have a model
            words = [f"model={default_choices('train')['model']}", *words, f"train.steps={STEPS}"]
        print(next_step(shlex.join(["megatrain", "train", *words]), report), file=sys.stderr)
    return folder


def _is_a_choice(config: PrepareConfig, overrides: Sequence[str]) -> bool:
    """Return whether `data=<name>` alone names the dataset for `megatrain train`."""
    folder = Path(config.data.dir) / config.data.name
    return find_dataset(config.data.name, config.data.dir, own_folders(overrides)) == folder
