"""The arithmetic of tools/bench: the interval of a median, ratios of turns, and the message about a missing peer."""

from __future__ import annotations

import random
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

TOOLS = Path(__file__).parents[3] / "tools" / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Put tools/bench on the import path, as for its scripts."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import compare
    import intervals
    import turns

    yield compare, intervals, turns
    for name in ("compare", "intervals", "turns"):
        sys.modules.pop(name, None)


def test_the_interval_of_ten_values_is_the_textbooks(bench):
    """Ten values: second smallest to second largest, 97.9% (1 - 22/1024); six: smallest to largest, 96.9%."""
    _, intervals, _ = bench
    found = intervals.median_interval([10.0, 3, 9, 1, 5, 4, 2, 8, 7, 6])
    assert (found.value, found.low, found.high, found.num_values) == (5.5, 2, 9, 10)
    assert found.coverage == 1 - 22 / 1024 and str(found) == "5.500 [2.000, 9.000]"
    found = intervals.median_interval(range(1, 7))
    assert (found.low, found.high, found.coverage) == (1, 6, 1 - 2 / 64)


def test_too_few_values_are_reported(bench):
    """Five values reach 93.75%, not 95%: the interval is their range. One value has no interval; none has no median."""
    _, intervals, _ = bench
    found = intervals.median_interval([1.0, 2, 3, 4, 5])
    assert (found.low, found.high, found.coverage) == (1, 5, 0.9375)
    found = intervals.median_interval([7.0])
    assert (found.value, found.low, found.high, found.coverage) == (7, 7, 7, 0)
    with pytest.raises(ValueError, match="no values"):
        intervals.median_interval([])


@pytest.mark.parametrize("num_values", [6, 10, 25])
def test_the_interval_holds_the_median_as_often_as_it_says(bench, num_values):
    """Over many draws from a skewed distribution with a known median, coverage is within three standard errors."""
    _, intervals, _ = bench
    generator, times, hits = random.Random(5), 2000, 0
    for _ in range(times):
        found = intervals.median_interval([generator.lognormvariate(0, 1) for _ in range(num_values)])
        hits += found.low <= 1 <= found.high
    error = (found.coverage * (1 - found.coverage) / times) ** 0.5
    assert found.coverage >= 0.95 and abs(hits / times - found.coverage) < 3 * error


def test_ratios_compare_turns_of_the_same_round(bench):
    """A peer that missed a round is compared in the other rounds; above 1 means that megatrain is faster."""
    compare, _, turns = bench

    def turn(contender, number, step_s):
        return turns.Turn(contender, number, step_s, 2 * step_s, 1 / step_s, 1.0, 1, None, [])

    taken = [
        turn("megatrain", 1, 1.0),
        turn("a", 1, 2.0),
        turn("megatrain", 2, 4.0),
        turn("b", 2, 1.0),
        turn("a", 2, 6.0),
    ]
    found = compare.ratios(taken, "a")
    assert found["step_s"]["each"] == found["whole_step_s"]["each"] == [2.0, 1.5] and found["step_s"]["value"] == 1.75
    assert compare.ratios(taken, "b")["step_s"]["each"] == [0.25]


def test_a_turn_leaves_its_warm_up_out(bench):
    """The median covers the steps after the warm-up, the total time starts at the end of the last warm-up step, and a
    turn with missing steps does not count."""
    _, _, turns = bench
    job = {"steps": 5, "global_batch": 2, "seq_len": 10}
    times, ends = [50.0, 1, 2, 3, 4], [160.0, 162, 165, 169, 175]
    found = turns.figures("a", 1, job, 2, times, ends, 100.0, 7, None, [])
    assert found.step_s == statistics.median([2, 3, 4]) and found.whole_step_s == pytest.approx(13 / 3)
    assert found.tokens_per_s == pytest.approx(20 / 3) and found.first_step_s == 60
    with pytest.raises(turns.TurnFailed, match="4 of 5"):
        turns.figures("a", 1, job, 2, times[1:], ends[1:], 100.0, 7, None, [])


def test_the_message_about_a_missing_peer_says_how_to_install_it(bench, tmp_path, monkeypatch):
    """Both before its environment exists and when a package is missing from it."""
    _, _, turns = bench
    monkeypatch.setattr(turns, "ROOT", tmp_path)
    monkeypatch.setattr(turns, "HERE", tmp_path / "tools" / "bench")
    monkeypatch.setattr(turns, "ENVIRONMENTS", tmp_path / "none")
    with pytest.raises(turns.TurnFailed, match=r"none/litgpt does not exist; .*compare.py --setup --peers litgpt"):
        turns.probe("litgpt")
    python = turns.python_of("litgpt")
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho \'{"versions": {}, "missing": ["litgpt", "lightning"]}\'\n')
    python.chmod(0o755)
    with pytest.raises(turns.TurnFailed, match=r"litgpt, lightning is not installed in .*--setup"):
        turns.probe("litgpt")


CHECKOUT = """
import json, pathlib, sys, time
name = next(word.partition("=")[2] for word in sys.argv if word.startswith("run.name="))
run = pathlib.Path("runs") / name
run.mkdir(parents=True)
with (run / "metrics.jsonl").open("w", buffering=1) as file:
    for step in range(1, {steps} + 1):
        time.sleep(0.01)
        file.write(json.dumps({{"step": step, "step_time_s": {step_s}}}) + "\\n")
    file.write('{{"step": ')
    file.flush()
    sys.exit("it broke")
"""


@pytest.fixture
def revisions(bench):
    import revisions

    yield revisions
    for name in ("revisions", "alternation"):
        sys.modules.pop(name, None)


def checkout(folder, step_s, steps=10_000):
    """Make a checkout whose train command writes steps of this duration and then breaks."""
    (folder / "megatrain").mkdir(parents=True)
    (folder / "megatrain" / "__main__.py").write_text(CHECKOUT.format(step_s=step_s, steps=steps))
    return folder


def turns_of(old, new):
    return SimpleNamespace(old=old, new=new, threads=1, turns=2, seconds=0.5)


def test_two_revisions_take_turns(revisions, tmp_path):
    """Each turn's figure is that checkout's own; nothing runs afterwards."""
    arguments = turns_of(checkout(tmp_path / "a", 0.02), checkout(tmp_path / "b", 0.03))
    assert revisions.take_turns(arguments, ["model=tiny"], tmp_path) == {"old": [0.02] * 2, "new": [0.03] * 2}
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in commands if words[-3:-1] == ["train", "model=tiny"]]


def test_a_revision_that_ends_or_is_no_checkout_is_named(revisions, bench, tmp_path):
    good, short = checkout(tmp_path / "a", 0.02), checkout(tmp_path / "b", 0.02, steps=8)
    with pytest.raises(bench[2].TurnFailed, match="new ended: it broke"):
        revisions.take_turns(turns_of(good, short), ["model=tiny"], tmp_path)
    with pytest.raises(bench[2].TurnFailed, match=f"{tmp_path / 'nowhere'} is no checkout"):
        revisions.take_turns(turns_of(tmp_path / "nowhere", good), ["model=tiny"], tmp_path)


def test_the_whole_name_orders_the_corpus_of_the_cleaning_benchmark(bench):
    import cleaning

    sys.modules.pop("cleaning")
    names = [f"METADATA{package}.dist-info" for package in ("numpy", "torch", "rich")]
    assert len({cleaning.hash_of(name) for name in names}) == len(names)
    assert cleaning.hash_of("METADATA") == cleaning.hash_of("METADATA") < 2**64
