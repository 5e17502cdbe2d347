"""Shared by all tests: one thread a rank, the helpers in tests/support, and one small job to compare with."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parent))  # for tests/support

from torch import cuda

os.environ.setdefault("TRITON_INTERPRET", "0" if cuda.is_available() else "1")  # read when Triton is imported
for ignored in (signal.SIGINT, signal.SIGHUP):  # as in the background of a script or under nohup; children inherit it
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    """Mark the tests that pytest-xdist (--dist loadgroup) must keep in one process, and those only for `--all`.

    A parity test on more than two ranks combines what the layouts of two ranks show one by one, so the daily run leaves
    it out (marker `combination`).

    The tests on Slurm share a cluster; the unit tests of a file share its fixtures. The others share only a dataset and
    reference runs that are cheap to repeat, so any free process takes them.
    """
    items.sort(key=lambda item: item.path.name != "test_soak.py")  # the longest by far: others run beside it
    for item in items:
        parts = item.path.parts
        if "parity" in parts and hasattr(item, "callspec"):
            given = item.callspec.params
            if max(given.get("ranks", 1), given.get("world", 1)) > 2:
                item.add_marker(pytest.mark.combination)
        if "slurm" in parts:
            item.add_marker(pytest.mark.xdist_group("slurm"))
        elif "unit" in parts:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With MEGATRAIN_FORBID_SKIPS=1, as CI sets it, fail every test that would be skipped, unless a GPU is the reason.

    A skip would otherwise hide that a program or a library that the tests need is not installed.
    """
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("MEGATRAIN_FORBID_SKIPS") == "1":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if "GPU" not in reason:
            report.outcome = "failed"
            report.longrepr = f"MEGATRAIN_FORBID_SKIPS=1, but this test was skipped: {reason}"
    return report


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """Return a folder with a small prepared dataset, shared by all tests: each uses its own run names."""
    from support.commands import megatrain

    folder = tmp_path_factory.mktemp("work")
    (folder / "text").mkdir()
    for source in sorted(Path(os.__file__).parent.glob("*.py"))[:40]:
        (folder / "text" / f"{source.stem}.txt").write_bytes(source.read_bytes())
    done = megatrain(
        folder, "prepare", "data=files", "data.name=tiny", "data.paths=[text/*.txt]", "tokenizer.vocab_size=400"
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def undisturbed(workplace):
    """Return the metrics of an undisturbed run of two ranks under ZeRO-3. The run's name is `undisturbed`."""
    from support.commands import TRAIN, megatrain, metrics

    done = megatrain(workplace, *TRAIN, "run.name=undisturbed", "launch.nproc_per_node=2")
    assert done.returncode == 0, done.stderr
    return metrics(workplace, "undisturbed")


@pytest.fixture(scope="session")
def undisturbed_native(workplace):
    """Return the same on the native engine, which starts in half the time. The run's name is `undisturbed-native`."""
    from support.commands import TWO_NATIVE, megatrain, metrics

    done = megatrain(workplace, *TWO_NATIVE, "run.name=undisturbed-native")
    assert done.returncode == 0, done.stderr
    return metrics(workplace, "undisturbed-native")
