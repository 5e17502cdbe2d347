"""Every command in README.md and docs/guide is one that its verb and its layout accept as printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatrain.cli import parse
from megatrain.config.compose import compose
from megatrain.parallel import rules
from megatrain.verbs.sweep_points import compose_points, expand
from megatrain.verbs.value_checks import check_values

ROOT = Path(__file__).parents[3]
OWN_FILES = ("own_configs.md",)
"""Pages whose commands need files of the reader's own; tests/unit/config/test_own_yaml.py has such files."""

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
GPUS_A_NODE = 8
"""What a cluster's profile would say; recipes for Slurm leave it to the profile."""


def recipes():
    """Return each command of a fenced block: the page, and the words after `megatrain`."""
    found = []
    for page in (page for page in PAGES if page.name not in OWN_FILES):
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = [word.replace("%a", "1") for word in shlex.split(line, comments=True)]
                if "--wrap" in words:
                    words = shlex.split(words[words.index("--wrap") + 1])
                if "slurm/train.sbatch" in words:
                    nodes = next((w.partition("=")[2] for w in words if w.startswith("--nodes=")), "1")
                    rest = words[words.index("slurm/train.sbatch") + 1 :]
                    words = ["megatrain", "train", f"launch.num_nodes={nodes}", *rest]
                if words[:1] == ["megatrain"] and "..." not in words and "|" not in words:
                    found.append((page.name, words[1:]))
    return found


@pytest.mark.parametrize(
    ("page", "words"), recipes(), ids=lambda value: " ".join(value) if isinstance(value, list) else value
)
def test_a_printed_command_is_accepted(page, words, tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()  # the reader's own text
    (tmp_path / "runs" / "reward").mkdir(parents=True)  # and what they trained
    (tmp_path / "data" / "mine").mkdir(parents=True)  # and their dataset
    (tmp_path / "data" / "mine" / "card.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    arguments = parse([word for word in words if "<" not in word])
    if arguments.verb is None or "--help" in arguments.flags:
        return
    if "--multirun" in arguments.flags and arguments.verb == "tune":  # its points would need the base
        fixed, combinations = expand(arguments.overrides, "tune")
        points = [[*fixed.values(), *(f"{key}={value}" for key, value in one.items())] for one in combinations]
        configs = [compose("tune", words) for words in points]
    elif "--multirun" in arguments.flags:
        configs = [point.config for point in compose_points(arguments.overrides)]
    else:
        configs = [compose(arguments.verb, arguments.overrides)]
    for config in configs:
        check_values(config)
        if arguments.verb == "train":
            nodes = config.launch.num_nodes or 1
            ranks = config.launch.nproc_per_node if nodes == 1 else GPUS_A_NODE
            rules.check(config, nodes * ranks)
