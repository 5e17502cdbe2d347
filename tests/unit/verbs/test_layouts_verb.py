"""`megatrain layouts`: the list is legal and complete, its numbers add up, and torch is not imported."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from copy import deepcopy

import pytest

from megatrain import cli
from megatrain.config.compose import compose
from megatrain.parallel.rules import check
from megatrain.planner.candidates import Candidate
from megatrain.verbs.layouts import fill_open_sizes, find_legal, open_axes, table_lines

LLAMA = ["layouts", "model=llama_8b", "precision=bf16", "launch.world_size=64"]


def records(capsys, *arguments):
    assert cli.main([*LLAMA, "layouts.format=json", "layouts.limit=0", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def is_full(row):
    """Return whether a layout takes more than 85% of what may be used of 40 GiB."""
    return row["total_bytes"] > 0.85 * 0.9 * 40 * 2**30


def test_every_row_is_legal_and_kinds_add_up(capsys):
    """The columns are keys of train, and the table of layouts accepts each row."""
    config = compose("layouts", LLAMA[1:])
    job, _ = fill_open_sizes(config, 64)
    rows = records(capsys, "parallel.zero=3")
    assert len(rows) > 500 and len({tuple(sorted(row.items())) for row in rows}) == len(rows)
    for row in rows[::20]:
        changed = deepcopy(job)
        names = [field.replace("engines", "engine") for field in Candidate._fields]
        values = [row.get(name, row.get(f"parallel.{name}", row.get(f"train.{name}"))) for name in names]
        Candidate(*values).apply(changed)
        check(changed, 64)
        kinds = ("parameters", "gradients", "optimizer", "activations", "working")
        assert sum(row[f"{kind}_bytes"] for kind in kinds) == row["total_bytes"]


def test_a_given_key_is_fixed_and_others_vary(capsys):
    rows = records(capsys, "engine=native", "parallel.tp=4", "parallel.schedule=1f1b", "train.recompute=full")
    assert {(row["engine"], row["parallel.tp"], row["train.recompute"]) for row in rows} == {("native", 4, "full")}
    assert {row["parallel.pp"] for row in rows} > {1, 2, 4} and {row["parallel.zero"] for row in rows} == {0, 1, 2, 3}
    assert {row["parallel.schedule"] for row in rows} == {"1f1b"}


def test_layouts_that_fit_come_first_ordered_by_communication(capsys):
    rows = records(capsys, "layouts.memory_gib=40")
    fits = [row["fits"] for row in rows]
    assert fits == sorted(fits, reverse=True) and True in fits and False in fits
    full = [is_full(row) for row in rows if row["fits"]]
    assert full == sorted(full) and len(set(full)) == 2, "a nearly full device comes after those with room"
    for wanted in (False, True):
        fitting = [row for row in rows if row["fits"] and is_full(row) == wanted]
        degrees = [row["parallel.tp"] * row["parallel.pp"] * row["parallel.cp"] for row in fitting]
        assert degrees == sorted(degrees)


def test_the_table_names_its_job(capsys):
    assert cli.main([*LLAMA, "layouts.limit=3"]) == 0
    shown = capsys.readouterr().out
    assert "llama_8b: 8,030,261,248 parameters, bf16 on fp32 masters, 64 ranks" in shown
    assert cli.main(["layouts", "model=tiny", "layouts.limit=1"]) == 0
    assert "parameters, fp32, 1 rank\n" in capsys.readouterr().out
    assert "1,048,576 tokens a step" in shown and "layouts.limit=0 shows them" in shown and "\033" not in shown
    table = shown.split("\n\n")[1].splitlines()
    assert len(table) == 4 and table[0].split()[:3] == ["engine", "dp", "tp"]


@pytest.mark.parametrize(
    ("memory", "order"),
    [
        ("null", "best guess first: the smallest tp x pp x cp, then the least recompute, the lowest ZeRO stage, the"),
        ("100000", "the least memory (why: --help)"),
        ("40", "the least memory; nearly full ones after those; those that do not fit last, by memory (why: --help)"),
        ("0.1", "none fits, so the least memory comes first (why: --help)"),
    ],
)
def test_the_table_says_what_its_order_is_by(memory, order, capsys):
    assert cli.main([*LLAMA, "layouts.limit=1", f"layouts.memory_gib={memory}", "engine=native"]) == 0
    assert order in capsys.readouterr().out.split("\n\n")[0]


def test_the_order_of_the_list_is_the_one_that_help_explains(capsys):
    assert cli.main(["layouts", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    keys = [
        "nearly full ones",
        "tp x pp x cp, smallest first",
        "by recompute, none first",
        "by ZeRO stage, lowest first",
        "by memory, least",
    ]
    places = [said.index(key) for key in keys]
    assert places == sorted(places)
    rows = records(capsys, "engine=native", "layouts.memory_gib=40")
    fitting = [row for row in rows if row["fits"]]
    by_help = [
        (
            is_full(row),
            row["parallel.tp"] * row["parallel.pp"] * row["parallel.cp"],
            ["none", "selective", "full"].index(row["train.recompute"]),
            row["parallel.zero"],
            row["total_bytes"],
        )
        for row in fitting
    ]
    assert by_help == sorted(by_help) and len(fitting) < len(rows)
    others = [row["total_bytes"] for row in rows if not row["fits"]]
    assert others == sorted(others)


def test_csv_has_the_same_rows(capsys):
    assert cli.main([*LLAMA, "layouts.format=csv", "layouts.limit=5"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    every = [{key: str(value) for key, value in row.items()} for row in records(capsys)]
    assert len(rows) == 5 and all(row in every for row in rows)


def test_a_short_list_has_the_first_of_each_engine_and_degrees(capsys):
    """It has the order of the long list."""
    every = records(capsys)
    rows = records(capsys, "layouts.limit=12")
    assert [every.index(row) for row in rows] == sorted(every.index(row) for row in rows)
    keys = [tuple(row[key] for key in ("engine", "parallel.tp", "parallel.pp", "parallel.cp")) for row in rows]
    assert len(set(keys)) == len(rows) == 12


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["parallel.tp=3"], ["64 ranks are not divisible by parallel.tp=3", "without parallel.tp=3"]),
        (["engine=deepspeed", "parallel.pp=2"], ["engine=native", "without parallel.pp=2", "without engine.name"]),
        (
            ["train.global_batch_size=7", "parallel.tp=1", "parallel.pp=1", "parallel.cp=1"],
            ["train.global_batch_size=7", "without train.global_batch_size=7"],
        ),
        (["parallel.tp=16"], ["model.num_kv_heads=8 is not divisible by parallel.tp=16; give parallel.tp=8"]),
        (["train.seq_len=100000"], ["is longer than model.max_seq_len"]),
    ],
)
def test_if_nothing_is_legal_a_remedy_is_named(keys, says, capsys):
    assert cli.main([*LLAMA, *keys]) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in says), error


def test_a_train_command_needs_only_another_verb():
    """Groups, experiments and keys of train are accepted, and no dataset is needed."""
    config = compose("layouts", ["experiment=quickstart", "launch.nproc_per_node=2", "optim.lr=1e-3", "data=files"])
    job, notes = fill_open_sizes(config, 2)
    assert job.train.global_batch_size == 16 and job.model.hidden_size == 96
    assert len(notes) == 1 and "tokenizer.vocab_size" in notes[0]
    rows, _ = find_legal(job, 2, open_axes(config))
    assert {row.candidate.engine for row in rows} == {"native", "deepspeed"}


def test_no_torch_is_imported():
    code = f"import sys; from megatrain import cli; cli.main({LLAMA!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_the_words_for_the_first_layout_are_those_that_the_command_lacks(capsys):
    """With them, `megatrain train` runs the first line of the table. Given keys and defaults are not repeated."""
    given = ["parallel.pp=2", "parallel.cp=2", "train.seq_len=4096", "train.global_batch_size=64"]
    assert cli.main([*LLAMA, *given, "layouts.limit=3"]) == 0
    shown = capsys.readouterr().out
    advice = shown.split("with the same keys on 64 ranks and add:\n")[1].splitlines()
    keys = {word.partition("=")[0] for word in advice[0].split()}
    assert keys and keys <= {"engine", "parallel.tp", "parallel.zero", "parallel.schedule", "train.recompute"}
    assert "parallel.cp" not in keys and "parallel.dp_replicate" not in keys, "given, and without effect"
    assert advice[1].startswith("assumed sizes: train.micro_batch_size=1; ")
    config = compose("train", [*LLAMA[1:3], *given, "train.micro_batch_size=1", *advice[0].split()])
    check(config, 64)
    first = shown.split("\n\n")[1].splitlines()[1].split()
    assert first[0] == config.engine.name and int(first[2]) == config.parallel.tp
    assert first[6:8] == [str(config.parallel.zero), config.parallel.schedule]


def test_nothing_is_advised_where_nothing_is_to_be_changed(capsys):
    sizes = ["train.seq_len=256", "train.micro_batch_size=4", "train.global_batch_size=8"]
    words = ["layouts", "model=tiny", "launch.nproc_per_node=2", *sizes, "parallel.zero=3", "engine=deepspeed"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.endswith("the first layout is what `megatrain train` takes with the same keys\n")


def test_a_margin_of_memory_stays_free(capsys):
    """A layout that fills a device to the last byte does not fit: allocator and libraries need memory too."""
    rows = records(capsys, "layouts.memory_gib=40")
    most = max(row["total_bytes"] for row in rows if row["fits"])
    assert most <= 36 * 2**30 < min(row["total_bytes"] for row in rows if not row["fits"])
    without = records(capsys, "layouts.memory_gib=40", "layouts.margin=0")
    assert sum(row["fits"] for row in without) > sum(row["fits"] for row in rows)
    assert cli.main([*LLAMA, "layouts.memory_gib=1", "layouts.limit=2"]) == 0
    assert "none fits" in capsys.readouterr().out


def test_the_vocabulary_is_that_of_the_prepared_dataset(dataset):
    words = ["model=tiny", f"data.dir={dataset.parent}"]
    job, notes = fill_open_sizes(compose("layouts", [*words, f"data.name={dataset.name}"]), 2)
    assert job.model.vocab_size == 400 and f"a vocabulary of 400 ({dataset})" in notes
    job, _ = fill_open_sizes(compose("layouts", [*words, "data.name=not_prepared"]), 2)
    assert job.model.vocab_size == 8192


def test_the_table_fits_the_window_and_says_what_it_leaves_out():
    def line(recompute, total):
        return [
            "native",
            "8",
            "1",
            "1",
            "1",
            "0",
            "interleaved_zero_bubble x 2",
            recompute,
            *["10.00"] * 5,
            total,
            "yes",
        ]

    lines = [line("none", "50.00"), line("none", "60.00")]
    whole = table_lines(lines, None)
    assert len(whole) == 3 and table_lines(lines, len(whole[0])) == whole
    some = table_lines(lines, len(whole[0]) - 1)
    assert "recompute" not in some[0] and "total" in some[0] and "50.00" in some[1] and len(some) == 5
    assert some[-1].startswith("left out, to fit the window: dp (8 in all), ") and "recompute (none in all)" in some[-1]
    assert "activations" in table_lines([*lines, ["deepspeed", *lines[0][1:8], *["1.00"] * 5, "1.00", "no"]], 110)[0]
    differing = [
        ["native", *"81110", "", recompute, *sizes, "9", "yes"]
        for recompute, sizes in zip(["none", "full"], ["12345", "23456"], strict=True)
    ]
    narrow = table_lines(differing, 40)
    assert "recompute" in narrow[0] and "working" not in narrow[0] and "working" in narrow[-1]
