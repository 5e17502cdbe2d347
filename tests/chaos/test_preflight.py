"""A fault that one rank or node finds before training ends the job everywhere and names the host, rank and cause."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from support.commands import TRAIN, events, megatrain
from support.ranks import run_ranks

from megatrain.config import TrainConfig
from megatrain.errors import EnvironmentFault
from megatrain.training import preflight as module
from megatrain.training.preflight import preflight

HERE = socket.gethostname()
ELEMENTS = module.ELEMENTS


def small(**checkpoint):
    config = TrainConfig()
    config.model = replace(config.model, num_layers=2, hidden_size=32, num_heads=2, vocab_size=400)
    config.tracking.name = "none"
    for name, value in checkpoint.items():
        setattr(config.checkpoint, name, value)
    return config


def look(world, folder, fault=None):
    """Return the message that a rank gets; `fault` breaks something on rank 1."""
    if fault is not None and world.rank == 1:
        fault(world)
    folder.mkdir(exist_ok=True)
    world.local_size = world.size
    try:
        return preflight(small(), folder, world)
    except EnvironmentFault as error:
        return str(error)


def other_torch(world):
    torch.__version__ = "2.0.0"


def device_cannot_add(world):
    ones = module._ones
    module._ones = lambda world: ones(world).index_fill(0, torch.tensor([5]), 3.0)


def network_flips_a_value(world):
    true = type(world).all_reduce_sum

    def wrong(self, values):
        true(self, values)
        values[77] += 1
        return values

    type(world).all_reduce_sum = wrong


FAULTS = {
    other_torch: f"{HERE}, rank 1: torch 2.0.0, but {torch.__version__} on rank 0",
    device_cannot_add: f"{HERE}, rank 1: cpu adds {ELEMENTS} ones to {ELEMENTS + 2}: a broken device",
    network_flips_a_value: f"{HERE}, rank 1: 1 of {ELEMENTS} sums of an all-reduce are wrong",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_one_rank_is_reported_on_all(tmp_path, fault):
    messages = run_ranks(look, 3, tmp_path, fault)
    assert messages == [f"preflight: {FAULTS[fault]} (launch.preflight=false skips this)"] * 3


def test_preflight_measures_devices_disks_and_the_network(tmp_path):
    started = time.perf_counter()
    found = run_ranks(look, 2, tmp_path)[0]
    assert 0 < found["all_reduce_s"] < found["seconds"] < time.perf_counter() - started
    assert found["ranks"] == 2 and found["nodes"] == 1
    assert found["all_reduce_gb_per_s"] == pytest.approx(4 * ELEMENTS / found["all_reduce_s"] / 1e9, rel=0.05, abs=1e-3)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_for_the_checkpoints_is_refused_by_name(workplace):
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    folder = workplace / "runs-small"
    folder.mkdir()
    mount = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size=1m tmpfs {folder} && exec "$@"', "sh"]
    words = [*TRAIN, "run.name=none", "run.dir=runs-small", "launch.nproc_per_node=2"]
    command = [*mount, sys.executable, "-m", "megatrain", *words]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 8, done.stderr
    problem = r"runs-small/none has [\d.]+ [kM]?B left but needs space for 3 more checkpoints of [\d.]+ MB"
    assert re.search(rf"preflight: {re.escape(HERE)}, rank 0: {problem}", done.stderr), done.stderr
    assert "step " not in done.stderr


def test_a_server_that_does_not_answer_only_causes_a_warning(workplace):
    with socket.socket() as silent:  # accepts, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        words = [*TRAIN, "run.name=preflight", "train.steps=2", "train.eval_every=0", "tracking=mlflow"]
        done = megatrain(
            workplace, *words, "tracking.finish_timeout_s=1", "engine=native", environ={"MLFLOW_TRACKING_URI": uri}
        )
    assert done.returncode == 0, done.stderr
    assert f"MLflow at {uri} does not answer" in done.stderr
    (ready,) = events(workplace, "preflight", "preflight")
    assert ready["ranks"] == 1 and ready["seconds"] >= module.SERVER_S


@pytest.mark.parametrize(
    "uri", ["http://somebody:s3cret@localhost", "http://localhost:abc", "http://a b", "http://[::1"]
)
def test_an_invalid_address_only_causes_a_warning_without_its_password(uri, caplog):
    module.check_server(uri, "demo")
    assert "does not answer" in caplog.text and "s3cret" not in caplog.text


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH\r\n", b'HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{"experiment":{}}']
)
def test_a_server_gets_user_and_password_and_may_answer_with_garbage(answer, caplog):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        asked = []

        def serve():
            connection, _ = server.accept()
            with connection:
                asked.append(connection.recv(4096))
                connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        module.check_server(f"http://me:pass@127.0.0.1:{server.getsockname()[1]}", "demo")
        thread.join(5)
    assert b"Authorization: Basic bWU6cGFzcw==" in asked[0]
    assert ("does not answer" in caplog.text) == answer.startswith(b"SSH")


def test_a_server_that_answers_byte_by_byte_does_not_delay_the_start(monkeypatch, caplog):
    monkeypatch.setattr(module, "SERVER_S", 0.1)
    monkeypatch.setattr(module, "store_problem", lambda *_: time.sleep(5))
    started = time.monotonic()
    module.check_server("http://localhost", "demo")
    assert time.monotonic() - started < 2 and "no answer" in caplog.text
