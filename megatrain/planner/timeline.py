"""When each rank of a pipeline computes what, and how long it waits: the schedules as data. Imports no torch.

The orders are those of torch's schedules (a test compares them). Times have the unit of the durations.
Letters: F forward, B whole backward, I input gradients only, W weight gradients only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatrain.parallel.stages import LOOPED, V_SHAPED, ZERO_BUBBLE

DURATIONS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
"""Costs of a stage's actions relative to its forward: each matrix product causes two in the backward pass."""


class Action(NamedTuple):
    """One computation of a stage on a micro-batch; `kind` is F, B, I or W."""

    stage: int
    kind: str
    micro_batch: int


class Span(NamedTuple):
    """An action with its start and end."""

    action: Action
    start: float
    end: float


class Timeline(NamedTuple):
    """The spans of one step: for each rank, its actions in order."""

    ranks: list[list[Span]]

    @property
    def length(self) -> float:
        """From the first start to the last end."""
        return max(spans[-1].end for spans in self.ranks)

    @property
    def bubble(self) -> float:
        """Idle over ideal time: the time that ranks wait in a step, divided by the time that they compute."""
        busy = sum(span.end - span.start for spans in self.ranks for span in spans)
        return (self.length * len(self.ranks) - busy) / busy


def theoretical_bubble(pp: int, virtual_stages: int, num_micro_batches: int) -> float:
    """Return (p - 1) / (v m), the bubble of a schedule that fills and drains once (Narayanan et al. 2021, section 2.2).

    Exact for gpipe, 1f1b and interleaved_1f1b with equal stages and free communication; zero bubble has less.
    """
    return (pp - 1) / (virtual_stages * num_micro_batches)


def orders(schedule: str, pp: int, virtual_stages: int, num_micro_batches: int) -> list[list[Action]]:
    """Return, for each rank, its actions in the order in which they run."""
    ranks = range(pp)
    if schedule == "gpipe":
        everything = range(num_micro_batches)
        return [[Action(r, "F", m) for m in everything] + [Action(r, "B", m) for m in everything] for r in ranks]
    if schedule == "1f1b":
        return [_one_forward_one_backward(r, pp, num_micro_batches) for r in ranks]
    if schedule in V_SHAPED:
        return [_v_shaped(r, pp, num_micro_batches) for r in ranks]
    assert schedule in LOOPED, schedule
    return [_looped(r, pp, virtual_stages, num_micro_batches, schedule in ZERO_BUBBLE) for r in ranks]


def _one_forward_one_backward(rank: int, pp: int, num_micro_batches: int) -> list[Action]:
    warm_up = min(num_micro_batches, pp - rank)
    order = [Action(rank, "F", m) for m in range(warm_up)]
    for m in range(num_micro_batches):
        order.append(Action(rank, "B", m))
        if m + warm_up < num_micro_batches:
            order.append(Action(rank, "F", m + warm_up))
    return order


def _looped(rank: int, pp: int, virtual_stages: int, num_micro_batches: int, is_split: bool) -> list[Action]:
    """Run micro-batches in rounds of about `pp`, each through all of a rank's stages, forward and then backward.

    If the backward is split, rank r runs W r backward passes later than the matching I.
    """
    per_round = num_micro_batches // max(1, num_micro_batches // pp)
    total = num_micro_batches * virtual_stages
    places = [  # the order of forward passes over (local stage, micro-batch)
        (local, first + m)
        for first in range(0, num_micro_batches, per_round)
        for local in range(virtual_stages)
        for m in range(per_round)
    ]
    forwards = [Action(local * pp + rank, "F", m) for local, m in places]
    backwards = [((virtual_stages - 1 - local) * pp + rank, m) for local, m in places]
    warm_up = min((virtual_stages - 1) * per_round + (1 if is_split else 2) * (pp - 1 - rank), total)
    order = forwards[:warm_up]
    num_weights = 0
    for index, (stage, m) in enumerate(backwards):
        if warm_up + index < total:
            order.append(forwards[warm_up + index])
        order.append(Action(stage, "I" if is_split else "B", m))
        if is_split and index >= rank:
            order.append(Action(backwards[num_weights][0], "W", backwards[num_weights][1]))
            num_weights += 1
    if is_split:
        order += [Action(stage, "W", m) for stage, m in backwards[num_weights:]]
    return order


def _v_shaped(rank: int, pp: int, num_micro_batches: int) -> list[Action]:
    """ZB-V (Qi et al. 2024, section 6): two stages per rank, in a V, with split backward passes."""
    stages = (rank, 2 * pp - 1 - rank)
    count = max(2 * pp - 1, num_micro_batches)  # a shorter step is a longer one without the surplus micro-batches
    order: list[Action] = []
    done = {(leg, kind): 0 for leg in (0, 1) for kind in "FIW"}

    def run(leg: int, kinds: str) -> None:
        for kind in kinds:
            order.append(Action(stages[leg], kind, done[leg, kind]))
            done[leg, kind] += 1

    for _ in range(2 * (pp - rank) - 1):
        run(0, "F")
    for _ in range(rank):
        run(1, "F")
        run(0, "F")
    for _ in range(pp - rank):
        run(1, "FIW")
    while done[1, "F"] < done[0, "F"] or done[0, "F"] < count:
        run(0, "FIW" if done[0, "F"] < count else "IW")
        run(1, "FIW")
    for _ in range(rank):
        run(0, "I")
        run(1, "I")
    for _ in range(pp - rank):
        run(0, "IW")
    for leg in (1, 0):
        while done[leg, "W"] < done[leg, "I"]:
            run(leg, "W")
    return [action for action in order if action.micro_batch < num_micro_batches]


def simulate(
    order: Sequence[Sequence[Action]],
    durations: Mapping[str, float] = DURATIONS,
    work: Sequence[float] | None = None,
) -> Timeline:
    """Run the actions of each rank in order, each as soon as its rank is free and its input is ready.

    `work` scales the durations of each stage (default 1). Communication takes no time. The first stage has no input
    gradients, so torch runs its whole backward as W, and so does this.
    """
    last = max(action.stage for actions in order for action in actions)
    ends: dict[Action, float] = {}
    ranks: list[list[Span]] = [[] for _ in order]
    waiting = True
    while waiting:
        waiting = False
        for actions, spans in zip(order, ranks, strict=True):
            while len(spans) < len(actions):
                action = actions[len(spans)]
                ready = _ready(action, last, ends)
                if ready is None:
                    break
                start = max(ready, spans[-1].end if spans else 0.0)
                end = start + _duration(action, durations) * (work[action.stage] if work else 1.0)
                spans.append(Span(action, start, end))
                ends[action] = end
                waiting = True
    assert all(len(spans) == len(actions) for spans, actions in zip(ranks, order, strict=True)), "the order deadlocks"
    return Timeline(ranks)


def _duration(action: Action, durations: Mapping[str, float]) -> float:
    if action.stage == 0 and action.kind in "IW":
        return durations["I"] + durations["W"] if action.kind == "W" else 0.0
    return durations[action.kind]


def _ready(action: Action, last: int, ends: Mapping[Action, float]) -> float | None:
    """Return when the input of an action is ready, or None while that is unknown."""
    stage, kind, m = action
    if kind == "F":
        return 0.0 if stage == 0 else ends.get(Action(stage - 1, "F", m))
    if kind == "W":
        return ends.get(Action(stage, "I", m))
    if stage == last:
        return ends.get(Action(stage, "F", m))
    return ends.get(Action(stage + 1, kind, m))
