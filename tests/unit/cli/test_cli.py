"""The command line as a user meets it: verbs, flags, messages, exit codes, and what a refusal never imports."""

import errno
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

import megatrain
from megatrain import cli
from megatrain.config import VERBS, TrainConfig, walk
from megatrain.config.compose import compose, default_choices
from megatrain.config.usage import EXAMPLES, MOST_USED
from megatrain.distributed.python_process import python_command
from megatrain.errors import CheckpointError, DataError
from megatrain.resilience.owner import last_owner
from megatrain.verbs.sweep_points import compose_points
from megatrain.verbs.value_checks import check_values


@pytest.fixture
def action(monkeypatch):
    """Return a function that replaces a verb's action."""

    def replace(verb, function):
        module: Any = types.ModuleType("stand_in")
        module.act = function
        monkeypatch.setitem(sys.modules, "stand_in", module)
        monkeypatch.setitem(cli.ACTIONS, verb, "stand_in:act")

    return replace


def test_the_bare_command_and_help_name_every_verb(capsys):
    for argv in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(argv) == 0
        shown = capsys.readouterr().out
        assert all(f"  {verb}" in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_explains_every_key(verb, capsys):
    assert cli.main([verb, "--help", "all"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, f in walk(VERBS[verb]).items():
        assert f" {name} {f.metadata['help']}" in shown
        for choice in f.metadata.get("choices", ()):
            assert str(choice) in shown
    assert f"megatrain {verb}" in shown


@pytest.mark.parametrize("verb", MOST_USED)
def test_help_of_a_verb_with_many_keys_begins_with_ten_and_says_how_to_see_the_rest(verb, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "110")
    assert cli.main([verb, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4] == "most used keys:"
    shown = [line.split()[0] for line in lines[5 : lines.index("", 5)] if not line.startswith("   ")]
    assert tuple(shown) == MOST_USED[verb] and len(shown) == 10 and set(shown) <= set(walk(VERBS[verb]))
    assert lines[lines.index("", 5) + 1].endswith(f"keys: megatrain {verb} --help all")


@pytest.mark.parametrize(("columns", "widest"), [("40", 60), ("72", 72), ("90", 90), ("300", 110)])
def test_help_is_as_wide_as_the_terminal(columns, widest, monkeypatch, capsys):
    """Commands are not wrapped. A line that would be a little too wide is; so some line is nearly as wide."""
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out.splitlines()
    lengths = [len(line) for line in text if not re.match("  megatrain |usage|groups|all|one|those", line)]
    assert widest - 5 <= max(lengths) <= widest


@pytest.mark.parametrize("argv", [["--help"], *([verb, "--help", "all"] for verb in VERBS)])
def test_keys_and_flags_stand_in_two_columns(argv, monkeypatch, capsys):
    """In each list all meanings begin in one column, after at least one space."""
    monkeypatch.setenv("COLUMNS", "110")
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    flags = [line for line in text.partition("\nflags:\n")[2].splitlines() if line.startswith("  -")]
    flags = flags[: flags.index(next(line for line in flags if "--debug" in line)) + 1]
    assert len(flags) >= 3 and {line[20:22] for line in flags} == {"  "} and all(line[22] != " " for line in flags)
    keys = [line for line in text.partition("\nkeys:\n")[2].partition("\nexamples:")[0].splitlines() if line]
    assert all(line[34:36] == "  " or line[:36].isspace() for line in keys) and all(line[36] != " " for line in keys)


def test_the_help_of_import_export_and_inspect_says_what_they_take(capsys):
    for verb, takes in {"import": "<Hugging Face folder> out=DIR", "export": "<run | checkpoint> out=DIR"}.items():
        assert cli.main([verb, "--help"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: megatrain {verb} {takes} [key=value] ...\n") and "\nexamples:\n" in shown
    assert cli.main(["inspect", "--help"]) == 0
    assert "megatrain inspect <run | checkpoint | dataset | tokenizer> [key=value]" in capsys.readouterr().out


def test_help_of_a_group_shows_its_choices_its_default_and_its_keys_alone(capsys):
    assert cli.main(["train", "--help", "optim"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("  optim=      adamw (default adamw)\n  optim.name ") and "optim.grad_clip" in shown
    assert "model." not in shown and "optim/" not in shown
    assert cli.main(["train", "model", "checkpoint.every", "--help", "model=tiny", "runs/x"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "tiny (default small)" in shown and "at most 100000; default 6, from model=small)" in shown
    assert "checkpoint.every " in shown and "checkpoint.keep" not in shown


def test_help_finds_keys_by_a_word_of_their_meaning_and_refuses_one_that_nothing_has(capsys):
    assert cli.main(["train", "--help", "CLIP"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  o")] == [
        "optim.grad_clip"
    ]
    assert cli.main(["train", "--help", "optm"]) == 2
    assert "--help optm: train has no such group or key; did you mean optim? (groups: model" in capsys.readouterr().err
    assert cli.main(["inspect", "somewhere", "--help"]) == 0
    assert "usage: megatrain inspect" in capsys.readouterr().out


def test_help_names_the_default_of_every_group(capsys):
    assert cli.main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for group, default in default_choices("train").items():
        assert f"(default {default or 'none'}) " in shown.partition(f" {group}= ")[2][:200]


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_every_example_in_the_help_is_a_command_that_composes(line, tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = cli.parse(shlex.split(line)[1:])
    if "--multirun" in arguments.flags:
        assert len(compose_points(arguments.overrides)) == 4
    else:
        config = compose(arguments.verb, arguments.overrides)
        if arguments.verb != "tune":  # what the base and the data imply is missing
            check_values(config)


def test_version_prints_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatrain {megatrain.__version__}\n"


def test_cfg_prints_the_resolved_config(capsys):
    assert cli.main(["train", "--cfg", "model=tiny", "data.name=007", "train.steps=3"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["run"]["name"] == "tiny-007" and shown["data"]["name"] == "007" and shown["train"]["steps"] == 3
    assert list(shown) == list(TrainConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["trian"], "unknown verb trian; did you mean train? (verbs: prepare, train"),
        (["train", "--confg"], "unknown flag --confg; did you mean --config?"),
        (["train", "--steps", "20"], "unknown flag --steps; write train.steps=20 (flags"),
        (["train", "--optim.lr=3e-4"], "unknown flag --optim.lr=3e-4; write optim.lr=3e-4 (flags"),
        (["generate", "--prompt", "def main("], "unknown flag --prompt; write prompt='def main(' (flags"),
        (["train", "optim.lr", "=", "3e-4"], "remove the spaces around =: write optim.lr=3e-4"),
        (["train", "optim.lr", "=3e-4"], "remove the spaces around =: write optim.lr=3e-4"),
        (["train", "optim.lr=", "3e-4"], "remove the spaces around =: write optim.lr=3e-4"),
        (["train", "train.stepz=1"], "unknown key train.stepz; did you mean train.steps?"),
        (["inspect"], "path is not set"),
        (["train", "model=tiny", "model.num_heads=7"], "is not divisible by model.num_heads=7"),
        (["inspect", "no/such folder"], "path=no/such folder: no such file or folder"),
    ],
)
def test_a_mistake_is_one_message_without_a_stack_trace_and_exit_code_2(argv, says, capsys):
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("megatrain: error: ") and says in shown.err
    assert shown.err.count("\n") == 1 and not shown.out


def test_debug_shows_the_stack_trace_of_a_mistake(capsys):
    assert cli.main(["train", "train.stepz=1", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_first_argument_without_equals_is_the_path_taken_as_typed(action, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    action("inspect", lambda config: seen.append(config.path))
    for name in ("007", "it's, (odd) \\ name", "1e3"):
        (tmp_path / name).mkdir()
        assert cli.main(["inspect", name]) == 0
    assert seen == ["007", "it's, (odd) \\ name", "1e3"]


def test_the_result_of_an_action_is_the_exit_code(action, tmp_path):
    action("inspect", lambda config: 75)
    assert cli.main(["inspect", str(tmp_path)]) == 75
    action("inspect", lambda *_: None)
    assert cli.main(["inspect", str(tmp_path)]) == 0


@pytest.mark.parametrize(("error", "code"), [(DataError("bad bin"), 3), (CheckpointError("bad step"), 4)])
def test_a_users_error_in_an_action_is_a_message_and_its_own_exit_code(action, tmp_path, capsys, error, code):
    def act(config):
        raise error

    action("inspect", act)
    assert cli.main(["inspect", str(tmp_path)]) == code
    assert capsys.readouterr().err == f"megatrain: error: {error}\n"


def test_a_defect_is_a_stack_trace_a_request_to_report_it_and_exit_code_1(action, tmp_path, capsys):
    action("inspect", lambda config: 1 // 0)
    assert cli.main(["inspect", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert "ZeroDivisionError" in shown and "please report it" in shown


def test_an_interrupt_ends_with_130(action, tmp_path):
    def act(config):
        raise KeyboardInterrupt

    action("inspect", act)
    assert cli.main(["inspect", str(tmp_path)]) == 130


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["optim.lr=1", "seed=2", "+optim.lr=2"],
            "optim.lr is given 2 times; the last one counts: optim.lr=2 (before: 1)",
        ),
        (["optim/lr=1", "optim.lr=3", "optim.lr=2"], "3 times; the last one counts: optim.lr=2 (before: 1, 3)"),
        (["model=tiny", "model=small"], "model is given 2 times; the last one counts: model=small (before: tiny)"),
        (["optim.lr=2", "optim.lr=2", "model=tiny", "model.num_layers=3", "optim=adamw"], None),
    ],
)
def test_a_key_given_several_values_says_which_one_counts(words, says, capsys):
    assert cli.main(["train", "--cfg", *words]) == 0
    shown = capsys.readouterr()
    assert (says in shown.err) if says else not shown.err
    assert yaml.safe_load(shown.out)["optim"]["lr"] == 2 or "model=small" in words


def test_train_starts_local_workers_with_the_same_overrides(monkeypatch, tmp_path):
    from megatrain.launch import agent as local

    seen = []
    monkeypatch.setattr(cli, "is_launched", lambda: False)
    monkeypatch.setattr("megatrain.verbs.path_checks.check_paths", lambda *_: None)
    monkeypatch.setattr("megatrain.verbs.resources.warnings", lambda config, on_gpu: [])
    monkeypatch.setattr(local, "launch", lambda *arguments: seen.append(arguments) or 75)
    overrides = ["model=tiny", f"run.dir={tmp_path}", "run.name=a b", "launch.nproc_per_node=2"]
    assert cli.main(["train", *overrides, "--debug"]) == 75
    command = python_command("megatrain", "train", "--debug", *overrides)
    ((*started, recovery, peers),) = seen
    assert started == [command, 2, tmp_path / "a b" / "logs"] and peers.size == 1
    assert (recovery.max_restarts, recovery.limits.training_s, recovery.limits.starting_s) == (100, 600, 600)
    assert recovery.run_dir == tmp_path / "a b" and recovery.owner.number == 1
    assert last_owner(tmp_path / "a b" / "owner")[1]["released"], "the folder is free again at the end"


@pytest.mark.parametrize(
    ("code", "left", "environ", "is_removed"),
    [
        (2, (), {}, True),
        (3, (), {"SLURM_JOB_ID": "1"}, True),
        (8, (), {}, True),
        (8, (), {"SLURM_JOB_ID": "1"}, False),
        (1, (), {}, False),
        (2, ("events.jsonl",), {}, False),
        (2, ("config.yaml",), {}, False),
        (4, ("checkpoints/step_00000001/manifest.json",), {}, False),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_a_refusal_by_the_ranks_leaves_no_folder(code, left, environ, is_removed, exists, monkeypatch, tmp_path):
    """Unless it was there before, the run had begun, or a requeue needs it. Nothing else is removed.

    Rank 0 opens its records before the first batch shows what a kernel refuses: empty ones are no beginning.
    """
    from megatrain.launch import agent as local

    run = tmp_path / "new" / "runs" / "a"

    def launch(command, count, logs, *_):
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "rank_00000.log").write_text("megatrain: error: no such device\n")
        (run / "checkpoints").mkdir(exist_ok=True)
        for name in ("metrics.jsonl", "events.jsonl"):
            (run / name).touch()
        for name in left:
            (run / name).parent.mkdir(exist_ok=True)
            (run / name).write_text("{}\n")
        return code

    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "is_launched", lambda: False)
    monkeypatch.setattr("megatrain.verbs.path_checks.check_paths", lambda *_: None)
    monkeypatch.setattr("megatrain.verbs.resources.warnings", lambda config, on_gpu: [])
    monkeypatch.setattr(local, "launch", launch)
    if exists:
        run.mkdir(parents=True)
    assert cli.main(["train", "model=tiny", f"run.dir={run.parent}", "run.name=a"]) == code
    assert run.exists() == (exists or not is_removed)
    assert (tmp_path / "new").exists() == run.exists() and tmp_path.exists()
    (run.parent / "b").mkdir(parents=True, exist_ok=True)
    cli.main(["train", "model=tiny", f"run.dir={run.parent}", "run.name=a"])
    assert (run.parent / "b").exists()


def test_a_refusal_that_only_a_ranks_log_tells_keeps_the_log(monkeypatch, tmp_path):
    from megatrain.launch import agent as local

    monkeypatch.setattr(cli, "is_launched", lambda: False)
    monkeypatch.setattr("megatrain.verbs.path_checks.check_paths", lambda *_: None)
    monkeypatch.setattr("megatrain.verbs.resources.warnings", lambda config, on_gpu: [])
    monkeypatch.setattr(local, "launch", lambda command, count, logs, *_: 2)
    assert cli.main(["train", "model=tiny", f"run.dir={tmp_path}", "run.name=a"]) == 2
    assert (tmp_path / "a").is_dir()


def test_a_launched_train_is_a_worker(monkeypatch, action):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("megatrain.verbs.path_checks.check_paths", lambda *_: None)
    action("train", lambda config: 40 + config.seed)
    assert cli.main(["train", "model=tiny", "seed=2"]) == 42


@pytest.mark.parametrize(("rank", "speaker"), [("0", ""), ("1", "rank 1: ")])
def test_under_another_launcher_each_rank_reports_the_mistake(rank, speaker, monkeypatch, capsys):
    """Otherwise a mistake on one rank would leave the others waiting without an explanation."""
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "train.stepz=2"]) == 2
    assert capsys.readouterr().err.startswith(f"megatrain: error: {speaker}unknown key")


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "--cfg"],
        ["train", "train.stepz=1"],
        ["train", "model=tinny"],
        ["train", "train.steps=x"],
        ["train", "train.steps=0"],
        ["train", "model.num_heads=7"],
        ["train", "train.global_batch_size=7"],
        ["train", "data.name=none_such"],
        ["train", "--multirun", "seed=1,2", "--cfg"],
        ["train", "--multirun", "seed=1,2", "data.name=none_such"],
        ["train", "checkpoint.resume=none/such"],
        ["prepare", "tokenizer.path=none.model"],
        ["evaluate", "none/such"],
        ["evaluate", ".", "data=talks.jsonl"],
        ["inspect", "."],
        ["generate", "none/such"],
        ["export", "none/such", "out=x"],
        ["report", "none/such"],
    ],
)
def test_neither_help_nor_a_refusal_imports_torch(argv, tmp_path):
    talks = tmp_path / "talks.jsonl"
    talks.write_text("{}")
    program = (
        "import sys; from megatrain.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'deepspeed', 'mlflow', 'transformers', 'datasets'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    expected = 0 if argv[-1] in ("--help", "--cfg") else 2
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=tmp_path, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == expected, done.stderr
    assert list(tmp_path.iterdir()) == [talks]


def test_shutdown_does_not_change_the_exit_code_of_a_rank_that_failed():
    """Gloo may abort in the interpreter's shutdown; the exit code and the last message are out before that."""
    program = (
        "import atexit, logging, os, sys\n"
        "import torch.distributed as dist\n"
        "from megatrain import cli\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "atexit.register(os.abort)\n"
        "sys.argv = ['megatrain', 'none_such']\n"
        "cli.command()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "unknown verb none_such" in done.stderr


def test_a_full_disk_is_a_machine_fault_and_a_missing_file_of_megatrain_a_defect(action, capsys, tmp_path):
    """Faults of the machine give one message and exit code 8; anything else keeps its stack trace."""

    def full(_config):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    action("report", full)
    assert cli.main(["report", str(tmp_path)]) == 8
    assert capsys.readouterr().err == "megatrain: error: somewhere: No space left on device\n"

    action("report", lambda _config: tmp_path.read_text())
    assert cli.main(["report", str(tmp_path)]) == 8
    assert capsys.readouterr().err == f"megatrain: error: {tmp_path}: Is a directory\n"

    def too_large(_config):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 8 TB")

    action("report", too_large)
    assert cli.main(["report", str(tmp_path)]) == 8
    shown = capsys.readouterr().err
    assert shown.startswith("megatrain: error: out of memory (RuntimeError: ") and len(shown.splitlines()) == 1

    def missing(_config):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "ours")

    action("report", missing)
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "Traceback" in capsys.readouterr().err


PRINTS = """
import os, sys, types
from megatrain import cli
verb, where, lines = sys.argv[1:]
stand_in = types.ModuleType("stand_in")
def act(config):
    print("began", file=sys.stderr)
    if where == "other":
        reader, writer = os.pipe()
        os.close(reader)
        os.write(writer, b"x")
    for _ in range(int(lines)):
        print("x" * 1000)
    open("done", "w").close()
stand_in.act = act
sys.modules["stand_in"] = stand_in
cli.ACTIONS[verb] = "stand_in:act"
sys.argv[1:] = [verb, "path=."]
cli.command()
"""


@pytest.mark.parametrize(
    ("verb", "where", "lines", "code", "finishes"),
    [
        ("inspect", "no reader", 1000, 0, False),
        ("inspect", "no reader", 1, 0, True),
        ("inspect", "full disk", 1000, 8, False),
        ("inspect", "full disk", 1, 8, True),
        ("inspect", "closed", 1000, 0, True),
        ("inspect", "other", 1, 1, False),
        ("report", "no reader", 1000, 0, True),
        ("report", "full disk", 1000, 0, True),
        ("report", "all broken", 1000, 0, True),
    ],
)
def test_broken_output_ends_only_verbs_that_do_nothing_but_print(verb, where, lines, code, finishes, tmp_path):
    """`| head` ends such a verb with 0, a full disk with 8. The others do their work."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    if where != "other":
        os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    out = full if where == "full disk" else writer
    command = [sys.executable, "-c", PRINTS, verb, where, str(lines)]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-' if where == "closed" else 'exec "$@"', "sh", *command],
        cwd=tmp_path,
        env=environ,
        stdout=out,
        stderr=out if where == "all broken" else subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    os.close(full)
    said = done.stderr or ""
    assert done.returncode == code, said
    assert (tmp_path / "done").exists() == finishes
    assert ("please report it" in said) == ("BrokenPipeError" in said) == (code == 1)
    assert ("standard output cannot be written (No space left on device)" in said) == (code == 8)
    if where == "other":
        os.close(reader)


PROJECT = (Path(__file__).parents[3] / "pyproject.toml").read_text()
TARGET = PROJECT.partition('[project.scripts]\nmegatrain = "')[2].partition('"')[0]
SCRIPT = f"from importlib.metadata import EntryPoint; EntryPoint('megatrain', '{TARGET}', 'console_scripts').load()()"
"""What the installed command does."""


@pytest.mark.parametrize("start", ["runpy.run_module('megatrain', run_name='__main__')", SCRIPT])
def test_ctrl_c_while_the_command_is_being_imported_ends_it_with_one_line(start):
    """The interrupt comes from the import of the first module that cli.py needs."""
    program = f"""
import importlib.util, runpy, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "megatrain.config":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
{start}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "megatrain: interrupted\n")
