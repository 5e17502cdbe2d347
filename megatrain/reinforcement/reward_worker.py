"""The process that runs reward functions, apart from the rank that asks: user code may raise, hang, print or crash.

It reads one JSON object a line from its standard input and answers each with one line on its standard output. What a
reward prints goes to standard error. Started by `rewards.py`; imports no torch.
"""

from __future__ import annotations

import faulthandler
import inspect
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from megatrain.config.named_function import NoFunctionError, load_function
from megatrain.reinforcement.embedded_rewards import EMBEDDED, Reward

TEXTS = ("prompts", "completions", "stopped")
"""What every reward may ask for besides the fields of the records."""


def load_reward(name: str) -> Reward:
    """Return the function that `name` stands for: an embedded reward, `module:function` or `path.py:function`.

    Raises:
        NoFunctionError: there is no such file, module or function. Errors of the module itself are raised as they are.
    """
    return EMBEDDED[name] if name in EMBEDDED else load_function(name)


def wanted_arguments(reward: Reward, available: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return which of the `available` arguments a reward takes, and those that it needs and that do not exist."""
    parameters = inspect.signature(reward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        taken = list(available)
    else:
        taken = [p.name for p in parameters if p.name in available]
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    missing = [p.name for p in parameters if p.kind in named and p.default is p.empty and p.name not in available]
    return taken, missing


class Worker:
    """The loaded rewards of one process."""

    def __init__(self) -> None:
        self.rewards: list[tuple[Reward, list[str]]] = []

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request: `load` a reward, or call the reward `number`."""
        if "load" in request:
            reward = load_reward(request["load"])
            taken, missing = wanted_arguments(reward, request["available"])
            self.rewards.append((reward, taken))
            return {"missing": missing}
        reward, taken = self.rewards[request["number"]]
        arguments = {name: request["arguments"][name] for name in taken}
        count = len(request["arguments"]["completions"])
        try:
            found = reward(**arguments)
        except Exception as error:
            return {**_told(error), "sample": _first_to_raise(reward, arguments, count)}
        return _checked(found, count)


def _told(error: BaseException) -> dict[str, Any]:
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" at {last[0].filename}, line {last[0].lineno}" if last else ""
    return {"error": f"raised {type(error).__name__}: {error}{place}"}


def _first_to_raise(reward: Reward, arguments: dict[str, list[Any]], count: int) -> int:
    """Return the first reply for which a reward raises if it gets that one alone; 0 if it gets along with each."""
    for sample in range(count):
        try:
            reward(**{name: values[sample : sample + 1] for name, values in arguments.items()})
        except Exception:
            return sample
    return 0


def _checked(found: Any, count: int) -> dict[str, Any]:
    """Return a reward's numbers, or what is wrong with them."""
    try:
        values = list(found)
    except TypeError:
        return {"error": f"returned {type(found).__name__} {str(found)[:40]}, not one number a reply", "sample": 0}
    if len(values) != count:
        return {"error": f"returned {len(values)} values for {count} replies", "sample": 0}
    numbers = []
    for sample, value in enumerate(values):
        try:
            number = float(value)
        except (TypeError, ValueError):
            return {"error": f"returned {value!r:.40}, which is no number", "sample": sample}
        if not math.isfinite(number):
            return {"error": f"returned {number}", "sample": sample}
        numbers.append(number)
    return {"rewards": numbers}


def main() -> None:
    """Answer requests until standard input ends. The first argument is the file descriptor for dumps of the stack."""
    dumps = int(sys.argv[1])
    faulthandler.register(signal.SIGUSR1, file=dumps, all_threads=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the rank decides when this process ends
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a reward that prints must not disturb the answers
    sys.path.insert(0, os.getcwd())
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except NoFunctionError as error:
            answer = {"error": str(error)}
        except Exception as error:  # of a user's module, as it is imported
            answer = _told(error)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
