"""A rank on a GPU runs on the cores of the GPU's NUMA node, as far as it may use them."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from megatrain.distributed import devices

GPU = torch.device("cuda", 1)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that sets the cores near the GPU and those the process may use; it returns those chosen."""

    def run(local_cpulist, allowed):
        (tmp_path / "0000:3b:00.0").mkdir(exist_ok=True)
        (tmp_path / "0000:3b:00.0" / "local_cpulist").write_text(local_cpulist)
        chosen = [set(allowed)]
        monkeypatch.setattr(devices, "PCI_DEVICES", tmp_path)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: chosen[-1])
        monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: chosen.append(cores))
        place = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: place)
        devices.stay_near(GPU)
        return chosen[-1]

    return run


@pytest.mark.parametrize(
    ("near", "allowed", "chosen"),
    [
        ("0-3,8-11\n", range(16), {0, 1, 2, 3, 8, 9, 10, 11}),
        ("4\n", range(16), {4}),
        ("0-3\n", {2, 3, 9}, {2, 3}),  # a batch system gave only some cores
        ("0-3\n", {9}, {9}),  # none of them near: better far than nowhere
        ("\n", range(4), {0, 1, 2, 3}),  # a virtual machine without NUMA
    ],
)
def test_a_rank_keeps_the_cores_near_its_gpu_that_it_may_use(machine, near, allowed, chosen):
    assert machine(near, allowed) == chosen


def test_a_system_that_does_not_tell_changes_nothing(machine, monkeypatch):
    assert devices.near_cores("0000:ff:00.0") == set()
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: pytest.fail("bound"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="old torch"))
    devices.stay_near(GPU)
    devices.stay_near(torch.device("cpu"))
