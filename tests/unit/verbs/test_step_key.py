"""`step=` chooses a checkpoint of a run, in every verb that takes a run's model."""

import json

import pytest
from safetensors.torch import load_file

from megatrain import cli
from megatrain.verbs.completion import candidates

VERBS = {
    "evaluate": ["device=cpu"],
    "generate": ["device=cpu", "prompt=the"],
    "export": ["out=exported"],
    "inspect": [],
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Work in an empty folder. `generate` prints a number of its weights: two steps hardly change the text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megatrain.verbs.generate.stream", lambda model, *_: [repr(model.head.weight.sum().item())])


@pytest.fixture
def said(tmp_path, capsys):
    """Return the exit code of a command, what it computed or printed, and its messages."""

    def go(verb, path, *words, code=0):
        capsys.readouterr()
        assert cli.main([verb, str(path), *VERBS[verb], *words]) == code
        out, err = capsys.readouterr()
        if code:
            return err
        if verb == "evaluate":
            return {name: value for name, value in json.loads(out).items() if name != "seconds"}
        if verb == "export":
            weights = load_file("exported/model.safetensors")
            (tmp_path / "exported").rename(tmp_path / f"kept_{len(list(tmp_path.iterdir()))}")
            return {name: tensor.tolist() for name, tensor in weights.items()}
        return out

    return go


@pytest.mark.parametrize("verb", VERBS)
def test_step_gives_what_the_path_of_the_checkpoint_gives(verb, finished, said):
    results = [said(verb, finished / "checkpoints" / f"step_0000000{step}") for step in (2, 4)]
    assert results[0] != results[1]
    for run in (finished, finished / "checkpoints"):
        assert [said(verb, run, f"step={step}") for step in (2, 4)] == results
    if verb != "inspect":
        assert said(verb, finished, "step=null") == results[1]


@pytest.mark.parametrize("verb", VERBS)
def test_a_step_without_a_checkpoint_names_those_there_are(verb, finished, said):
    assert "no checkpoint of step 3 (there are: 2, 4)" in said(verb, finished, "step=3", code=2)
    checkpoint = finished / "checkpoints" / "step_00000002"
    assert f"but path={checkpoint} is no run; leave step out" in said(verb, checkpoint, "step=2", code=2)


@pytest.mark.parametrize("verb", VERBS)
def test_the_steps_of_the_run_are_completed_and_help_explains_the_key(verb, finished, capsys):
    line = f"megatrain {verb} {finished} prompt=the step="
    assert candidates(line, cli.FLAGS) == ["step=4", "step=2"]
    assert candidates(f"megatrain {verb} path={finished} step=2", cli.FLAGS) == ["step=2"]
    assert candidates(f"megatrain {verb} step=", cli.FLAGS) == []
    assert candidates(f"megatrain {verb} st", cli.FLAGS)[0] == "step="
    assert cli.main([verb, "--help", "step"]) == 0
    assert "step of the run's checkpoint" in capsys.readouterr().out
