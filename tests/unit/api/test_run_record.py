"""`megatrain.Run` on a folder, while it is being written too; importing megatrain stays cheap."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import megatrain
from megatrain.errors import ConfigError, DataError, MegatrainError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.yaml").write_text("optim:\n  lr: 0.5\n")
    return tmp_path


def write(path, *records, end=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + end)


def test_a_run_that_has_not_begun_has_empty_tables(folder):
    run = megatrain.Run(folder)
    assert run.config == {"optim": {"lr": 0.5}}
    assert len(run.metrics) == len(run.events) == len(run.checkpoints) == 0
    assert run.metrics.index.name == run.checkpoints.index.name == "step"
    assert "0 steps" in repr(run)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "a: 1\na: 2\n"])
def test_a_damaged_config_is_named(folder, text):
    (folder / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        _ = megatrain.Run(folder).config


@pytest.mark.parametrize("step", ["x", [1], 2.5])
def test_a_step_that_is_no_number_is_refused(folder, step):
    with pytest.raises(ConfigError, match="expected the number of a step"):
        megatrain.Run(folder).load(step=step)
    with pytest.raises(ConfigError, match="expected the number of a step"):
        megatrain.load(folder, step=step)
    with pytest.raises(ConfigError, match="no checkpoint of step 3"):
        megatrain.load(folder, step=3)


def test_tables_grow_with_their_files(folder):
    run = megatrain.Run(str(folder))
    first = {"step": 1, "loss": 2.5, "heldout_loss": None, "time": "2026-01-31T12:00:00.123Z"}
    write(folder / "metrics.jsonl", first, {**first, "step": 2, "loss": 2.25}, end='{"step": 3, "lo')
    write(folder / "events.jsonl", {"time": first["time"], "kind": "start", "step": 0, "host": "a"}, end="{")
    assert list(run.metrics.index) == [1, 2]
    assert list(run.metrics["loss"]) == [2.5, 2.25]
    assert run.metrics["time"].iloc[0].microsecond == 123000
    assert run.metrics["time"].iloc[0].utcoffset().total_seconds() == 0
    (event,) = run.events.to_dict("records")
    assert (event["kind"], event["step"], event["detail"]) == ("start", 0, {"host": "a"})


def test_what_is_no_run_is_refused_and_damage_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no such file or folder; did you mean .*holds .*"):
        megatrain.Run(folder.parent / f"{folder.name}x")
    with pytest.raises(ConfigError, match="not a run's folder"):
        megatrain.Run(folder.parent)
    write(folder / "metrics.jsonl", {"loss": 1.0})
    with pytest.raises(DataError, match="line 1"):
        megatrain.Run(folder).metrics  # noqa: B018


@pytest.mark.parametrize("call", [megatrain.Run, megatrain.load])
@pytest.mark.parametrize("given", [None, 123, b"runs", ["runs"]])
def test_what_is_no_path_is_refused(call, given):
    with pytest.raises(megatrain.MegatrainError, match=r"path: expected the path of a folder, as text .*, given "):
        call(given)


@pytest.mark.parametrize("name", ["{}/nope", "~nobody-here/runs"])
def test_a_folder_that_does_not_exist_is_refused_alike(tmp_path, name):
    found = []
    for call in (megatrain.Run, megatrain.load):
        with pytest.raises(ConfigError, match=r"no such file or folder|no home") as caught:
            call(name.format(tmp_path))
        found.append(str(caught.value))
    assert found[0] == found[1]


def test_the_base_class_of_errors_is_a_public_name():
    assert megatrain.MegatrainError is MegatrainError
    code = "import megatrain, sys; megatrain.MegatrainError; assert not {'torch', 'pandas'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_checkpoints_without_a_readable_manifest_are_left_out(folder):
    (folder / "checkpoints" / "step_00000004").mkdir(parents=True)
    run = megatrain.Run(folder)
    assert len(run.checkpoints) == 0
    assert "steps [4]" in repr(run)


def test_importing_megatrain_imports_neither_torch_nor_pandas():
    found = subprocess.run(
        [sys.executable, "-c", "import megatrain, sys; print({'torch', 'pandas'} & set(sys.modules), dir(megatrain))"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert found.startswith("set()")
    assert all(f"'{name}'" in found for name in megatrain.__all__)
    with pytest.raises(AttributeError, match="it has MegatrainError, Run, load, train"):
        megatrain.fit  # noqa: B018


def test_the_rooms_do_not_hide_a_public_name():
    """A subpackage of the same name would replace it once it is imported."""
    source = "import pkgutil, megatrain; print({m.name for m in pkgutil.iter_modules(megatrain.__path__)})"
    rooms = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout
    assert not [name for name in megatrain.__all__ if f"'{name}'" in rooms]
