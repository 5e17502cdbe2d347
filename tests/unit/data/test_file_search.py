"""Which files a folder or a glob names: those that Python's glob finds, but each linked folder is searched once."""

import glob
import os
import random
from pathlib import Path

import pytest

from megatrain.data.corpus.file_search import expand, find_paths


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Make folders and files of random names, some hidden, and work in the folder above."""
    chosen = random.Random(5)
    folders = [tmp_path / "c"]
    for _ in range(14):
        folders.append(chosen.choice(folders) / chosen.choice(["a", "b", "v[1]", ".hidden", "x.y"]))
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for name in chosen.sample(["1.txt", "2.jsonl", "z[0].txt", ".h.txt", "no suffix"], 3):
            (folder / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "c"


PATTERNS = [
    "c/*",
    "c/**",
    "c/**/*",
    "c/**/*.txt",
    "**/*.jsonl",
    "c/*/**/*.txt",
    "c/**/a/*",
    "c/**/[ab]/**/?.*",
    "*/*.txt",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_glob_finds_what_pythons_finds(tree, pattern):
    for prefix in ("", f"{glob.escape(str(tree.parent))}/"):
        theirs = {Path(name) for name in glob.glob(prefix + pattern, recursive=True) if os.path.isfile(name)}
        ours = [Path(name) for name in expand(prefix + pattern) if os.path.isfile(name)]
        assert len(ours) == len(set(ours)) and set(ours) == theirs != set()


def found(*paths):
    files, _ = find_paths([str(path) for path in paths], lambda path: path.suffix == ".txt", ".txt")
    return [path.as_posix() for path in files]


@pytest.mark.parametrize("given", ["c", "c/**/*.txt"])
def test_links_that_lead_back_are_followed_once(tmp_path, monkeypatch, given):
    """Each level would double the number of paths."""
    monkeypatch.chdir(tmp_path)
    for name in ("s1", "s2", "s3"):
        (tmp_path / "c" / name).mkdir(parents=True)
        (tmp_path / "c" / name / f"{name}.txt").touch()
        (tmp_path / "c" / name / "up").symlink_to("..")
    (tmp_path / "c" / "a.txt").touch()
    (tmp_path / "c" / "again").symlink_to("s1")  # a folder that is read at its own place
    (tmp_path / "else" / "deep").mkdir(parents=True)
    (tmp_path / "else" / "b.txt").touch()
    (tmp_path / "else" / "deep" / "back").symlink_to(tmp_path / "else")
    (tmp_path / "c" / "linked").symlink_to(tmp_path / "else")
    (tmp_path / "c" / "twice").symlink_to(tmp_path / "else")
    (tmp_path / "c" / "itself").symlink_to("itself")
    (tmp_path / "c" / ".store" / "v1").mkdir(parents=True)
    (tmp_path / "c" / ".store" / "v1" / "h.txt").touch()
    (tmp_path / "c" / "current").symlink_to(".store/v1")  # a folder that would not be searched at its own place
    assert found(given) == ["c/a.txt", "c/current/h.txt", "c/linked/b.txt", "c/s1/s1.txt", "c/s2/s2.txt", "c/s3/s3.txt"]


def test_a_file_with_several_names_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("c/z.txt", "c/y.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name)
    Path("c/a.txt").symlink_to("z.txt")
    Path("c/elsewhere.txt").symlink_to("../o.txt")
    Path("o.txt").write_text("o")
    assert found("c") == ["c/elsewhere.txt", "c/y.txt", "c/z.txt"]
    for other in ("c/../c/z.txt", str(tmp_path / "c" / "z.txt"), "c/a.txt"):
        assert len(found("c/z.txt", other)) == 1
