"""A model's line: every ancestor back to the first, which outlives their folders, through merging and exporting."""

import json
import shutil
from functools import partial

import pytest
from support.lines import make_run

from megatrain.checkpoint import lineage
from megatrain.checkpoint.manifest import Identity, Manifest, read_manifest
from megatrain.errors import CheckpointError
from megatrain.report.lineage_section import lineage as boxes_of
from megatrain.report.run_page import collect
from megatrain.training.origin import Origin, inherited_line


@pytest.fixture
def make(tmp_path):
    """Make a run with one checkpoint, from the checkpoints of other runs, and return that checkpoint."""
    return partial(make_run, tmp_path)


def test_the_line_is_complete_when_the_folders_of_ancestors_are_gone(make, tmp_path):
    base = make("base", method="pretrain", step=9)
    tuned = make("tuned", base)
    make("last", tuned, method="dpo")
    shutil.rmtree(tmp_path / "base")
    line = lineage.find_line(tmp_path / "last")
    assert [(one.name, one.by, one.step) for one in line] == [
        ("base", "pretrain", 9),
        ("tuned", "sft", 5),
        ("last", "dpo", 5),
    ]
    assert [one.parents for one in line] == [[], [line[0].checksum], [line[1].checksum]]
    assert lineage.rows(line)[2] == ["last", "dpo", "tuned", "last-data (ffffffff)", "5"]
    assert lineage.tags(line)["parents"] == "tuned step 5"
    assert lineage.tags(line)["lineage"] == "base (pretrain) → tuned (sft) → last (dpo)"
    assert [box["name"] for box in boxes_of(tmp_path / "last")] == ["base", "tuned", "last"]


def test_a_model_of_two_has_both_as_parents_and_their_common_base_once(make):
    base = make("base", method="pretrain")
    merged = make("merged", make("a", base), make("b", base))
    line = lineage.find_line(merged)
    assert [one.name for one in line] == ["base", "a", "b", "merged"]
    assert line[3].parents == [line[1].checksum, line[2].checksum]


def test_a_resumed_run_keeps_its_line_and_a_new_one_adds_what_it_began_from(make):
    base = make("base", method="pretrain")
    tuned = make("tuned", base)
    manifest = read_manifest(tuned)
    assert inherited_line(Origin(tuned, manifest, resumes=True), "tuned")[0] == manifest.identity.ancestors
    for origin, name in ((Origin(tuned, manifest, resumes=False), "tuned"), (Origin(tuned, manifest, True), "other")):
        line, parents = inherited_line(origin, name)
        assert [one.name for one in line] == ["base", "tuned"] and parents == [line[1].checksum]


def test_a_run_with_a_reward_model_of_the_same_base_has_both_as_parents(make):
    """The reward model is made from the base too, which stays a parent of its own."""
    tuned = make("tuned", make("base", method="pretrain"))
    judge = make("judge", tuned, method="reward")
    began = Origin(tuned, read_manifest(tuned), resumes=False)
    line, parents = inherited_line(began, "learns", lineage.find_line(judge))
    assert [one.name for one in line] == ["base", "tuned", "judge"]
    assert parents == [line[1].checksum, line[2].checksum]
    manifest = Manifest(identity=Identity({"run": {"name": "learns"}}, ancestors=line, parents=parents))
    read = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    own = lineage.as_ancestor(judge, read)
    assert own.parents == parents and lineage.rows([*line, own])[-1][2] == "tuned, judge"
    resumed = Origin(judge, read, resumes=True)
    assert inherited_line(resumed, "learns", lineage.find_line(judge)) == (line, parents), "a resume keeps them"


def test_an_exported_folder_carries_the_line_and_damage_to_it_is_named(make, tmp_path):
    tuned = make("tuned", make("base", method="pretrain"))
    out = tmp_path / "exported"
    out.mkdir()
    lineage.write_line(lineage.find_line(tuned), out)
    assert lineage.find_line(out) == lineage.find_line(tuned)
    (out / lineage.LINEAGE).write_text('[{"name": "x"}]')
    with pytest.raises(CheckpointError, match=r"lineage.json\[0\].by"):
        lineage.find_line(out)
    (out / lineage.LINEAGE).write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        lineage.find_line(out)


def test_the_page_of_a_run_that_began_from_nothing_has_no_line(make, tmp_path):
    make("base", method="pretrain")
    assert len(boxes_of(tmp_path / "base")) == 1
    assert collect(tmp_path / "base")["lineage"] == []
