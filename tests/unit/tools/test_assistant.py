"""The stages of tools/assistant.py: their commands are ones that megatrain takes, and their figures belong to them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from support.lines import make_run

from megatrain import cli
from megatrain.config import MethodConfig
from megatrain.config.compose import compose

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))
import assistant
from assistant_stages import Stage, stages

MADE_FROM = {
    **{"sft": ["toy-base"], "styles": ["toy-base"], "reward": ["toy-sft"]},
    **{"dpo": ["toy-styles"], "grpo": ["toy-styles"], "rlhf": ["toy-styles", "toy-reward"]},
    **{"merged": ["toy-dpo", "toy-grpo", "toy-rlhf"], "int8": ["toy-merged"]},
}


@pytest.mark.parametrize("stage", stages({}), ids=lambda stage: stage.name)
def test_each_command_is_composed_and_makes_its_folder_from_earlier_stages(stage):
    for words in stage.commands:
        arguments = cli.parse(list(words))
        config = compose(arguments.verb, arguments.overrides)
        if arguments.verb in ("train", "tune"):
            assert f"runs/{config.run.name}" == stage.makes and config.tracking.register
        if arguments.verb in ("merge", "compress"):
            assert config.out == stage.makes
    given = getattr(config, "paths", None) or [getattr(config, "path", None)]
    given += [name for name in getattr(config, "method", MethodConfig()).rewards if name.startswith("runs/")]
    assert (given if stage.made_from else []) == list(stage.made_from)
    assert [Path(path).name for path in stage.made_from] == MADE_FROM.get(stage.name, [])


def test_further_words_go_to_their_stage_or_to_all_runs():
    listed = {stage.name: stage.commands[-1] for stage in stages({"sft": ["seed=1"], "all": ["tracking=none"]})}
    assert listed["sft"][-2:] == ["seed=1", "tracking=none"]
    assert listed["base"][-1] == "tracking=none" and "seed=1" not in listed["base"]
    assert not any("tracking=none" in listed[name] for name in ("data", "merged", "int8"))


def test_a_stage_that_does_not_exist_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(assistant, "run_stage", lambda *_: pytest.fail("a stage was run"))
    for words in (["--until=sfd"], ["sfd:seed=1"]):
        monkeypatch.setattr(sys, "argv", ["assistant.py", *words])
        with pytest.raises(SystemExit):
            assistant.main()
        assert "sfd: no such stage; there are data, base, sft" in capsys.readouterr().err


@pytest.fixture
def story(tmp_path, monkeypatch):
    """Two stages whose runs are finished; `asked` has the questions of each time that one was measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assistant, "megatrain", lambda *words: None)
    make_run(Path("runs"), "tuned", make_run(Path("runs"), "base"))
    asked = []

    def measure(count):
        asked.append(count)
        return {"exact": "0.500"}

    command = [["tune", "runs/base"]]
    base = Stage("base", "", [["train"]], "runs/base", measure)
    listed = [base, Stage("tuned", "", command, "runs/tuned", measure, made_from=["runs/base"])]
    return listed, asked


def test_ctrl_c_gives_the_command_time_to_save_and_says_that_it_goes_on(monkeypatch, tmp_path, capsys):
    class Interrupted:
        """A process whose wait is interrupted once, as by Ctrl-C, and which then ends as a run that saved."""

        waits = 0

        def __init__(self, words):
            self.words = words

        def __enter__(self):
            return self

        def __exit__(self, *error):
            assert self.waits == 2, "the command was not waited for"

        def wait(self):
            self.waits += 1
            if self.waits == 1:
                raise KeyboardInterrupt
            return 75

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.Popen", Interrupted)
    monkeypatch.setattr(sys, "argv", ["assistant.py", "--until=data"])
    assert assistant.main() == 75
    assert capsys.readouterr().out.endswith("stopped; the same command goes on from here\n")


def test_figures_are_of_the_newest_checkpoint_and_of_as_many_questions(story):
    listed, asked = story
    base = listed[0]
    for count in (400, 400, 100):
        assistant.run_stage(base, listed, count)
    assert asked == [400, 100]
    make_run(Path("runs"), "base", step=6)
    for _ in range(2):
        assistant.run_stage(base, listed, 100)
    assert asked == [400, 100, 100]


def test_what_was_made_from_a_model_that_has_changed_is_refused_with_what_to_remove(story, capsys):
    listed, asked = story
    last = Stage("last", "", [["merge"]], "runs/last", listed[0].measure, made_from=["runs/tuned"])
    make_run(Path("runs"), "last", Path("runs/tuned/checkpoints/step_00000005"))
    assistant.run_stage(listed[1], listed, 400)
    make_run(Path("runs"), "base", step=6)
    with pytest.raises(assistant.StageError) as error:
        assistant.run_stage(listed[1], [*listed, last], 400)
    assert error.value.code == 2 and asked == [400]
    said = capsys.readouterr().out
    assert "runs/tuned was made from runs/base, which has changed" in said
    assert "rm -r runs/tuned runs/last" in said
    shutil.rmtree("runs/tuned")
    make_run(Path("runs"), "tuned", Path("runs/base/checkpoints/step_00000006"))
    assistant.run_stage(listed[1], listed, 400)
    assert asked == [400, 400]
