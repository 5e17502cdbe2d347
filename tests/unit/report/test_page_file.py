"""Where a report page is written: a new file, an earlier page, a device, a FIFO or standard output; never over a file
that is something else."""

import os
import threading

import pytest

from megatrain import cli
from megatrain.report.run_page import report
from megatrain.tracking.metrics import MetricsLog


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run:\n  name: a\n")
    MetricsLog(folder / "metrics.jsonl").append({"step": 1, "loss": 2.0})
    return folder


def is_page(text):
    return text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "own.html"])
def test_a_file_that_is_no_report_page_is_left_as_it_is(run_dir, name, capsys):
    (run_dir / "own.html").write_text("<!doctype html>\n<title>mine</title>\n")
    before = (run_dir / name).read_bytes()
    assert cli.main(["report", str(run_dir), f"out={run_dir / name}"]) == 2
    assert f"{name} exists and is not a report page of megatrain" in capsys.readouterr().err
    assert (run_dir / name).read_bytes() == before


def test_an_earlier_page_and_an_empty_file_are_replaced(run_dir, tmp_path):
    page = tmp_path / "page.html"
    page.touch()
    for count in (1, 2):
        assert cli.main(["report", str(run_dir), f"out={page}"]) == 0
        assert is_page(page.read_text()), count
    page.write_text("<!doctype html>\n<html><head>\n<title>older \N{MIDDLE DOT} megatrain</title><style>")
    assert report(run_dir, page) == page and is_page(page.read_text())


@pytest.mark.parametrize("exists", [True, False])
def test_the_target_of_a_link_is_written_and_the_link_stays(run_dir, tmp_path, exists):
    link, target = tmp_path / "link.html", tmp_path / "target.html"
    link.symlink_to(target)
    if exists:
        target.touch()
    assert cli.main(["report", str(run_dir), f"out={link}"]) == 0
    assert link.is_symlink() and is_page(target.read_text())


def test_a_link_to_another_file_is_refused(run_dir, tmp_path):
    (tmp_path / "link").symlink_to(run_dir / "metrics.jsonl")
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert cli.main(["report", str(run_dir), f"out={tmp_path / 'link'}"]) == 2
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_a_fifo_is_written_to(run_dir, tmp_path):
    fifo, read = tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: read.append(fifo.read_text()), daemon=True)
    reader.start()
    assert cli.main(["report", str(run_dir), f"out={fifo}"]) == 0
    reader.join(20)
    assert is_page(read[0]) and fifo.is_fifo()


def test_standard_output_gets_the_page_and_nothing_else(run_dir, tmp_path, capfd):
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")  # what /dev/stdout is
    assert cli.main(["report", str(run_dir), f"out={tmp_path / 'stdout'}"]) == 0
    assert is_page(capfd.readouterr().out)


def test_a_device_that_is_full_is_named(run_dir, tmp_path, capsys):
    (tmp_path / "full").symlink_to("/dev/full")  # a mend that fails must not replace the machine's device
    assert cli.main(["report", str(run_dir), f"out={tmp_path / 'full'}"]) == 8
    assert f"out: {tmp_path / 'full'} cannot be written (No space left on device)" in capsys.readouterr().err
    assert (tmp_path / "full").is_symlink()
