"""The process behind `megatrain.train`: none is left behind, and its output is read in a process with many files."""

from __future__ import annotations

import fcntl
import resource
import subprocess
import sys

import pytest

from megatrain.api import start_run
from megatrain.errors import ConfigError


def script(source):
    return [sys.executable, "-c", source]


def test_an_error_while_printing_ends_the_command(tmp_path, monkeypatch):
    """As when the front end of a notebook is gone: it is asked to save and end, and waited for."""

    def fail(*_):
        raise RuntimeError("no front end")

    monkeypatch.setattr(start_run, "show", fail)
    source = f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(tmp_path)!r}, "saved").touch(), sys.exit(75)))
print("started", flush=True)
time.sleep(60)
"""
    with pytest.raises(RuntimeError, match="no front end"):
        start_run._follow(script(source), quiet=False)
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("given", [None, 5, "train.steps=5"])
def test_what_is_no_list_of_overrides_is_refused(given):
    with pytest.raises(ConfigError, match="train takes a list of overrides"):
        start_run.train(given)


def test_a_process_with_many_open_files_can_train(monkeypatch):
    """File descriptors from 1,024 on, which select() refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("the limit of open files is below 2,048")
    popen = subprocess.Popen

    def start(*given, **options):
        process = popen(*given, **options)
        high = fcntl.fcntl(process.stdout.fileno(), fcntl.F_DUPFD_CLOEXEC, 1024)
        process.stdout = open(high, "rb", buffering=0)  # noqa: SIM115 (closed by the caller)
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    try:
        assert start_run._follow(script("print(1); print(2, end='')"), quiet=True) == (0, ["1", "2"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
