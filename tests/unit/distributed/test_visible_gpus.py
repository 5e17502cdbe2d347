"""Why a process sees no GPU, or too few: told from torch's build, the environment and the device files."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from megatrain.distributed import visible_gpus

CUDA = "__version__ = '2.9.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that sets torch's version file and the names in /dev; it returns the lowest limit."""

    def look(devices=(), build=CUDA, **environ):
        for name in devices:
            (tmp_path / name).touch()
        (tmp_path / "version.py").write_text(build)
        monkeypatch.setattr(visible_gpus, "DEVICES", tmp_path)
        monkeypatch.setattr(visible_gpus, "find_spec", lambda _: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
        monkeypatch.setattr(sys, "platform", "linux")
        return visible_gpus.limit(environ)

    return look


def test_a_torch_for_cpus_is_the_reason_even_where_there_are_gpus(machine):
    found = machine(["nvidia0"], CUDA.replace("'13.0'", "None").replace("cu130", "cpu"))
    assert found.most == 0 and "torch 2.9.0+cpu is built for CPUs only" in found.reason
    assert machine(["nvidia0"], "cuda: Optional[str] = None\nhip: Optional[str] = '7.0'\n").most == 1


def test_a_machine_without_device_files_has_no_driver(machine):
    found = machine(["nvidiactl"])
    assert found.most == 0 and "no /dev/nvidia*" in found.reason and "--gpus-per-node" in found.remedy
    assert machine(["dxg"]) is None, "Windows' driver shows no device file for each GPU"


@pytest.mark.parametrize(
    ("value", "most", "shown"),
    [
        ("", 0, "empty"),
        ("-1", 0, "CUDA_VISIBLE_DEVICES=-1 shows none"),
        ("NoDevFiles", 0, "shows none"),  # what Slurm sets in a job without GPUs
        ("0", 1, "CUDA_VISIBLE_DEVICES=0 shows 1"),
        ("0,-1,1", 1, "shows 1"),  # CUDA stops at the first that is none
        ("GPU-5a,GPU-7", 2, "shows 2"),
        ("GPU-5a,MIG-7", 1, "shows 1"),  # only names of the first one's kind count
        ("0,0,1", 0, "names 0 twice"),  # and then CUDA shows none
        ("1, 01", 0, "names 1 twice"),
        ("GPU-5a,GPU-5a", 0, "names GPU-5a twice"),
        ("2ampere,0", 2, "shows 2"),
    ],
)
def test_the_environment_may_hide_gpus(machine, value, most, shown):
    found = machine(["nvidia0", "nvidia1", "nvidia2"], CUDA_VISIBLE_DEVICES=value)
    assert found.most == most and shown in found.reason and "CUDA_VISIBLE_DEVICES" in found.remedy


@pytest.mark.parametrize(
    "value", ["0,0,1", "1, 01", "+1,2", "3x,4", "GPU-5a,MIG-7", "GPU-5a, GPU-6", "-1,0", "0,,1", "x"]
)
def test_torch_counts_as_many(machine, monkeypatch, value):
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    names = [f"nvidia{number}" for number in range(9)]
    assert machine(names, CUDA_VISIBLE_DEVICES=value).most == len(torch.cuda._parse_visible_devices())


def test_without_another_limit_the_device_files_count(machine):
    found = machine(["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"])
    assert found.most == 2 and "/dev/nvidia*" in found.reason
