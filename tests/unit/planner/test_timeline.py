"""Pipeline timelines: the order is torch's, the bubble is the theory's, and the report draws them."""

import itertools
import re
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest

from megatrain.planner.timeline import Action, orders, simulate, theoretical_bubble
from megatrain.report.run_page import collect, report
from megatrain.report.timeline_drawing import draw

STAGES = {
    "gpipe": 1,
    "1f1b": 1,
    "interleaved_1f1b": 2,
    "interleaved_zero_bubble": 2,
    "zbv_zero_bubble": 2,
}
CASES = [(name, pp, v, m) for name, v in STAGES.items() for pp in (2, 3, 4) for m in (pp * v, 4 * pp)]
CASES += [("interleaved_1f1b", 2, 3, 4), ("interleaved_zero_bubble", 4, 3, 8), ("zbv_zero_bubble", 3, 2, 4)]


@pytest.mark.parametrize(("schedule", "pp", "v", "m"), [case for case in CASES if case[0] != "1f1b"])
def test_the_order_is_the_one_that_torch_plans(schedule, pp, v, m):
    """torch's 1F1B does not run its own plan, in which the last rank begins with micro-batch 1.

    tests/parity/test_schedules.py compares what it runs.
    """
    from megatrain.parallel.schedules import ONE_STAGE_A_RANK, SEVERAL_STAGES_A_RANK

    def stage(number):
        return SimpleNamespace(
            stage_index=number, num_stages=pp * v, group_size=pp, group_rank=0, submod=SimpleNamespace(modules=list)
        )

    if schedule in ONE_STAGE_A_RANK:
        torch_order = ONE_STAGE_A_RANK[schedule](stage(0), m).pipeline_order
    else:
        torch_order = SEVERAL_STAGES_A_RANK[schedule]([stage(number) for number in range(v)], m).pipeline_order
    for rank, own in enumerate(orders(schedule, pp, v, m)):
        actions = [str(action) for action in torch_order[rank] if action is not None and action.is_compute_op]
        assert [f"{action.stage}{action.kind}{action.micro_batch}" for action in own] == actions


@pytest.mark.parametrize(("schedule", "pp", "v", "m"), [case for case in CASES if "zero_bubble" not in case[0]])
def test_schedules_with_whole_backwards_wait_as_long_as_the_theory_says(schedule, pp, v, m):
    bubble = simulate(orders(schedule, pp, v, m), {"F": 1, "B": 2}).bubble
    assert bubble == pytest.approx(theoretical_bubble(pp, v, m))


@pytest.mark.parametrize(("schedule", "pp", "v", "m"), [case for case in CASES if "zero_bubble" in case[0]])
def test_split_backwards_wait_less(schedule, pp, v, m):
    assert simulate(orders(schedule, pp, v, m)).bubble < 0.67 * theoretical_bubble(pp, v, m)


def test_an_action_starts_after_its_input_and_one_at_a_time_on_a_rank():
    timeline = simulate(orders("zbv_zero_bubble", 3, 2, 7))
    ends = {span.action: span.end for spans in timeline.ranks for span in spans}
    assert len(ends) == 7 * 6 * 3
    for spans in timeline.ranks:
        assert all(later.start >= earlier.end for earlier, later in itertools.pairwise(spans))
        for (stage, kind, m), start, _ in spans:
            if kind == "F" and stage:
                assert start >= ends[Action(stage - 1, "F", m)]
            if kind == "I":
                assert start >= (ends[Action(stage + 1, "I", m)] if stage < 5 else ends[Action(stage, "F", m)])


def test_a_heavy_stage_makes_the_others_wait():
    """gpipe, p = 2, m = 2, the last stage twice as heavy: forward 1 + 2 + 2, backward 4 + 4 + 2, 18 units of work."""
    timeline = simulate(orders("gpipe", 2, 1, 2), {"F": 1, "B": 2}, work=[1, 2])
    assert timeline.length == 15
    assert timeline.bubble == pytest.approx((2 * 15 - 18) / 18)


def run_with(folder, parallel, steps=16, world=4, layers=8):
    run_dir = folder / "demo"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(
        f"parallel: {{{parallel}}}\nmodel: {{num_layers: {layers}}}\n"
        f"train: {{global_batch_size: {steps}, micro_batch_size: 1}}\n"
    )
    (run_dir / "events.jsonl").write_text(
        f'{{"time": "2026-11-24T10:00:00Z", "kind": "start", "step": 0, "world_size": {world}}}\n'
    )
    return run_dir


@pytest.mark.parametrize(("schedule", "v"), STAGES.items())
def test_the_report_draws_the_timeline_of_a_pipeline(schedule, v, tmp_path):
    """4 ranks in 2 stages: 2 data ranks, so 16 sequences a step are 8 micro-batches."""
    run_dir = run_with(tmp_path, f"tp: 1, pp: 2, cp: 1, schedule: {schedule}, virtual_stages: {v}")
    pipeline = collect(run_dir)["pipeline"]
    picture = ElementTree.fromstring(pipeline["svg"])
    forwards = [element for element in picture.iter() if element.get("class", "").split()[:1] == ["F"]]
    assert len(forwards) == 8 * 2 * v + 1  # and the legend's
    assert f"{theoretical_bubble(2, v, 8):.1%}" in pipeline["text"]
    assert f"{simulate(orders(schedule, 2, v, 8)).bubble:.1%}" in pipeline["text"]
    page = report(run_dir).read_text()
    assert "\\u003csvg" in page and not re.search(r"(src|href)=", page)


@pytest.mark.parametrize(
    "parallel",
    [
        "tp: 1, pp: 1",
        "pp: 2, schedule: nonsense",
        "pp: two",
        "pp: 2, schedule: 1f1b, virtual_stages: 0",
        "pp: 64, tp: 1",
    ],
)
def test_a_run_without_a_pipeline_or_with_a_foreign_config_has_no_timeline(parallel, tmp_path):
    run_dir = run_with(tmp_path, parallel)
    assert collect(run_dir)["pipeline"] is None
    report(run_dir)


def test_a_picture_of_a_long_step_shows_its_beginning_size(tmp_path):
    """1,000 micro-batches would be a page of blocks a pixel wide: the drawing shows a shorter step and says so."""
    run_dir = run_with(tmp_path, "tp: 1, pp: 4, cp: 1, schedule: 1f1b, virtual_stages: 1", steps=1000)
    pipeline = collect(run_dir)["pipeline"]
    assert "1,000 micro-batches" in pipeline["text"] and "drawing shows 16" in pipeline["text"]
    assert len(pipeline["svg"]) < 60_000


def test_numbers_are_written_where_they_fit():
    numbers = re.findall(r'class="number"[^>]*>(\d+)<', draw([("", simulate(orders("1f1b", 2, 1, 4)))]))
    assert sorted(numbers) == sorted(str(m) for m in range(4) for _ in range(4))
