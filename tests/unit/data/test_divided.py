"""A preparation whose stages are shared by tasks gives the bytes of a plain one, whatever is killed meanwhile."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest

from megatrain.config import DataConfig, PrepareConfig, PrepareLaunchConfig, TokenizerConfig
from megatrain.config.clean_config import CleanConfig
from megatrain.data.corpus import pipeline
from megatrain.data.corpus.cleaning import clean_chunk
from megatrain.data.corpus.encoding import encode_chunk
from megatrain.data.corpus.text_files import write_text
from megatrain.data.preparation import prepare
from megatrain.errors import ConfigError, DataError, OwnedError

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "rain", "falls", "on", "stones"]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Cut corpora into shards of about 4,000 bytes."""
    for module in ("shard", "files_source"):
        monkeypatch.setattr(f"megatrain.data.corpus.{module}.SHARD_BYTES", 4000)


@pytest.fixture
def corpus(tmp_path):
    """Write lines and small files, with equal and nearly equal documents and a bad record among them."""
    folder, draws = tmp_path / "in", random.Random(0)
    folder.mkdir()
    texts = [" ".join(draws.choices(WORDS, k=40)) for _ in range(300)]
    texts += texts[10:30] + [text + " again" for text in texts[50:70]]
    draws.shuffle(texts)
    lines = [json.dumps({"text": text}) for text in texts[:250]]
    (folder / "a.jsonl").write_text("\n".join([*lines, "{"]) + "\n")
    for number, text in enumerate(texts[250:]):
        (folder / f"b{number:03}.txt").write_text(text)
    return folder


def config(folder, stage="all", task=None, tasks=1, out="out", **data):
    given = DataConfig(
        name="d", dir=str(folder.parent / out), kind="files", paths=[str(folder)], workers=1, on_bad_record="quarantine"
    )
    given.write_text = True
    clean = CleanConfig(dedup="minhash", steps=["unicode", {"length": {"min_characters": 200}}])
    launch = PrepareLaunchConfig(stage=stage, task=task, tasks=tasks)
    return PrepareConfig(1, replace(given, **data), TokenizerConfig(vocab_size=300), clean, launch)


def files_of(folder):
    """Return the content of each file of a dataset; the card without its folder's name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def divided(corpus, tasks, **also):
    """Do every stage of a preparation, each task once, in an order of no particular kind."""
    order = list(range(tasks))
    random.Random(tasks).shuffle(order)
    for stage in ("clean", "select", "encode", "publish"):
        for task in order if stage in ("clean", "encode") else [None]:
            share = {"task": task, "tasks": tasks} if task is not None else {}
            folder = prepare(config(corpus, stage, **share, **also))
    return folder


@pytest.mark.parametrize("tasks", [1, 3, 25])
def test_any_number_of_tasks_gives_the_bytes_of_a_plain_preparation(corpus, tasks):
    plain = files_of(prepare(config(corpus, out="plain")))
    found = files_of(divided(corpus, tasks))
    assert {
        "card.json",
        "quarantine.jsonl",
        "examples.jsonl",
        "train.bin",
        "heldout.idx",
        "text/00000.jsonl.zst",
    } <= set(plain)
    counts = json.loads(plain["card.json"])["counts"]
    assert min(counts[name] for name in ("duplicates", "near_duplicates", "cleaned_away", "bad")) > 0, counts
    assert found == plain
    assert sorted(os.listdir(corpus.parent / "out")) == ["d"]


def test_the_work_is_divided_and_nothing_is_done_twice(corpus, monkeypatch):
    by_task = Counter()
    task = None
    monkeypatch.setattr(pipeline, "clean_chunk", lambda given: by_task.update([("clean", task)]) or clean_chunk(given))
    monkeypatch.setattr(
        pipeline, "encode_chunk", lambda given: by_task.update([("encode", task)]) or encode_chunk(given)
    )
    monkeypatch.setattr(pipeline, "write_text", lambda given: by_task.update([("text", task)]) or write_text(given))
    prepare(config(corpus, out="plain"))
    whole = dict(by_task)
    by_task.clear()
    for stage in ("clean", "select", "encode", "publish"):
        for task in range(4) if stage in ("clean", "encode") else [None]:
            prepare(config(corpus, stage, **({"task": task, "tasks": 4} if task is not None else {})))
    assert set(by_task) == {(stage, task) for stage in ("clean", "encode", "text") for task in range(4)}
    for stage in ("clean", "encode", "text"):
        shares = [by_task[stage, task] for task in range(4)]
        assert sum(shares) == whole[stage, None] and max(shares) <= 2 + min(shares), shares


KILLED = """
import json, sys
from megatrain.config import *
from megatrain.config.clean_config import CleanConfig
from megatrain.data.corpus import files_source, pipeline, shard
from megatrain.data.preparation import prepare
shard.SHARD_BYTES = files_source.SHARD_BYTES = 4000
pipeline.CHUNK_RECORDS = 5
if __name__ == "__main__":
    seed, data, tokenizer, clean, launch = json.loads(sys.argv[1])
    print("started", flush=True)
    prepare(PrepareConfig(
        seed, DataConfig(**data), TokenizerConfig(**tokenizer),
        CleanConfig(dedup="minhash", steps=clean), PrepareLaunchConfig(**launch),
    ))
