"""Reward functions run in a process of their own; what is no reward is refused by name, with the reply."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatrain.errors import ConfigError, RewardError
from megatrain.reinforcement.embedded_rewards import contains
from megatrain.reinforcement.rewards import Replies, RewardFunctions, check_names

REPLIES = Replies(
    prompts=["2+2?", "3+3?", "4+4?"],
    completions=["4", "It is 6.", "88"],
    stopped=[True, True, False],
    fields={"answer": [4, "6", "8"]},
)

OWN = """
import os, sys, time
def length(completions):
    print("noise on standard output")
    return [len(text) for text in completions]
def everything(prompts, completions, answer, **others):
    assert sorted(others) == ["stopped"]
    return [float(str(a) in c) for c, a in zip(completions, answer)]
def raises(completions):
    return [1 / (text != "88") for text in completions]
def hangs(completions):
    time.sleep(1000)
def starts(completions):
    import subprocess
    child = subprocess.Popen(["sleep", "1000"])
    return [child.pid] * len(completions)
def nan(completions):
    return [0, float("nan"), 0]
def short(completions):
    return [1.0]
def words(completions):
    return ["good", 1, 2]
def crashes(completions):
    os._exit(3)
def one(completions):
    return 1.0
def needs_key(completions, key):
    return completions
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file with a user's rewards."""
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


@pytest.fixture
def opened() -> Iterator[list[RewardFunctions]]:
    """Reward functions to close at the end."""
    functions: list[RewardFunctions] = []
    yield functions
    for function in functions:
        function.close()


def test_embedded_and_own_rewards_give_one_column_each(own: Path, opened: list[RewardFunctions]) -> None:
    names = ["exact_match", "contains", "ends_by_itself", f"{own}:length", f"{own}:everything"]
    functions = RewardFunctions(names, ["answer"], 60.0)
    opened.append(functions)
    expected = [[1, 1, 1, 1, 1], [0, 1, 1, 8, 1], [0, 0, 0, 2, 1]]
    assert np.array_equal(functions(REPLIES), expected)
    assert np.array_equal(functions(REPLIES), expected), "a second call gives the same"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("raises", "raised ZeroDivisionError: division by zero at .*own.py, line 10; prompt '4[+]4[?]', reply '88'"),
        ("nan", "returned nan; prompt '3[+]3[?]', reply 'It is 6.'"),
        ("short", "returned 1 values for 3 replies"),
        ("words", "returned 'good', which is no number; prompt '2[+]2[?]'"),
        ("one", "returned float 1.0, not one number a reply"),
        ("crashes", "ended its process [(]exit code 3[)]"),
    ],
)
def test_what_is_no_reward_is_refused_with_its_reply(
    own: Path, opened: list[RewardFunctions], function: str, said: str
) -> None:
    functions = RewardFunctions([f"{own}:{function}"], ["answer"], 60.0)
    opened.append(functions)
    with pytest.raises(RewardError, match=f"method.rewards: .*own.py:{function} {said}"):
        functions(REPLIES)


def test_a_reward_that_hangs_is_ended_at_the_limit_and_told_where(own: Path, opened: list[RewardFunctions]) -> None:
    beats: list[float] = []
    functions = RewardFunctions([f"{own}:hangs"], ["answer"], 3.0, lambda: beats.append(time.monotonic()))
    opened.append(functions)
    with pytest.raises(RewardError, match=r"hangs did not return within method.reward_timeout_s=3 .*line 12.*'2\+2\?'"):
        functions(REPLIES)
    assert beats


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{own}:absent", "has no function absent .it has crashes, everything"),
        ("{folder}/none.py:f", "there is no file"),
        ("no_such_module_here:f", "there is no module no_such_module_here"),
        ("{own}:needs_key", "needs 'key', no field of the prompts; they have answer, prompts"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_refused(own: Path, name: str, said: str) -> None:
    with pytest.raises(RewardError, match=said):
        RewardFunctions([name.format(own=own, folder=own.parent)], ["answer"], 60.0)


@pytest.mark.parametrize(
    ("names", "weights", "said"),
    [
        ([], [], "name at least one"),
        (["exact"], [], "exact is neither an embedded reward"),
        (["exact_match", "exact_match"], [], "named twice"),
        (["exact_match", "a.py:f"], [1.0], "1 weights for 2 rewards"),
    ],
)
def test_names_and_weights_are_checked_without_running_code(names: list[str], weights: list[float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_names(names, weights)


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("It is 42.", 42, True),
        ("It is 142 or 421.", 42, False),
        ("421, so 42", 42, True),
        ("答案是42。", "42", True),
        ("这是北京吗", "北京", True),
        ("a cathedral", "cat", False),
        ("the cat's", "cat", True),
        ("x42", "42", True),
        ("", "42", False),
    ],
)
def test_an_answer_is_found_as_a_word_or_number_of_its_own(text: str, answer: object, found: bool) -> None:
    assert contains([text], [answer]) == [float(found)]


def test_what_a_reward_starts_ends_with_it(own: Path) -> None:
    functions = RewardFunctions([f"{own}:starts"], ["answer"], 60.0)
    child = Path(f"/proc/{int(functions(REPLIES)[0, 0])}/stat")
    assert child.exists()
    functions.close()
    deadline = time.monotonic() + 60
    while child.exists() and ") Z" not in child.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not child.exists() or ") Z" in child.read_text()
