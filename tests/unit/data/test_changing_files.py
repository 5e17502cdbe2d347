"""A file that changes, grows or vanishes while a corpus is prepared is refused by name."""

import errno
import json
import subprocess
import sys

import pytest

from megatrain.config import DataConfig
from megatrain.data.corpus.sources import open_source
from megatrain.errors import DataError, disk_fault

LINES = [json.dumps({"text": f"line {number}"}) + "\n" for number in range(4)]


def records(folder):
    source = open_source(DataConfig(name="d", kind="files", paths=[str(folder)]))
    return source, source.records()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.txt"):
        (tmp_path / "in" / name).write_text("".join(LINES))
    return tmp_path / "in"


@pytest.mark.parametrize("content", ["".join(LINES * 2), LINES[0], ""])
@pytest.mark.parametrize("name", ["b.jsonl", "c.txt"])
def test_another_content_than_was_listed(folder, name, content):
    _, read = records(folder)
    next(read)
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name}: changed since the files were listed; prepare again when"):
        list(read)


def test_a_file_that_grows_while_it_is_read_is_not_followed(folder):
    source, read = records(folder)
    seen = []
    with pytest.raises(DataError, match=r"a.jsonl: changed since"), open(folder / "a.jsonl", "a") as writer:
        for record in read:
            seen.append(record)
            writer.writelines(LINES)
            writer.flush()
            assert len(seen) < 20
    assert source.progress.bytes < 3 * len("".join(LINES))


@pytest.mark.parametrize("when", ["listed", "cut"])
def test_a_file_that_is_gone(folder, when):
    _, read = records(folder)
    if when == "cut":
        next(read)
    (folder / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"b.jsonl: found when the files were listed, but now: No such file"):
        list(read)


def prepared_under(limit, folder, *words):
    """Prepare under a limit of the shell: -f is the size of files in KiB, -n their number."""
    given = f"data=files data.paths=[{folder}] data.dir={folder.parent}/out data.name=d data.workers=1"
    command = f"ulimit {limit}; exec {sys.executable} -m megatrain prepare {given} tokenizer.vocab_size=300 "
    return subprocess.run(["bash", "-c", command + " ".join(words)], capture_output=True, text=True)


@pytest.mark.parametrize("limit", ["-f 200", "-f 1200"])
def test_a_limit_on_the_size_of_files_is_named_and_nothing_looks_whole(folder, limit):
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} {i**400}"}) + "\n" for i in range(6000)))
    done = prepared_under(limit, folder)
    assert done.returncode == 8 and "File too large" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (folder.parent / "out" / "d").exists()


def test_few_files_are_open_at_a_time_however_many_bands_there_are(folder):
    done = prepared_under("-n 30", folder, "clean.dedup=minhash clean.minhash.bands=200 clean.minhash.rows=1")
    assert done.returncode == 0, done.stderr


def test_too_many_open_files_are_a_fault_of_the_machine():
    error = disk_fault(OSError(errno.EMFILE, "Too many open files", "a.bin"))
    assert error is not None and str(error) == "a.bin: Too many open files; raise the limit, see ulimit -n"
