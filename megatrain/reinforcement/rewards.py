"""Call reward functions in a process of their own, within a time limit, and refuse what is no reward.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatrain.distributed.python_process import python_command
from megatrain.errors import ConfigError, RewardError
from megatrain.reinforcement.embedded_rewards import EMBEDDED
from megatrain.reinforcement.reward_worker import TEXTS
from megatrain.resilience.signals import set_parent_death_signal

LOAD_LIMIT_S = 120.0
"""Longest time for importing a user's module, which may import torch."""
POLL_S = 1.0
_DUMP_S = 10.0
"""Longest wait for a hanging process to write where it is."""
_SHOWN = 200
"""Characters of a prompt or a reply that a message quotes."""


@dataclass(frozen=True)
class Replies:
    """Replies to be judged, in lists of equal length. A prompt is text, or a list of messages.

    `fields` has those of the prompts' records by name.
    """

    prompts: list[Any]
    completions: list[str]
    stopped: list[bool]
    fields: Mapping[str, list[Any]]

    def arguments(self) -> dict[str, list[Any]]:
        """Return everything that a reward function may ask for, by name."""
        return {**self.fields, "prompts": self.prompts, "completions": self.completions, "stopped": self.stopped}

    def part(self, own: slice) -> Replies:
        """Return some of the replies."""
        fields = {name: values[own] for name, values in self.fields.items()}
        return Replies(self.prompts[own], self.completions[own], self.stopped[own], fields)


def is_function(name: str) -> bool:
    """Return whether `name` stands for a reward function; any other is the path of a reward model."""
    place, _, function = name.rpartition(":")
    return name in EMBEDDED or bool(place and function.isidentifier())


def check_names(names: Sequence[str], weights: Sequence[float]) -> None:
    """Refuse names that cannot stand for a reward, or another number of weights. Raises ConfigError. Runs no code."""
    if not names:
        raise ConfigError(
            f"method.rewards=[]: name at least one: {', '.join(EMBEDDED)}, path.py:function, or a reward model"
        )
    for name in names:
        if not is_function(name) and "/" not in name:
            raise ConfigError(
                f"method.rewards: {name} is neither an embedded reward ({', '.join(EMBEDDED)}) nor module:function, "
                f"path.py:function or the path of a reward model (./{name} for a folder here)"
            )
    if len(set(names)) < len(names):
        raise ConfigError(f"method.rewards={list(names)}: a reward is named twice; give it a weight instead")
    if weights and len(weights) != len(names):
        raise ConfigError(
            f"method.reward_weights={list(weights)}: {len(weights)} weights for {len(names)} rewards; give one for each"
        )


class RewardFunctions:
    """The rewards of a run, loaded in a process that is replaced after a failure.

    `beat` is called every second while a reward runs.

    Raises:
        RewardError: a reward cannot be loaded, or needs a field that the prompts do not have.
    """

    def __init__(
        self, names: Sequence[str], fields: Sequence[str], limit_s: float, beat: Callable[[], None] = lambda: None
    ) -> None:
        self.names, self.limit_s, self._beat = list(names), limit_s, beat
        self._available = [*fields, *TEXTS]
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __call__(self, replies: Replies) -> np.ndarray:
        """Return the rewards of the replies, float64 `[replies, rewards]`.

        Raises:
            RewardError: a reward raised, took longer than the limit, ended its process, or returned something else
                than one finite number a reply. The message names the reward and quotes the reply.
        """
        arguments = replies.arguments()
        columns = []
        for number, name in enumerate(self.names):
            answer = self._ask({"number": number, "arguments": arguments}, name, self.limit_s, replies)
            if "error" in answer:
                raise RewardError(f"{named(name)} {answer['error']}; {quoted(replies, answer['sample'])}")
            columns.append(answer["rewards"])
        return np.array(columns, np.float64).T.reshape(len(replies.completions), len(self.names))

    def close(self) -> None:
        """End the process, and those that the rewards have started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._dumps.close()
            self._process = None

    def _start(self) -> None:
        self._dumps = tempfile.TemporaryFile()  # noqa: SIM115 (held open as long as the process)
        parent, linux, number = os.getpid(), sys.platform == "linux", self._dumps.fileno()
        self._process = subprocess.Popen(
            python_command("megatrain.reinforcement.reward_worker", str(number)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(number,),
            start_new_session=True,  # a group of its own, to end with what rewards start
            preexec_fn=(lambda: set_parent_death_signal(parent)) if linux else None,
        )
        self._rest = b""
        for name in self.names:
            answer = self._ask({"load": name, "available": self._available}, name, LOAD_LIMIT_S)
            if "error" in answer:
                raise RewardError(f"{named(name)}: {answer['error']}")
            if answer["missing"]:
                raise RewardError(
                    f"{named(name)} needs {', '.join(map(repr, answer['missing']))}, no field of the prompts; "
                    f"they have {', '.join(self._available)}"
                )

    def _ask(self, request: dict[str, Any], name: str, limit_s: float, about: Replies | None = None) -> dict[str, Any]:
        """Return the answer of the process to a request about the reward `name`. Raises RewardError if none comes."""
        assert self._process is not None and self._process.stdin is not None
        place = f"; {quoted(about, 0)}" if about else ""
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._line(time.monotonic() + limit_s)
        except (BrokenPipeError, EOFError):
            code = self._process.wait()
            self.close()
            raise RewardError(f"{named(name)} ended its process (exit code {code}){place}") from None
        if line is None:
            where = self._where()
            self.close()
            raise RewardError(
                f"{named(name)} did not return within method.reward_timeout_s={limit_s:g}{where}"
                f"{f'; of {len(about.completions)} replies the first: {quoted(about, 0)}' if about else ''}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _line(self, deadline: float) -> bytes | None:
        """Return the next line that the process writes; None if none comes in time. Raises EOFError if it ended."""
        assert self._process is not None and self._process.stdout is not None
        file = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            readable, _, _ = select.select([file], [], [], min(left, POLL_S))
            self._beat()
            if readable:
                data = os.read(file, 1 << 16)
                if not data:
                    raise EOFError
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _where(self) -> str:
        """Return where the process hangs, as its own dump of the stack says."""
        assert self._process is not None
        self._process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + _DUMP_S
        while time.monotonic() < deadline:
            self._dumps.seek(0)
            *lines, _ = self._dumps.read().decode(errors="replace").split("\n")  # the last one may be half a line
            if frames := [line.strip() for line in lines if line.strip().startswith("File ")]:
                return f" (it is at {frames[0]})"
            time.sleep(0.02)
        return ""


def named(name: str) -> str:
    """Return how messages name a reward."""
    return f"method.rewards: {name}"


def quoted(replies: Replies, sample: int) -> str:
    """Return a prompt and its reply, shortened."""
    prompt, reply = replies.prompts[sample], replies.completions[sample]
    return f"prompt {str(prompt)[-_SHOWN:]!r}, reply {reply[:_SHOWN]!r}"