"""


class Tasks:
    """Tasks of one stage, run as processes at once."""

    def __init__(self, folder):
        self.script = folder / "task.py"
        self.script.write_text(KILLED)

    def start(self, given):
        words = [given.seed, vars(given.data), vars(given.tokenizer), given.clean.steps, vars(given.launch)]
        process = subprocess.Popen(
            [sys.executable, str(self.script), json.dumps(words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        return process


def test_tasks_killed_at_random_moments_are_redone_alone(corpus, tmp_path):
    """Every stage's tasks run at once; some are killed, then started again; two of the same task may run at once."""
    plain = files_of(prepare(config(corpus, out="plain")))
    tasks, moments = Tasks(tmp_path), random.Random(0)
    kills = 0
    for stage in ("clean", "select", "encode", "publish"):
        count = 3 if stage in ("clean", "encode") else 1
        given = [
            config(corpus, stage, **({"task": task, "tasks": count} if count > 1 else {})) for task in range(count)
        ]
        lives = 0.1
        while given:
            twice = given[:1] if count > 1 else []  # as when Slurm starts a task whose lost node still runs
            running = [(one, tasks.start(one)) for one in [*given, *twice]]
            for _, process in running:
                process.stdout.readline()
            for _, process in running:
                if moments.random() < 0.7:
                    time.sleep(moments.random() * lives)
                    process.send_signal(signal.SIGKILL)
            codes = [(one, process.wait(), process.stderr.read()) for one, process in running]
            assert all(code in (0, -signal.SIGKILL) for _, code, _ in codes), [said for *_, said in codes]
            kills += sum(code != 0 for _, code, _ in codes)
            given = [one for one in given if not any(one is other and code == 0 for other, code, _ in codes)]
            lives *= 3
    assert kills >= 2, kills
    assert files_of(corpus.parent / "out" / "d") == plain
    assert sorted(os.listdir(corpus.parent / "out")) == ["d"]


def test_an_encoding_task_before_the_selection_is_refused_with_what_to_do_first(corpus):
    with pytest.raises(ConfigError, match=r"no selection of these settings.*launch.stage=select first"):
        prepare(config(corpus, "encode"))
    prepare(config(corpus, "select"))
    with pytest.raises(ConfigError, match="no selection of these settings"):
        prepare(config(corpus, "encode", heldout_fraction=0.5))
    (corpus / "new.txt").write_text("a file that came later")
    with pytest.raises(ConfigError, match=r"no selection of these settings and files"):
        prepare(config(corpus, "encode"))


def test_a_shard_damaged_between_the_stages_is_refused_by_name_and_cleaned_again(corpus):
    prepare(config(corpus, "select"))
    first = min((corpus.parent / "out" / ".d.preparing" / "work" / "cleaned").glob("*.text"))
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    with pytest.raises(DataError, match=rf"{first.name}: damaged"):
        prepare(config(corpus, "encode"))
    plain = files_of(prepare(config(corpus, out="plain")))
    assert files_of(divided(corpus, 2)) == plain


def test_stages_that_were_left_out_are_done_by_the_last(corpus):
    plain = files_of(prepare(config(corpus, out="plain")))
    prepare(config(corpus, "clean", task=1, tasks=3))
    assert files_of(prepare(config(corpus, "publish"))) == plain
    (corpus.parent / "out" / "d" / "card.json").touch()
    assert prepare(config(corpus, "clean", task=0, tasks=3)) == corpus.parent / "out" / "d", "done already"


def test_a_selection_of_other_settings_or_files_is_not_taken(corpus):
    prepare(config(corpus, "select"))
    (corpus / "new.txt").write_text(" ".join(WORDS * 20))
    plain = files_of(prepare(config(corpus, out="plain", heldout_fraction=0.5)))
    assert files_of(prepare(config(corpus, "publish", heldout_fraction=0.5))) == plain


def test_a_task_whose_files_a_later_stage_removes_says_so(corpus, monkeypatch):
    calls = []

    def overtaken(given):
        calls.append(given)
        if len(calls) == 2:  # in the middle of a shard
            monkeypatch.setattr(pipeline, "clean_chunk", clean_chunk)
            prepare(config(corpus, "select"))
        return clean_chunk(given)

    monkeypatch.setattr(pipeline, "CHUNK_RECORDS", 5)
    monkeypatch.setattr(pipeline, "clean_chunk", overtaken)
    with pytest.raises(OwnedError, match=r"launch.stage=clean launch.task=0: files .* were removed, as a later stage"):
        prepare(config(corpus, "clean", task=0, tasks=2))
    monkeypatch.setattr(pipeline, "CHUNK_RECORDS", 2048)
    plain = files_of(prepare(config(corpus, out="plain")))
    assert files_of(prepare(config(corpus, "publish"))) == plain


def test_a_task_whose_folder_is_finished_by_another_process_says_so(corpus, monkeypatch):
    def finished(given):
        monkeypatch.setattr(pipeline, "clean_chunk", clean_chunk)
        prepare(config(corpus))
        return clean_chunk(given)

    monkeypatch.setattr(pipeline, "clean_chunk", finished)
    with pytest.raises(OwnedError, match=r"work is gone: the dataset was finished"):
        prepare(config(corpus, "clean", task=1, tasks=3))
    assert (corpus.parent / "out" / "d" / "card.json").is_file()
